"""Drop-path rate over training time: a step -> a multiplier of every block's rate.

`early` and `late` follow Liu et al. 2023, "Dropout Reduces Underfitting" (https://arxiv.org/abs/2303.01500). A schedule
is a pure function of the optimizer step, so resuming a run needs nothing of it to be saved.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from layers.rates import as_number, check_choice, nearest

Kind = Literal["constant", "ramp", "early", "late", "cosine", "piecewise"]
SETTINGS: dict[Kind, tuple[str, ...]] = {
    "constant": (),
    "ramp": ("cutoff", "start", "end"),
    "early": ("cutoff", "shape"),
    "late": ("cutoff",),
    "cosine": ("cutoff", "start", "end"),
    "piecewise": ("points",),
}
"""The settings that have an effect, by kind; those of a training config are these, its cutoff in epochs."""
KINDS: tuple[str, ...] = tuple(SETTINGS)


@dataclass(frozen=True, kw_only=True)
class DropPathSchedule:
    """Multiplier in [0, 1] of the drop-path rates at each optimizer step.

    - `constant`: 1.
    - `ramp`: linear from `start` at step 0 to `end` at the last step before `cutoff`, then `end`.
    - `cosine`: the same along half a cosine.
    - `early`: before `cutoff`, linear from 1 at step 0 to 0 at step cutoff - 1, both included (shape `linear`: the values
      of linspace(1, 0, cutoff)), or 1 (shape `constant`); 0 from `cutoff` on.
    - `late`: 0 before `cutoff`, 1 from it on.
    - `piecewise`: linear between `points`, constant behind the last.

    Args:
        kind: One of the above.
        cutoff: In optimizer steps.
        shape: Of `early`.
        start: Multiplier at step 0 of `ramp` and `cosine`.
        end: Multiplier that they reach.
        points: (step, multiplier) pairs of `piecewise`, steps rising from 0.

    Raises:
        ValueError: An unknown kind, a missing or wrong setting.
    """

    kind: Kind = "constant"
    cutoff: int | None = None
    shape: Literal["linear", "constant"] = "linear"
    start: float = 0.0
    end: float = 1.0
    points: Sequence[tuple[int, float]] = ()

    def __post_init__(self) -> None:
        check_choice(self.kind, KINDS, "schedule kind")
        if self.shape not in ("linear", "constant"):
            hint = nearest(self.shape, ("linear", "constant"))
            raise ValueError(f"schedule shape must be linear or constant, got {self.shape!r}{hint}")
        if "cutoff" in SETTINGS[self.kind] and not 1 <= (as_number(self.cutoff) or 0) < math.inf:
            raise ValueError(f"schedule {self.kind!r} needs a cutoff of at least 1 step, got {self.cutoff!r}")
        self._refuse_what_has_no_effect()
        points = _pairs(self.points)
        if points is None:
            raise ValueError(f"schedule points must be pairs of a step and a multiplier, got {self.points!r}")
        multipliers = [self.start, self.end, *(m for _, m in points)]
        if not all(0.0 <= number <= 1.0 for number in (_or_nan(m) for m in multipliers)):
            raise ValueError(f"schedule multipliers must be in [0, 1], got {multipliers}")
        if self.kind == "piecewise":
            steps = [s for s, _ in points]
            if not steps or steps[0] != 0 or any(b <= a for a, b in itertools.pairwise(steps)):
                raise ValueError(f"schedule 'piecewise' needs points at rising steps from 0, got steps {steps}")

    def _refuse_what_has_no_effect(self) -> None:
        for setting in fields(self)[1:]:
            given = getattr(self, setting.name) != setting.default
            if given and setting.name not in SETTINGS[self.kind]:
                raise ValueError(f"schedule {setting.name} has no effect with kind {self.kind!r}")

    def __call__(self, step: int) -> float:
        """The multiplier at an optimizer step, counted from 0.

        Raises:
            ValueError: It is no number of at least 0.
        """
        if not _or_nan(step) >= 0.0:
            raise ValueError(f"schedule: a step must be a number of at least 0, got {step!r}")
        if self.kind == "constant":
            return 1.0
        if self.kind == "piecewise":
            return self._between_points(step)
        assert self.cutoff is not None
        if self.kind == "late":
            return 0.0 if step < self.cutoff else 1.0
        if self.kind == "early":
            if step >= self.cutoff:
                return 0.0
            return 1.0 if self.shape == "constant" else self._fall(step)
        done = 1.0 - self._fall(step) if step < self.cutoff else 1.0
        if self.kind == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        return self.start + (self.end - self.start) * done

    def _fall(self, step: int) -> float:
        """Entry `step` of linspace(1, 0, cutoff); a cutoff of one step has the entry 1 alone."""
        assert self.cutoff is not None
        return 1.0 - step / (self.cutoff - 1) if self.cutoff > 1 else 1.0

    def _between_points(self, step: int) -> float:
        for (left, a), (right, b) in zip(self.points, self.points[1:], strict=False):
            if step < right:
                return a + (b - a) * (step - left) / (right - left)
        return self.points[-1][1]


def _pairs(points: Any) -> list[tuple[Any, Any]] | None:
    """Points as pairs, of which the first are numbers; `None` if they are something else."""
    try:
        pairs = [(step, multiplier) for step, multiplier in points]
    except (TypeError, ValueError):
        return None
    return pairs if all(as_number(step) is not None for step, _ in pairs) else None


def _or_nan(value: Any) -> float:
    """A number as a float; NaN for what is none."""
    number = as_number(value)
    return math.nan if number is None else number
