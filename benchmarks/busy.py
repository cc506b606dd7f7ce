"""Throughput of the default run beside a busy process."""

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Commands, machine
from files.errors import Failure

# Share of its throughput that a run should keep beside a busy process: a fair share of two cores for one thread is 1/2.
WANTED = 0.4

NEIGHBOUR = """
import os, torch
torch.set_num_threads(2)
parent, matrix = os.getppid(), torch.randn(1024, 1024)
matrix @ matrix
print("computing", flush=True)
while os.getppid() == parent:  # does not outlive the benchmark
    matrix @ matrix
"""
"""A process of two computing threads that wait as they do by default: spinning."""


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `busy` to the command line."""
    parser = commands.add_parser("busy", help="the default run beside a busy process, over alone", parents=[common])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="of each run")
    parser.add_argument("overrides", nargs="*")
    parser.set_defaults(run=busy_benchmark)


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process computes with two threads."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR], stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"computing\n"
            yield
        finally:
            process.kill()


def busy_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Throughput of the default training run beside a process of two computing threads, over its throughput alone."""
    sides = {"alone": contextlib.nullcontext, "beside": busy_neighbour}
    rows, threads = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            row: dict[str, float] = {}
            for side, company in sides.items():
                output = Path(folder) / f"{side}-{number}"
                with company():
                    threads = train_apart(output, [f"optim.epochs={args.epochs}", *args.overrides])
                with (output / "metrics.csv").open() as file:
                    rates = [float(epoch["images_per_second"]) for epoch in csv.DictReader(file)]
                row[side] = round(statistics.median(rates), 1)
            rows.append({**row, "ratio": round(row["beside"] / row["alone"], 3)})
            print(rows[-1], flush=True)
    median = {key: round(statistics.median(r[key] for r in rows), 3) for key in rows[0]}
    print(
        f"beside a process of two computing threads: {median['ratio']:.2f} of the throughput alone (wanted: {WANTED})"
    )
    return {"machine": machine(threads), "rows": rows, "median": median, "wanted": WANTED}


def train_apart(output: Path, overrides: list[str]) -> int:
    """Runs train.py as a user would, in a process of its own; returns the number of threads that it computed with.

    Raises:
        Failure: The run fails; with its own words.
    """
    command = [sys.executable, str(ROOT / "train.py"), *overrides, "--output", str(output)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failure("\n".join(done.stderr.strip().splitlines()[-3:]).removeprefix("error: "))
    return json.loads((output / "environment.json").read_text())["threads"]
