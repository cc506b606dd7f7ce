"""What evaluation.json holds, checked, and what follows from it."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Picture = Annotated[str, Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$")]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""NaN where the file has null, as it has for what is not finite; older files have NaN themselves."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Mistake(_Part):
    """A picture that was taken for another class."""

    image: Picture
    name: str
    label: str
    prediction: str
    probability: Number


class Example(_Part):
    """A picture of a training batch, with the classes that its target mixes and their shares."""

    image: Picture
    labels: list[tuple[str, Number]]


class ClassResult(NamedTuple):
    """How often the samples of a class were recognised."""

    name: str
    samples: int
    hits: int

    @property
    def recall(self) -> float:
        """In percent; NaN without samples."""
        return 100 * self.hits / self.samples if self.samples else math.nan


class Confused(NamedTuple):
    """Samples of a class that were taken for another."""

    label: str
    prediction: str
    count: int
    share: float  # of the label's samples


class Evidence(_Part):
    """What `training.evaluating.evidence` measured at the end of a run.

    Attributes:
        epoch: After which it was measured.
        samples: Validation samples.
        classes: A name for each logit.
        pairs: (label, prediction, samples) of all pairs that occur, as places in `classes`.
        bins: (samples, hits, sum of confidences) of bins of confidence of equal width.
    """

    epoch: int
    samples: Count
    classes: list[str]
    pairs: list[tuple[Count, Count, Count]]
    bins: list[tuple[Number, Number, Number]]
    mistakes: list[Mistake] = []
    batch: list[Example] = []
    notes: list[str] = []

    @model_validator(mode="after")
    def _check(self) -> "Evidence":
        if any(max(label, prediction) >= len(self.classes) for label, prediction, _ in self.pairs):
            raise ValueError("a pair names no class")
        return self

    def per_class(self) -> list[ClassResult]:
        """Of each class that has samples, in order."""
        samples: dict[int, int] = defaultdict(int)
        hits: dict[int, int] = defaultdict(int)
        for label, prediction, count in self.pairs:
            samples[label] += count
            hits[label] += count * (label == prediction)
        return [ClassResult(self.classes[i], samples[i], hits[i]) for i in sorted(samples)]

    def weakest(self, most: int) -> list[ClassResult]:
        """Classes of which not all samples were recognised, the worst first."""
        return sorted((each for each in self.per_class() if each.hits < each.samples), key=lambda each: each.recall)[
            :most
        ]

    def worst_pairs(self, most: int) -> list[Confused]:
        """The pairs of different classes with most samples; among equals those of small classes first."""
        samples: dict[int, int] = defaultdict(int)
        for label, _, count in self.pairs:
            samples[label] += count
        wrong = [(label, prediction, count) for label, prediction, count in self.pairs if label != prediction and count]
        wrong.sort(key=lambda pair: (-pair[2], samples[pair[0]], pair))
        names = self.classes
        return [Confused(names[i], names[j], count, count / samples[i]) for i, j, count in wrong[:most]]

    @property
    def wrong(self) -> int:
        """Samples that were not recognised; those without a prediction are in no pair."""
        return self.samples - sum(count for label, prediction, count in self.pairs if label == prediction)

    def calibration(self) -> tuple[float, float, float]:
        """ECE, mean confidence and accuracy, in percent; NaN without samples, or where a bin is not finite."""
        total = sum(samples for samples, _, _ in self.bins)
        if not total:
            return math.nan, math.nan, math.nan
        ece = sum(abs(hits - confidence) for _, hits, confidence in self.bins) / total
        confidence, hits = sum(c for *_, c in self.bins) / total, sum(h for _, h, _ in self.bins) / total
        told = 100 * ece, 100 * confidence, 100 * hits
        return told if all(map(math.isfinite, told)) else (math.nan, math.nan, math.nan)


def read_evidence(path: Path, notes: list[str]) -> Evidence | None:
    """What the file holds; None, and a note where it is damaged, where there is nothing to show."""
    if not path.exists():
        return None
    try:
        return Evidence.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        notes.append(f"{path.name} is damaged and was left out.")
        return None
