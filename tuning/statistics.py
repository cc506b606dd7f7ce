"""Paired comparisons of two configurations that were trained on the same seeds: exact p, interval, and a sentence.

The test is the paired sign-flip test (Fisher's randomisation test): were the two configurations alike, each seed's
difference would be as likely to have the other sign, so p is the share of all sign patterns whose mean is at least as far
from 0 as the one that was seen. It assumes nothing of the scores' distribution. With n seeds no p is smaller than 2 / 2^n,
which is why 5 seeds cannot tell anything at the 5 % level.

The interval is the percentile bootstrap of the mean difference, expanded for small samples (Hesterberg 2015, arXiv
1411.5279): of 8 normal differences the plain interval that says 95 % holds the mean in 88 of 100 cases, the expanded one in
94 (3,000 trials; BCa is no better than the plain one).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_SEEDS = 6
"""Below, no difference can be significant at `LEVEL`: 2 / 2^5 is 0.063."""

LEVEL = 0.05

MOST_EXACT = 16
"""Seeds up to which all 2^n sign patterns are tried; with more, `FLIPS` of them, drawn at random by a fixed seed."""

FLIPS = 100_000
_RESAMPLES = 20_000

ALIKE = "the same on every seed"
"""Instead of an interval, where there is nothing that it could be of."""


@dataclass(frozen=True)
class Comparison:
    """Two configurations over the seeds that both have a score of.

    Attributes:
        seeds: Those, in order.
        difference: Mean of the first's score minus the second's; NaN without a seed.
        interval: 95 % interval of it; None with fewer than 2 seeds.
        p: Two-sided; None with fewer than 2 seeds.
    """

    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float] | None
    p: float | None

    @property
    def alike(self) -> bool:
        """Whether all seeds have the very same difference, of which an interval would have no width."""
        return self.interval is not None and is_point(self.interval)

    @property
    def enough(self) -> bool:
        """Whether there are seeds enough for a claim."""
        return len(self.seeds) >= FEWEST_SEEDS

    @property
    def found(self) -> bool:
        """Whether a difference is claimed."""
        return self.enough and self.p is not None and self.p < LEVEL


def compare(first: Mapping[int, float], second: Mapping[int, float]) -> Comparison:
    """Compares two configurations by their scores of each seed; seeds that only one of them has do not count."""
    seeds = tuple(sorted(s for s in first.keys() & second.keys() if math.isfinite(first[s] - second[s])))
    differences = [first[seed] - second[seed] for seed in seeds]
    return Comparison(
        seeds=seeds,
        difference=math.fsum(differences) / len(differences) if differences else math.nan,
        interval=bootstrap_interval(differences) if len(differences) > 1 else None,
        p=sign_flip_p(differences) if len(differences) > 1 else None,
    )


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the paired sign-flip test of the mean; 1 where all differences are 0.

    Args:
        differences: Of the pairs; at least 2. A difference of 0 stays 0 under both signs.
    """
    from scipy.stats import permutation_test  # half a second to import

    exact = len(differences) <= MOST_EXACT
    result = permutation_test(
        (np.asarray(differences, dtype=float),),
        np.mean,
        permutation_type="samples",
        n_resamples=2**MOST_EXACT if exact else FLIPS,
        vectorized=True,
        batch=10_000,
        axis=0,
        rng=0,
    )
    return float(result.pvalue)


