"""How long a process takes to start: imports and `--help` of each script beside `import torch, timm`, and the first step
of the default run."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Commands, machine, paired_ratio
from files.errors import Failure

WANTED = 1.1
"""Seconds over those of `import torch, timm`, at most."""

WANTED_FIRST_STEP = 8.0  # seconds from the start of the process

STARTS: dict[str, list[str]] = {
    "import torch, timm": ["-c", "import torch, timm"],
    "import torch": ["-c", "import torch"],
    "import models": ["-c", "import models"],
    **{f"{name}.py --help": [f"{name}.py", "--help"] for name in ("train", "validate", "predict", "export", "tune")},
}
"""Arguments of Python by what they start; the first is what the others are compared with."""

FIRST_STEP = """
import os, runpy, sys, time
sys.path.insert(0, os.getcwd())
from training.threads import wait_passively
wait_passively()
from torch.optim.optimizer import register_optimizer_step_post_hook

def tell(*_):
    print("first step at", time.time(), flush=True)
    os._exit(0)

register_optimizer_step_post_hook(tell)
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
"""train.py, which ends after its first optimizer step and tells when that was."""


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `startup` to the command line."""
    parser = commands.add_parser(
        "startup", help="imports, --help and the first step, in fresh processes", parents=[common]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.set_defaults(run=startup_benchmark)


def environment() -> dict[str, str]:
    """Of the processes measured: Python may keep what it compiled of our modules, as it does of installed ones."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def seconds_of(arguments: list[str]) -> float:
    """Seconds of a Python process from start to end.

    Raises:
        Failure: It fails; with its last line.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise Failure(f"python {' '.join(arguments)}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return seconds


def seconds_to_first_step() -> float:
    """Seconds from the start of `python train.py` to the end of its first optimizer step.

    Raises:
        Failure: There is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", FIRST_STEP, "--output", str(Path(folder) / "run")]
        start = time.time()
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    told = [line for line in done.stdout.splitlines() if line.startswith("first step at ")]
    if not told:
        raise Failure(f"no first step: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return float(told[0].rpartition(" ")[2]) - start


def startup_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """All starts in turns, after one of each that counts for nothing; medians, and ratios to the first by round."""
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    steps: list[float] = []
    for number in range(args.rounds + 1):
        seconds = {name: seconds_of(arguments) for name, arguments in STARTS.items()}
        step = seconds_to_first_step()
        if number:
            steps.append(step)
            for name, value in seconds.items():
                times[name].append(value)
    rows = compare(times)
    for name, row in rows.items():
        print(f"{name:20} {row}", flush=True)
    first_step = {"seconds": round(statistics.median(steps), 2), "all": [round(step, 2) for step in steps]}
    print(f"first step of the digits: {first_step['seconds']} s (wanted: {WANTED_FIRST_STEP})")
    return {
        "machine": machine(1),
        "rows": rows,
        "first_step": first_step,
        "wanted": {"ratio": WANTED, "first_step": WANTED_FIRST_STEP},
    }


def compare(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Median seconds of each, and its ratio to the first, by round, with quartiles."""
    reference = next(iter(times.values()))
    rows = {}
    for name, seconds in times.items():
        ratio, quartiles = paired_ratio(seconds, reference, digits=3)
        rows[name] = {"seconds": round(statistics.median(seconds), 3), "ratio": ratio, "quartiles": quartiles}
    return rows
