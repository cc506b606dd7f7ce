"""Comparisons: exact values, ties, few and many seeds, and sentences that say what they rest on."""

import itertools
import math

import numpy as np
import pytest

from tuning.statistics import (
    FLIPS,
    LEVEL,
    Comparison,
    bootstrap_interval,
    claim,
    compare,
    evidence,
    format_difference,
    format_p,
    holm,
    sign_flip_p,
)


def by_hand(differences: list[float]) -> float:
    """The share of all sign patterns whose sum is as far from 0."""
    seen = abs(math.fsum(differences))
    sums = [
        abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(total >= seen - 1e-9 for total in sums) / len(sums)


@pytest.mark.parametrize("count", [2, 5, 6, 8, 11])
def test_p_is_the_share_of_sign_patterns(count: int) -> None:
    rng = np.random.default_rng(count)
    for shift in (0.0, 0.5, 3.0):
        differences = [round(float(d), 1) for d in rng.normal(size=count) + shift]  # rounded: ties and zeros
        assert sign_flip_p(differences) == pytest.approx(by_hand(differences)), differences


@pytest.mark.parametrize("count", [2, 5, 6, 8, 16])
def test_smallest_p_is_that_of_equal_signs(count: int) -> None:
    assert sign_flip_p([1.0 + i for i in range(count)]) == 2 / 2**count
    assert sign_flip_p([-0.1] * count) == 2 / 2**count


def test_zero_differences_tell_nothing() -> None:
    assert sign_flip_p([0.0] * 8) == 1
    assert sign_flip_p([1.0] * 6 + [0.0] * 4) == sign_flip_p([1.0] * 6)
    assert sign_flip_p([1.0, -1.0, 2.0, -2.0]) == 1


def test_many_seeds_are_flipped_at_random_always_alike() -> None:
    differences = [float(d) for d in np.random.default_rng(1).normal(size=20) + 0.3]
    p = sign_flip_p(differences)
    assert p == sign_flip_p(differences)
    assert (p * (FLIPS + 1) / 2) == pytest.approx(round(p * (FLIPS + 1) / 2))  # a share of random flips, both tails
    wide = np.random.default_rng(2).choice((-1, 1), size=(200_000, 20)) @ np.array(differences) / 20
    assert p == pytest.approx((np.abs(wide) >= abs(np.mean(differences))).mean(), abs=0.005)
    assert sign_flip_p([1.0] * 40) == pytest.approx(2 / (FLIPS + 1))


def test_p_is_uniform_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(0)
    ps = np.array([sign_flip_p(list(rng.standard_t(2, size=8))) for _ in range(300)])
    assert 0.01 <= (ps < 0.05).mean() <= 0.09
    assert 0.4 <= (ps < 0.5).mean() <= 0.6


def test_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(list(rng.normal(loc=1.0, size=8))) for _ in range(200)]
    assert 0.91 <= np.mean([low <= 1.0 <= high for low, high in intervals]) <= 0.98  # plain percentile: 0.88


def test_interval_of_few_or_equal_differences() -> None:
    assert bootstrap_interval([0.3, 0.3, 0.3]) == (0.3, 0.3)
    low, high = bootstrap_interval([0.0, 1.0])
    assert (low, high) == (0.0, 1.0)
    assert bootstrap_interval([0.1, 0.5, 0.2, 0.9]) == bootstrap_interval([0.1, 0.5, 0.2, 0.9])


def test_only_seeds_of_both_are_compared() -> None:
    found = compare({1: 90.0, 2: 91.0, 3: 95.0, 4: math.nan}, {2: 90.0, 3: 93.0, 4: 80.0, 5: 1.0})
    assert found.seeds == (2, 3)
    assert found.difference == 1.5
    assert not found.enough and not found.found
    alone = compare({1: 90.0}, {1: 89.0})
    assert (alone.difference, alone.interval, alone.p) == (1.0, None, None)
    nothing = compare({1: 90.0}, {2: 89.0})
    assert math.isnan(nothing.difference) and nothing.seeds == ()


