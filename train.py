"""Trains one model from one YAML: `python train.py --config FILE [key=value ...]`, the same under torchrun."""

import argparse
import logging
import sys
from pathlib import Path

from files.errors import ConfigError
from training.checkpoint import CheckpointError
from training.config import TrainConfig, dump_config, load_config
from training.data.build import class_names_of_data
from training.data.dataset import ReadError
from training.data.skipping import lost_worker
from training.distributed import close_world, init_world
from training.loop import NonFiniteError
from training.run import run, warn
from training.run_folder import RunFolder, latest_run
from training.threads import wait_passively

wait_passively()  # before torch loads


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of train.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the config")
    parser.add_argument("--config", type=Path, help="a YAML of configs/train; default: the handwritten digits")
    parser.add_argument("--output", type=Path, help="the run folder; default: runs/NAME-TIME")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on: from --output or the newest run, or from a path")
    parser.add_argument("--print-config", action="store_true", help="print the whole config and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="build all, run one batch, print the plan, leave nothing behind"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done or saved, 1 failed while running, 2 a mistake in what was given."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    world = None
    try:
        folder = find_folder(args)
        config = find_config(args, folder)
        if args.print_config:
            print(dump_config(with_class_names(config)), end="")
            return 0
        world = init_world(config.runtime.device)
        if not world.is_main:
            logging.disable(logging.INFO)
            logging.getLogger("models").setLevel(logging.ERROR)  # what became of the weights, the main process says
        return run(args, config, folder, world)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteError, CheckpointError, ReadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        lost = lost_worker(error)
        if lost is None:
            raise
        print(f"error: {lost}", file=sys.stderr)
        return 1
    finally:
        if world is not None:
            close_world(world)


def find_folder(args: argparse.Namespace) -> Path | None:
    """The folder of the run to write or to go on with; None for a new one still to be named."""
    if args.resume in (None, "auto"):
        if args.resume is None or args.output is not None:
            return args.output
        name = args.config.stem if args.config else "digits"
        found = latest_run(name)
        if found is None:
            print(f"--resume auto: no run runs/{name}-* yet; starting one")
        return found
    path = Path(args.resume)
    run_path = path.parent.parent if path.parent.name == "checkpoints" else path
    if not RunFolder(run_path).holds_run():
        raise ConfigError(f"--resume {args.resume}: not a run folder, nor a checkpoint in one")
    if args.output is not None and args.output.resolve() != run_path.resolve():
        raise ConfigError(f"--resume {args.resume} and --output {args.output} name two folders; leave --output out")
    return run_path


def find_config(args: argparse.Namespace, folder: Path | None) -> TrainConfig:
    """The config given; where a run is resumed without one, the run's own."""
    own = folder is not None and args.resume and args.config is None and RunFolder(folder).holds_run()
    return load_config(RunFolder(folder).config if folder is not None and own else args.config, args.overrides)


def with_class_names(config: TrainConfig) -> TrainConfig:
    """The config with the names of its data's classes; as it is, with a warning, where they cannot be had."""
    if config.data.class_names is not None:
        return config
    try:
        names = class_names_of_data(config.data)
    except ConfigError as error:
        warn(f"data.class_names is not known: {error}")
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"class_names": names})})


if __name__ == "__main__":
    sys.exit(main())
