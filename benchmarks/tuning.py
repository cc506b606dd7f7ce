"""The tuner against the exhaustive grid: what each finds, at how many training steps, and how the two compare on fresh seeds.

Both are studies that `tune.py` runs, in folders of their own: whatever of them is there is not trained again.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Commands, machine
from benchmarks.seeds import compare
from files.errors import Failure
from tuning.study import StudyFolder, Trial

STUDIES = ("mnist5k_few", "mnist5k_few_plain")
GRID = ("search.sampler=grid", "search.trials=null", "space.drop_path.rate={low: 0.0, high: 0.5, step: 0.1}",
        "race={seeds: [4], keep: null}")  # fmt: skip


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `tuning` to the command line."""
    parser = commands.add_parser("tuning", help="the tuner against the exhaustive grid, on mnist5k", parents=[common])
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), metavar="NAME", help="of configs/tune")
    parser.add_argument("--work", type=Path, default=Path("runs/tuning"), help="studies in it go on")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of all studies")
    parser.set_defaults(run=tuning_benchmark)


def tuning_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the grid and the tuner of each study and compares what they found."""
    found = {}
    for name in args.studies:
        grid, tuned = (
            study(ROOT / "configs" / "tune" / f"{name}.yaml", args.work / f"{name}-{kind}", [*given, *args.overrides])
            for kind, given in (("grid", GRID), ("tuner", ()))
        )
        found[name] = {
            "grid": grid,
            "tuner": tuned,
            "share_of_steps": round(tuned["steps"] / grid["steps"], 3),
            "comparison": against(tuned["verdict"], grid["verdict"]),
        }
        print(
            f"{name}: {found[name]['share_of_steps']:.0%} of the grid's steps; {found[name]['comparison']['sentence']}"
        )
    return {"machine": machine(1), "studies": found}


def study(config: Path, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One study, run to its end: its trials, what they cost, and its verdict.

    Raises:
        Failure: It did not come to its end.
    """
    command = [sys.executable, str(ROOT / "tune.py"), "--config", str(config), "--output", str(folder), *overrides]
    if subprocess.run(command).returncode or not StudyFolder(folder).verdict.exists():
        raise Failure(f"the study in {folder} did not come to its end; the same command goes on")
    files = StudyFolder(folder)
    return summary(files.read_trials()) | {"verdict": json.loads(files.verdict.read_text(encoding="utf-8"))}


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """Configurations, each once, in the order in which they were tried; and the optimizer steps of all together."""
    once = {trial.digest: trial for trial in reversed(trials)}
    kept = [trial for trial in trials if once[trial.digest] is trial]
    return {
        "steps": sum(trial.steps for trial in kept),
        "trials": [
            {
                "rate": round(trial.parameters["drop_path.rate"], 4),
                "profile": trial.parameters["drop_path.profile"],
                "scores": list(trial.scores.values()),
                "mean": round(trial.mean, 3) if not math.isnan(trial.mean) else None,
            }
            for trial in kept
        ],
    }


def against(tuned: dict[str, Any], grid: dict[str, Any]) -> dict[str, Any]:
    """The tuner's winner and the grid's on the same fresh seeds, on the test part."""
    (first, own), (second, best) = (
        next(
            (config["label"], dict(zip(config["seeds"], config["scores"], strict=True)))
            for config in verdict["configs"]
            if config["role"] == "winner"
        )
        for verdict in (tuned, grid)
    )
    if first == second:
        return {"first": first, "second": second, "sentence": f"both found {first}"}
    return compare((f"the tuner's {first}", own), (f"the grid's {second}", best))