def test_order_of_seeds_changes_nothing() -> None:
    first = {seed: 90.0 + seed % 3 for seed in range(8)}
    second = {seed: 89.5 + seed % 2 for seed in range(8)}
    assert compare(first, second) == compare(dict(reversed(first.items())), dict(reversed(second.items())))


def test_holm_corrects_in_order() -> None:
    assert holm([0.01, 0.04]) == [0.02, 0.04]
    assert holm([0.04, 0.03]) == [0.06, 0.06]
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


def made(difference: float, interval: tuple[float, float] | None, p: float | None, seeds: int) -> Comparison:
    return Comparison(tuple(range(1000, 1000 + seeds)), difference, interval, p)


@pytest.mark.parametrize(
    "found, sentence",
    [
        (made(1.3, (0.4, 2.1), 0.0078125, 8), "A beats B by 1.3 points (95 %: 0.4 to 2.1; p = 0.008; 8 seeds)"),
        (
            made(0.2, (-0.5, 0.9), 0.546875, 8),
            "no difference found between A and B (difference 0.2 points, 95 %: -0.5 to 0.9; p = 0.55; 8 seeds)",
        ),
        (
            made(5.0, (4.0, 6.0), 0.0625, 5),
            "too few seeds to tell: A is 5.0 points above B on 5 seeds, and a claim needs 6",
        ),
        (made(1.0, None, None, 1), "too few seeds to tell: A is 1.0 point above B on 1 seed, and a claim needs 6"),
        (
            made(0.04, (0.01, 0.07), 0.03125, 6),
            "A beats B by 0.04 points (95 %: 0.01 to 0.07; p = 0.031; 6 seeds)",
        ),
        (
            made(0.0, (-0.04, 0.3), 1.0, 8),
            "no difference found between A and B (difference 0.0 points, 95 %: 0.0 to 0.3; p = 1.00; 8 seeds)",
        ),
        (
            made(2.0, (1.0, 3.0), 0.00002, 20),
            "A beats B by 2.0 points (95 %: 1.0 to 3.0; p < 0.001 of 100,000 random flips; 20 seeds)",
        ),
        (
            made(0.0, (0.0, 0.0), 1.0, 8),
            "no difference found between A and B (difference 0.0 points, the same on every seed; p = 1.00; 8 seeds)",
        ),
        (
            compare({s: 90.3 + s / 10 for s in range(6)}, {s: 90.1 + s / 10 for s in range(6)}),
            "A beats B by 0.2 points (the same on every seed; p = 0.031; 6 seeds)",
        ),
        (made(math.nan, None, None, 0), "A and B have no seed in common that was scored"),
    ],
)
def test_claims(found: Comparison, sentence: str) -> None:
    assert claim(found, "A", "B", unit="points").replace("\u00a0", " ") == sentence


def test_claim_of_a_metric_that_is_better_lower() -> None:
    found = made(0.0123, (0.004, 0.021), 0.0078125, 8)
    told = claim(found, "A", "B", unit="NLL", lower=True).replace("\u00a0", " ")
    assert told == "A beats B by 0.0123 NLL (lower is better) (95 %: 0.004 to 0.021; p = 0.008; 8 seeds)"
    assert "A is 0.0123 NLL below B on 2 seeds" in claim(made(0.0123, (0, 1), 0.5, 2), "A", "B", unit="NLL", lower=True)


def test_no_rounding_crosses_the_level() -> None:
    assert format_p(0.0469) == "p = 0.047" and format_p(0.0547) == "p = 0.055"
    assert format_p(102 / 2**11) == "p < 0.05" and format_p(104 / 2**11) == "p = 0.051"
    for seeds in range(6, 17):
        for count in range(2, 2**seeds // 10, 2):  # every p that so many seeds can have
            p = count / 2**seeds
            words = format_p(p)
            assert (words.startswith("p <") or float(words.removeprefix("p = ")) < LEVEL) == (p < LEVEL)
    assert format_difference(0.951, unit="points") == "1.0 point"
    assert evidence(made(1.0, None, None, 1), unit="points") == "1 seed"
