"""Runs side by side: which is ahead, whether that can be more than chance, and which classes differ."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from training.report.runs import Run
from training.report.words import format_percent


class ClassRow(NamedTuple):
    """A class with its recall in each run, in percent; NaN where a run does not tell."""

    name: str
    samples: int
    recalls: list[float]

    @property
    def spread(self) -> float:
        """Points between the highest and the lowest."""
        known = [recall for recall in self.recalls if not math.isnan(recall)]
        return max(known) - min(known)


def standing(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """The comparison in a sentence; `labels` are what the runs are called."""
    called = {id(run): label for run, label in zip(runs, labels, strict=True)}
    known = sorted((run for run in runs if not math.isnan(run.final_top1)), key=lambda run: -run.final_top1)
    if len(known) < 2:
        return "Fewer than two runs have been validated: there is nothing to compare."
    first, second = known[0], known[1]
    ahead = first.final_top1 - second.final_top1
    told = f"{called[id(first)]} ends at {format_percent(first.final_top1)} top-1"
    told += f", {ahead:.2f} points ahead of {called[id(second)]}" if ahead else f", and so does {called[id(second)]}"
    noise = _noise(first, second)
    if math.isnan(noise) or len({run.val_samples for run in runs}) > 1:
        return f"{told}; the runs were not validated on the same number of images, as far as their files tell."
    if ahead <= noise:
        return (
            f"{told}: not more than chance, since {first.val_samples:,} validation images cannot tell less than "
            f"{noise:.1f} points apart."
        )
    chance = f"{first.val_samples:,} validation images leave to chance ({noise:.1f} points)"
    return f"{told}: more than {chance}; other seeds may still differ."


def _noise(first: Run, second: Run) -> float:
    """Difference in points that two runs of equal worth exceed once in twenty times, by their validation images."""
    shares = [run.final_top1 / 100 for run in (first, second)]
    if not first.val_samples or not second.val_samples:
        return math.nan
    sizes = (first.val_samples, second.val_samples)
    variance = sum(max(p * (1 - p), 0.25 / n) / n for p, n in zip(shares, sizes, strict=True))
    return 100 * 1.96 * math.sqrt(variance)


def differing_classes(runs: Sequence[Run], most: int) -> list[ClassRow]:
    """Classes on which the runs differ, those that differ most first; of runs whose classes have the same names."""
    told = [run.evidence and {result.name: result for result in run.evidence.per_class()} for run in runs]
    known = [results for results in told if results]
    if len(known) < 2 or any(results.keys() != known[0].keys() for results in known):
        return []
    rows = [
        ClassRow(name, result.samples, [results[name].recall if results else math.nan for results in told])
        for name, result in known[0].items()
    ]
    differing = sorted((row for row in rows if row.spread > 0), key=lambda row: -row.spread)
    return differing[:most]
