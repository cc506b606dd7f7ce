"""A run is a callable: built, checked against its folder, trained or gone on with."""

import argparse
import sys
from pathlib import Path

from files.errors import ConfigError
from training.checkpoint import latest_checkpoint, load_checkpoint
from training.config import TrainConfig, load_config
from training.distributed import World
from training.loop import dry_run, train
from training.run_folder import RunFolder, changed_environment, new_run_path
from training.setup import build, describe, on_main


def run(args: argparse.Namespace, config: TrainConfig, path: Path | None, world: World) -> int:
    """Builds and trains."""
    checkpoint = same_data = None
    if args.resume and path is not None:
        if args.resume != "auto" and Path(args.resume).parent.name == "checkpoints":
            checkpoint = load_checkpoint(Path(args.resume), rank=world.rank, world_size=world.size)
        else:
            checkpoint = latest_checkpoint(
                RunFolder(path).checkpoints, rank=world.rank, world_size=world.size, warn=warn
            )
        same_data = checkpoint.shared.get("data") if checkpoint is not None else RunFolder(path).read_data()
    setup = build(config, world, load_checkpoint=checkpoint is None, same_data=same_data)
    if checkpoint is not None and path is not None and world.is_main:
        for change in changed_environment(RunFolder(path), world):
            warn(f"{change}; the result will not be bit-equal to an uninterrupted run's")
    name = args.config.stem if args.config else "digits"
    folder = RunFolder(path or new_run_path(name, world))
    check_same_run(folder, setup.config, resuming=bool(args.resume))
    if args.dry_run:
        on_main(world, lambda: folder.probe(fresh=not args.resume))
        plan = describe(setup)
        result = dry_run(setup)
        if world.is_main:
            print(f"{plan}\n{result}")
        return 0
    on_main(world, lambda: folder.make(fresh=not args.resume))
    if world.is_main:
        print(describe(setup))
        start = "" if checkpoint is None else f", going on from step {checkpoint.step}"
        print(f"run       {folder.path}{start}")
    summary = train(setup, folder, checkpoint)
    if world.is_main and "stopped_by" not in summary:
        print(
            f"final top-1 {summary['final_top1']:.2f}, best {summary['best_top1']:.2f}, {summary['seconds']:.1f} s; "
            f"report: {folder.path / 'report.html'}"
        )
        skipped = summary["skipped_images"]
        if any(skipped.values()):
            print(
                f"images that could not be read: {skipped['train']} for training, replaced, and {skipped['val']} for "
                f"validation, left out of its figures: {folder.skipped}"
            )
    return 0


# Keys that may change when a run goes on, by section: they change nothing that is learned, but for the rounding of other
# threads, which `changed_environment` warns of.
# Change nothing that is learned: the data themselves are compared by `build`, the number of threads is warned about.
FREE_TO_CHANGE = {
    "data": {"workers", "root", "eval_batch_size", "class_names", "on_error", "max_skipped"},
    "runtime": {"threads"},
}


def check_same_run(folder: RunFolder, config: TrainConfig, *, resuming: bool) -> None:
    """Refuses to go on with a run under settings that would make it another run.

    Raises:
        ConfigError: Naming the first key that differs.
    """
    if not resuming or not folder.holds_run():
        return
    old, new = load_config(folder.config).model_dump(), config.model_dump()
    for section in ("seed", "model", "drop_path", "data", "augment", "optim", "ema", "runtime"):
        before, after = old[section], new[section]
        if section in FREE_TO_CHANGE:
            free = FREE_TO_CHANGE[section]
            before, after = ({k: v for k, v in d.items() if k not in free} for d in (before, after))
        if before != after:
            keys = [k for k in after if before.get(k) != after[k]] if isinstance(after, dict) else []
            key = f"{section}.{keys[0]}" if keys else section
            values = (before[keys[0]], after[keys[0]]) if keys else (before, after)
            raise ConfigError(
                f"--resume: {key} is {values[1]!r}, but the run in {folder.path} has {values[0]!r}; "
                "leave it as it was, or start a new run from its weights (model.checkpoint)"
            )


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
