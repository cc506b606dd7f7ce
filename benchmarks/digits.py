"""The default run over several seeds."""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Commands, machine
from training.config import load_config
from training.run import run


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
        summary = run(load_config(None, [f"seed={seed}", *args.overrides]), output)
        threads = torch.get_num_threads()
        rows.append({"seed": seed, **{k: summary[k] for k in (*keys, "weights_sha256")}})
        print(rows[-1], flush=True)
    mean = {k: round(statistics.mean(r[k] for r in rows), 3) for k in keys}
    print({**mean, **machines})
    return {"machine": machine(threads), "rows": rows, "mean": mean, **machines}
