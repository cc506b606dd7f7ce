"""The default run over several seeds."""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.measure import machine
from files.errors import ConfigError
from training.config import load_config
from training.run import run


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
        try:
            summary = run(load_config(None, [f"seed={seed}", *args.overrides]), output)
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from None
        threads = torch.get_num_threads()
        rows.append({"seed": seed, **{k: summary[k] for k in (*keys, "weights_sha256")}})
        print(rows[-1], flush=True)
    mean = {k: round(statistics.mean(r[k] for r in rows), 3) for k in keys}
    print({**mean, **machines})
    return {"machine": machine(threads), "rows": rows, "mean": mean, **machines}
