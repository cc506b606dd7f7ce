"""Runs of a benchmark over seeds, and how two settings differ over the same seeds.

A unit is one run folder. One that is finished is not trained again, and one that was interrupted is gone on with, so that
a benchmark of an hour may be stopped and started again at no cost.
"""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from files.durable import save_text
from files.errors import ConfigError, Failure
from training.config import TrainConfig, dump_config
from training.evaluating.part import Split, WantedData
from training.evaluating.validation import Request, validate
from training.run import run
from tuning.statistics import claim
from tuning.statistics import compare as paired

SCORE = "score.json"
"""In a unit's folder: the config that was asked for and what came of it. There once the unit is finished."""


def score(config: TrainConfig, folder: Path, *, split: Split) -> dict[str, float]:
    """Trains a unit to its end where that has not been done, and scores its best weights.

    Args:
        config: Of the run; validated at the end alone (`log.validate_every`), it has no weights to choose among.
        folder: Of the run. Its console goes to the file `NAME.log` beside it.
        split: The part of the data to score on.

    Returns:
        `top1` in percent on that part, `nll` where it is not val, and `cpu_seconds` that the unit took, as far as it ran
        without a break.

    Raises:
        ConfigError: Another unit lies in the folder.
        Failure: The run was stopped by a signal.
    """
    asked, place = f"{split}\n{dump_config(config)}", folder / SCORE
    with contextlib.suppress(FileNotFoundError):
        known = json.loads(place.read_text(encoding="utf-8"))
        if known.get("asked") != asked:  # none in what profiles wrote before it used units
            raise ConfigError(f"--work: {folder} holds a unit of other settings; name another folder, or delete it")
        return known["score"]
    start = time.process_time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.log").open("a") as log, contextlib.redirect_stdout(log):
        summary = run(config, folder, resume="auto")
        if "stopped_by" in summary:
            raise Failure(f"stopped by {summary['stopped_by']}; the same command goes on from here")
        metrics = {"top1": summary["best_top1"]}  # of the validation part
        if split != "val":
            (evaluation,) = validate(Request([str(folder)], data=WantedData(split=split)))
            metrics = {key: evaluation.metrics[key] for key in ("top1", "nll")}
    found = {**metrics, "cpu_seconds": time.process_time() - start}
    save_text(place, json.dumps({"asked": asked, "score": found}))
    return found


def spread(scores: Mapping[int, float]) -> dict[str, Any]:
    """Scores by seed, their mean, and their standard deviation over seeds."""
    values = list(scores.values())
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return {"scores": rounded(scores), "mean": round(statistics.mean(values), 2), "sd": round(deviation, 2)}


def rounded(scores: Mapping[int, float]) -> dict[int, float]:
    return {seed: round(value, 3) for seed, value in scores.items()}


def compare(first: tuple[str, Mapping[int, float]], second: tuple[str, Mapping[int, float]]) -> dict[str, Any]:
    """Two settings on the same seeds, by `tuning.statistics`.

    Args:
        first: What it is called, and its scores in percent by seed.
        second: The same of the other one.

    Returns:
        `difference` of the means in points, first minus second; its 95 % `interval` and `p`, with 2 seeds or more; `seeds`,
        how many; `sentence`.
    """
    (name, scores), (other, others) = first, second
    found, turned = paired(scores, others), paired(others, scores)
    told: dict[str, Any] = {"first": name, "second": other, "difference": round(found.difference, 2)}
    told["seeds"] = len(found.seeds)
    if found.interval is not None and found.p is not None:
        told |= {"interval": [round(end, 2) for end in found.interval], "p": round(found.p, 5)}
    names = (found, name, other) if found.difference >= 0 else (turned, other, name)
    return {**told, "sentence": claim(*names, unit="points").replace("\u00a0", " ")}
