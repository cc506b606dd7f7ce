"""What a study takes from its neighbours: the advice it starts with, the verdict and the report it ends with.

The report is imported when it is written, since it needs matplotlib; tests put stand-ins in the place of all of them.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from training.config import TrainConfig
from tuning import advice, verdict
from tuning.space import Values
from tuning.study import StudyFolder


class Advice(Protocol):
    """A rate for a training config.

    Attributes:
        rate: To begin with, the largest over blocks.
        profile: That it is meant with.
        published: That of the model's authors; None where there is none.
        published_profile: That it was used with.
    """

    @property
    def rate(self) -> float: ...

    @property
    def profile(self) -> str: ...

    @property
    def published(self) -> float | None: ...

    @property
    def published_profile(self) -> str | None: ...


@dataclass(frozen=True)
class Finalist:
    """A configuration in the final.

    Attributes:
        role: "winner", "zero" or "published"; "runner-up" where the winner is all of these.
        values: Of the keys that were varied.
        digest: Of its config.
        config: The training config.
        scores: Of each fresh seed whose run did not fail.
        failed: How many did.
    """

    role: str
    values: Values
    digest: str
    config: TrainConfig
    scores: dict[int, float]
    failed: int = 0


def advise(config: TrainConfig) -> Advice:
    """The advisor's word on a training config."""
    return advice.advise(config)


def score_unit(folder: Path, split: str, metric: str) -> float:
    """What the weights of a unit score on a split; measured once."""
    return verdict.score_unit(folder, split=split, metric=metric)


def conclude(folder: StudyFolder, finalists: Sequence[Finalist], metric: str, split: str) -> dict[str, Any]:
    """Compares the finalists and writes verdict.json; returns what stands in it."""
    contenders = [
        verdict.Contender(
            role=cast(verdict.Role, one.role),
            parameters=one.values,
            digest=one.digest,
            label=verdict.label_of(one.config, one.values),
            seeds=list(one.scores),
            scores=list(one.scores.values()),
            failed=one.failed,
        )
        for one in finalists
    ]
    return verdict.conclude(folder, contenders, metric=metric, split=split)


def write_best(folder: StudyFolder, config: TrainConfig, sentence: str) -> None:
    """Writes best.yaml."""
    verdict.write_best(folder, config, sentence)


def write_report(folder: Path) -> None:
    """Writes report.html; it can be made again at any time, so that its failure is not the study's."""
    try:
        from tuning.report.page import write_study_report  # matplotlib and jinja2

        write_study_report(folder)
    except Exception as error:
        what = str(error).partition("\n")[0] or type(error).__name__
        print(f"warning: no report: {what}; it is made when the study is started again", file=sys.stderr)


@dataclass(frozen=True)
class Links:
    """The neighbours of a study."""

    advise: Callable[[TrainConfig], Advice | None] = advise
    score_unit: Callable[[Path, str, str], float] = score_unit
    conclude: Callable[[StudyFolder, Sequence[Finalist], str, str], dict[str, Any]] = conclude
    write_best: Callable[[StudyFolder, TrainConfig, str], None] = write_best
    write_report: Callable[[Path], None] = write_report
