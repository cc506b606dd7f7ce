"""Trains one model from one YAML: `python train.py --config FILE [key=value ...]`, the same under torchrun."""

from training.threads import wait_passively

wait_passively()  # before torch loads

import argparse
import json
import logging
import sys
from pathlib import Path

from files.errors import run_command
from training.config import dump_config, json_schema
from training.processor import keep_freed_memory
from training.run import Resume, describe_result, dry_run, find_config, find_folder, run, with_class_names


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of train.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the config")
    parser.add_argument("--config", type=Path, help="a YAML of configs/train; default: the handwritten digits")
    parser.add_argument("--output", type=Path, help="the run folder; default: runs/NAME-TIME")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on: from --output or the newest run, or from a path")
    parser.add_argument("--print-config", action="store_true", help="print the whole config and stop")
    parser.add_argument(
        "--json-schema", action="store_true", help="print the JSON schema of a config, for editors, and stop"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build all, run one batch, learn it by heart, print the plan, leave nothing behind",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done or saved, 1 failed while running, 2 a mistake in what was given."""
    args = parse_args(argv)
    # of a run the folder holds what came of it: a log that cannot be written does not make it fail
    return run_command(lambda: train(args), printed=args.print_config or args.json_schema or args.dry_run)


def train(args: argparse.Namespace) -> int:
    """Prints the config, its schema, or the plan, or trains."""
    if args.json_schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    name = args.config.stem if args.config else "digits"
    resume: Resume = args.resume if args.resume in (None, "auto") else Path(args.resume)
    folder = find_folder(args.output, resume=resume, name=name)
    config = find_config(args.config, args.overrides, folder, resume=resume)
    if args.print_config:
        told = dump_config(with_class_names(config)).rstrip("\n")
    elif args.dry_run:
        told = dry_run(config, folder, resume=resume, name=name)
    else:
        if config.runtime.keep_memory:
            keep_freed_memory()
        told = describe_result(run(config, folder, resume=resume, name=name))
    if told:
        print(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
