"""Speed and memory side by side, in one process, in turns: `python benchmark.py --help`."""

from training.threads import wait_passively

wait_passively()  # before torch loads

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import (
    any_model,
    busy,
    depth,
    digits,
    drop_path,
    finetune,
    finetune_imagenet,
    fold,
    foreign_off,
    gpu,
    precision,
    profiles,
    saving,
    scale,
    startup,
    step,
    tuning,
)
from benchmarks import input as input_speed
from benchmarks.measure import facts
from files.errors import run_command
from training.processor import keep_freed_memory


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of benchmark.py; `run` is the benchmark that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", "--out", type=Path, help="JSON; default benchmarks/results/NAME.json")
    commands = parser.add_subparsers(dest="command", required=True)
    for benchmark in (
        drop_path,
        any_model,
        fold,
        digits,
        busy,
        saving,
        input_speed,
        finetune,
        finetune_imagenet,
        depth,
        profiles,
        tuning,
        startup,
        foreign_off,
        scale,
        step,
        gpu,
        precision,
    ):
        benchmark.add_parsers(commands, common)
    args = parser.parse_args(argv)
    args.output = args.output or Path("benchmarks/results") / f"{args.command}.json"
    try:  # before what may take hours
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.open("a").close()
    except OSError as error:
        parser.error(f"--output {args.output}: {error.strerror}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark and writes its JSON."""
    args = parse_args(argv)
    if "threads" in args:
        torch.set_num_threads(args.threads)

    def measure() -> int:
        command = f"python benchmark.py {' '.join(argv if argv is not None else sys.argv[1:])}"
        origin = {"command": command, **facts()}
        args.save = lambda found: args.output.write_text(json.dumps({**origin, **found}, indent=1) + "\n")
        args.save(args.run(args))
        print(f"written {args.output}")
        return 0

    return run_command(measure)


if __name__ == "__main__":
    keep_freed_memory()  # as runs do, for all sides alike: page faults would swamp the differences
    sys.exit(main())
