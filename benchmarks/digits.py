"""The default run over several seeds."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Commands, machine
from files.errors import Failure


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `digits` to the command line."""
    parser = commands.add_parser("digits", help="the default run over seeds", parents=[common])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*")
    parser.set_defaults(run=digits_seeds)


def digits_seeds(args: argparse.Namespace) -> dict[str, Any]:
    """The default training run over several seeds, and a support-vector machine on the same split."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    from training.data.digits import digits_split

    train, val = digits_split()
    inputs, targets = load_digits(return_X_y=True)
    machines = {}
    for c in (1, 10):
        fitted = SVC(C=c, gamma="scale").fit(inputs[train], targets[train])
        machines[f"rbf_svm_c{c}"] = round(100 * float(fitted.score(inputs[val], targets[val])), 2)
    rows, threads = [], 0
    keys = ("final_top1", "best_top1", "seconds", "images_per_second")
    for seed in range(args.seeds):
        output = args.runs / f"digits-seed-{seed}"
        threads = train_digits(output, [f"seed={seed}", *args.overrides])
        summary = json.loads((output / "summary.json").read_text())
        rows.append({"seed": seed, **{k: summary[k] for k in (*keys, "weights_sha256")}})
        print(rows[-1], flush=True)
    mean = {k: round(statistics.mean(r[k] for r in rows), 3) for k in keys}
    print({**mean, **machines})
    return {"machine": machine(threads), "rows": rows, "mean": mean, **machines}


def train_digits(output: Path, overrides: list[str]) -> int:
    """Runs train.py as a user would; returns the number of threads that it computed with.

    Raises:
        Failure: The run fails; with its own words.
    """
    command = [sys.executable, str(ROOT / "train.py"), *overrides, "--output", str(output)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failure("\n".join(done.stderr.strip().splitlines()[-3:]).removeprefix("error: "))
    return json.loads((output / "environment.json").read_text())["threads"]