def bootstrap_interval(differences: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean; a point where all are alike.

    Args:
        differences: At least 2.
        level: Share of such intervals that hold the true mean.
    """
    from scipy.stats import bootstrap, norm, t

    count = len(differences)
    if min(differences) == max(differences):
        return differences[0], differences[0]
    reach = t.ppf((1 + level) / 2, count - 1) * math.sqrt(count / (count - 1))
    result = bootstrap(
        (np.asarray(differences, dtype=float),),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=1_000,
        confidence_level=min(1 - 2 * float(norm.sf(reach)), 1 - 1e-9),
        method="percentile",
        rng=0,
    ).confidence_interval
    return float(result.low), float(result.high)


def is_point(interval: tuple[float, float]) -> bool:
    """Whether an interval has no width, but for what rounding leaves of it."""
    return math.isclose(*interval, rel_tol=1e-9, abs_tol=1e-9)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for there being several (Holm 1979), in the order given."""
    corrected, highest = list(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def pooled_spread(samples: Iterable[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within samples, as of one population, and its degrees of freedom; NaN and 0 without repeats."""
    squares, freedom = 0.0, 0
    for values in samples:
        if len(values) > 1:
            mean = math.fsum(values) / len(values)
            squares += math.fsum((value - mean) ** 2 for value in values)
            freedom += len(values) - 1
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def half_width(spread: float, freedom: int, count: int, *, level: float = 0.95) -> float:
    """Of the interval of a mean of `count` values, by Student's t with a spread from `pooled_spread`; NaN without one."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, freedom)) * spread / math.sqrt(count) if freedom else math.nan


# ---- in words -----------------------------------------------------------------------------------------------------


def format_p(p: float) -> str:
    """As in "p = 0.008": no rounding makes it cross 0.05."""
    if p < 0.001:
        return "p < 0.001"
    if p < LEVEL <= round(p, 3):
        return f"p < {LEVEL:g}"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def format_difference(difference: float, *, unit: str) -> str:
    """A difference of a percentage in points, or of another metric in its unit with three digits."""
    if unit != "points":
        return f"{difference:.3g}" + (f" {unit}" if unit else "")
    digits = 1 if abs(difference) >= 0.095 or difference == 0 else 2
    return f"{difference:.{digits}f} {'point' if f'{abs(difference):.{digits}f}' == '1.0' else 'points'}"


def evidence(comparison: Comparison, *, unit: str) -> str:
    """What a claim rests on: "95 %: 0.4 to 2.1; p = 0.008; 8 seeds", or "the same on every seed; p = 1.00; 8 seeds"."""
    parts = []
    if comparison.alike:
        parts.append(ALIKE)
    elif comparison.interval is not None:
        digits = ".1f" if unit == "points" else ".3g"
        if unit == "points" and max(map(abs, comparison.interval)) < 0.1:
            digits = ".2f"
        low, high = (f"{value:{digits}}" for value in comparison.interval)
        parts.append(f"95\u00a0%: {_no_minus_zero(low)} to {_no_minus_zero(high)}")
    if comparison.p is not None:
        random = f" of {FLIPS:,} random flips" if len(comparison.seeds) > MOST_EXACT else ""
        parts.append(format_p(comparison.p) + random)
    count = len(comparison.seeds)
    return "; ".join([*parts, f"{count} seed" + ("" if count == 1 else "s")])


def _no_minus_zero(text: str) -> str:
    return text.removeprefix("-") if text.startswith("-") and not float(text) else text


def claim(comparison: Comparison, better: str, worse: str, *, unit: str, lower: bool = False) -> str:
    """A comparison in one sentence, without its full stop.

    Args:
        comparison: Of the better with the worse; its difference is not negative.
        better: What the better one is called.
        worse: What the other one is called.
        unit: "points" of a percentage, else what the metric is measured in, perhaps nothing.
        lower: A lower score is the better one; the difference is that of the scores turned round.
    """
    if not comparison.seeds:
        return f"{better} and {worse} have no seed in common that was scored"
    size = format_difference(comparison.difference, unit=unit)
    rests = evidence(comparison, unit=unit)
    if not comparison.enough:
        count = len(comparison.seeds)
        return (
            f"too few seeds to tell: {better} is {size} {'below' if lower else 'above'} {worse} on {count} seed"
            f"{'' if count == 1 else 's'}, and a claim needs {FEWEST_SEEDS}"
        )
    if not comparison.found:
        return f"no difference found between {better} and {worse} (difference {size}, {rests})"
    return f"{better} beats {worse} by {size}{' (lower is better)' if lower else ''} ({rests})"
