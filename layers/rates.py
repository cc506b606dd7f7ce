"""Drop-path rates over depth: a rate and a profile -> one rate per residual block.

Linear rise from the first to the last block is timm's and PoolFormer's rule; equation 4 of Huang et al. 2016
(https://arxiv.org/abs/1603.09382) starts one step higher; `reversed` falls, as https://arxiv.org/abs/2605.21648 found
best for dropout. `rate_is` says what the given rate means, so that profiles can be compared at equal strength. Unlike
timm's, a single block gets the full rate (timm: 0, so the rate is lost).
"""

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

ProfileName = Literal["linear", "linear_from_first", "constant", "stagewise", "cosine", "reversed"]
Profile = ProfileName | Sequence[float]
RateIs = Literal["max", "mean", "expected_macs"]
PROFILES: tuple[str, ...] = get_args(ProfileName)
RATE_IS: tuple[str, ...] = get_args(RateIs)


def as_number(value: Any) -> float | None:
    """The float that a number of Python, NumPy or torch stands for, also one in a 0-dim array or tensor; else `None`."""
    if getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False):
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def check_drop_prob(drop_prob: float | None, name: str = "drop_prob") -> float:
    """Returns the probability as a float, `None` meaning 0; numbers of NumPy and torch are numbers.

    Raises:
        ValueError: It is not a number in [0, 1].
    """
    if drop_prob is None:
        return 0.0
    number = as_number(drop_prob)
    if number is None or not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1], got {drop_prob!r}")
    return number


def check_choice(value: Any, known: Sequence[str], name: str, more: str = "") -> None:
    """
    Args:
        value: What was given.
        known: What is allowed.
        name: What it is.
        more: What else is allowed, in words.

    Raises:
        ValueError: It is none of them; with the nearest to a mistyped word.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}{more}, got {value!r}{nearest(value, known)}")


def nearest(word: Any, known: Iterable[str]) -> str:
    """`'; did you mean X?'` for the known word closest to a mistyped one, or an empty string; as in files.errors, since
    this package imports torch only."""
    match = difflib.get_close_matches(word, [*known], n=1, cutoff=0.5) if isinstance(word, str) else []
    return f"; did you mean {match[0]!r}?" if match else ""


def drop_path_rates(
    rate: float | None,
    depths: Sequence[int],
    profile: Profile = "linear",
    rate_is: RateIs = "max",
    *,
    block_macs: Sequence[float] | None = None,
    total_macs: float | None = None,
) -> list[float]:
    """One drop-path rate per block, in order.

    Args:
        rate: In [0, 1], of Python, NumPy or torch; what it measures is `rate_is`. With a list as profile it may be `None`.
        depths: Blocks per stage.
        profile: `linear` (rate * i / (L - 1)), `linear_from_first` (rate * l / L with l from 1, Huang et al. 2016,
            equation 4), `constant`, `stagewise` (one rate per stage, rising linearly from 0), `cosine` (half a cosine
            from 0 to rate), `reversed` (rate * (1 - i / (L - 1)), which falls), or L rates: a list, or an array or
            tensor with one dimension.
        rate_is: `max` (the largest rate), `mean` (over blocks), or `expected_macs` (the share of the model's training
            compute that is dropped in expectation).
        block_macs: Compute of each block's branches, needed by `expected_macs`; any unit.
        total_macs: Compute of the whole model in the same unit; default the sum of block_macs.

    Returns:
        L = sum(depths) floats in [0, 1].

    Raises:
        ValueError: A rate, depth, profile or length that cannot be met, with the reason.
    """
    depths = _check_depths(depths)
    count = sum(depths)
    rate, profile = check_request(rate, profile, rate_is)
    weights, total = _weights(rate_is, count, block_macs, total_macs)

    if not isinstance(profile, str):
        rates = list(profile)
        if len(rates) != count:
            raise ValueError(f"the list of drop-path rates has {len(rates)} entries, the model {count} blocks")
        reached = _strength(rates, rate_is, weights, total)
        if rate is not None and not math.isclose(rate, reached, abs_tol=1e-6):
            raise ValueError(
                f"rate {rate:.6g} contradicts the list of rates, whose {rate_is} is {reached:.6g}; leave one of them out"
            )
        return rates

    assert rate is not None
    shape = _shape(profile, depths)
    reached_at_1 = _strength(shape, rate_is, weights, total)
    if rate > reached_at_1 * (1 + 1e-12):
        raise ValueError(
            f"profile {profile!r} cannot reach {rate_is} {rate:g}: even with its largest rate at 1 "
            f"it is {reached_at_1:.6g}"
        )
    peak = min(1.0, rate / reached_at_1) if rate else 0.0
    return [peak * s for s in shape]


def check_request(rate: float | None, profile: Profile, rate_is: str) -> tuple[float | None, Profile]:
    """What can be said of a rate, a profile and a meaning without knowing the model: both as plain floats.

    Raises:
        ValueError: One of them cannot be met by any model, with the reason.
    """
    check_choice(rate_is, RATE_IS, "rate_is")
    if not isinstance(profile, str):
        values = as_list(profile)
        if values is None:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)} or a list of rates, got {profile!r}")
        rates = [check_drop_prob(r, f"drop-path rate {i} of the list") for i, r in enumerate(values)]
        return None if rate is None else check_drop_prob(rate, "rate"), rates
    check_choice(profile, PROFILES, "profile", " or a list of rates")
    if as_number(rate) is None:
        raise ValueError(f"rate must be a number in [0, 1], got {rate!r}; a list of rates is given as the profile")
    return check_drop_prob(rate, "rate"), profile


def as_list(values: Any) -> list[Any] | None:
    """The entries of a list, a tuple, or an array or tensor with one dimension; else `None`."""
    if getattr(values, "ndim", None) == 1:
        return values.tolist()
    return list(values) if isinstance(values, Sequence) and not isinstance(values, (str, bytes)) else None


def _check_depths(depths: Sequence[int]) -> list[int]:
    counts = as_list(depths)
    if not counts or any(isinstance(d, bool) or not isinstance(d, numbers.Integral) or d < 1 for d in counts):
        raise ValueError(f"depths must be a list of block counts of at least 1, got {depths!r}")
    return [int(d) for d in counts]


def _shape(profile: str, depths: list[int]) -> list[float]:
    """Rates of a profile whose largest rate is 1; one block (or stage) alone is the last one and gets 1."""
    count = sum(depths)
    last = max(count - 1, 1)
    position = [i / last for i in range(count)] if count > 1 else [1.0]
    if profile == "linear":
        return position
    if profile == "reversed":
        return position[::-1]
    if profile == "linear_from_first":
        return [(i + 1) / count for i in range(count)]
    if profile == "constant":
        return [1.0] * count
    if profile == "stagewise":
        stages = len(depths)
        per_stage = [s / (stages - 1) for s in range(stages)] if stages > 1 else [1.0]
        return [per_stage[s] for s, depth in enumerate(depths) for _ in range(depth)]
    assert profile == "cosine"
    return [(1.0 - math.cos(math.pi * p)) / 2.0 for p in position]


def _weights(
    rate_is: str, count: int, block_macs: Sequence[float] | None, total_macs: float | None
) -> tuple[list[float], float]:
    if rate_is != "expected_macs":
        return [1.0] * count, float(count)
    if block_macs is None:
        raise ValueError("rate_is 'expected_macs' needs the compute of each block (block_macs)")
    weights = [as_number(m) for m in as_list(block_macs) or ()]
    known = [m for m in weights if m is not None and 0 <= m < math.inf]
    if len(known) != len(weights) or len(known) != count or not sum(known) > 0:
        raise ValueError(f"block_macs must hold {count} numbers >= 0, not all 0, got {block_macs!r}")
    total = sum(known) if total_macs is None else as_number(total_macs)
    if total is None or not total < math.inf:
        raise ValueError(f"total_macs must be a number, got {total_macs!r}")
    if total < sum(known) * (1 - 1e-9):
        raise ValueError(f"total_macs {total:g} is less than the blocks' own {sum(known):g}")
    return known, total


def _strength(rates: Sequence[float], rate_is: str, weights: list[float], total: float) -> float:
    if rate_is == "max":
        return max(rates)
    return sum(r * w for r, w in zip(rates, weights, strict=True)) / total
