"""DropPathSchedule: every kind against values written out here, its ends, and what is refused."""

import math
import pickle
from typing import Any

import numpy as np
import pytest

from layers.schedule import KINDS, DropPathSchedule

EXAMPLES = {
    "constant": DropPathSchedule(),
    "ramp": DropPathSchedule(kind="ramp", cutoff=10),
    "early": DropPathSchedule(kind="early", cutoff=10),
    "late": DropPathSchedule(kind="late", cutoff=10),
    "cosine": DropPathSchedule(kind="cosine", cutoff=10),
    "piecewise": DropPathSchedule(kind="piecewise", points=[(0, 0.0), (10, 1.0)]),
}


def over(schedule: DropPathSchedule, steps: int) -> list[float]:
    return [schedule(step) for step in range(steps)]


# ---- values ---------------------------------------------------------------------------------------------------------


def test_constant() -> None:
    assert over(DropPathSchedule(), 5) == [1.0] * 5


@pytest.mark.parametrize("cutoff", [1, 2, 7, 100])
def test_early_linear_is_a_linspace_then_nothing(cutoff: int) -> None:
    # the loop of Liu et al. 2023: linspace(rate, 0, early iterations), then zeros
    expected = np.concatenate([np.linspace(1, 0, cutoff), np.zeros(20)])
    got = over(DropPathSchedule(kind="early", cutoff=cutoff), cutoff + 20)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_early_linear_by_hand() -> None:
    got = over(DropPathSchedule(kind="early", cutoff=5, shape="linear"), 7)
    assert got == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("cutoff", [1, 2, 7])
def test_early_constant(cutoff: int) -> None:
    got = over(DropPathSchedule(kind="early", cutoff=cutoff, shape="constant"), cutoff + 3)
    np.testing.assert_array_equal(got, np.concatenate([np.ones(cutoff), np.zeros(3)]))


@pytest.mark.parametrize("cutoff", [1, 2, 7])
def test_late(cutoff: int) -> None:
    got = over(DropPathSchedule(kind="late", cutoff=cutoff), cutoff + 3)
    np.testing.assert_array_equal(got, np.concatenate([np.zeros(cutoff), np.ones(3)]))


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (0.2, 0.7), (0.5, 0.5)])
def test_ramp_is_a_linspace_then_its_end(start: float, end: float) -> None:
    got = over(DropPathSchedule(kind="ramp", cutoff=9, start=start, end=end), 14)
    np.testing.assert_allclose(got, np.concatenate([np.linspace(start, end, 9), np.full(5, end)]), atol=1e-12)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (0.2, 0.7)])
def test_cosine_is_half_a_cosine_then_its_end(start: float, end: float) -> None:
    got = over(DropPathSchedule(kind="cosine", cutoff=9, start=start, end=end), 14)
    wave = start + (end - start) * (1 - np.cos(np.linspace(0, np.pi, 9))) / 2
    np.testing.assert_allclose(got, np.concatenate([wave, np.full(5, end)]), atol=1e-12)
    assert got[4] == pytest.approx((start + end) / 2)


@pytest.mark.parametrize("kind", ["ramp", "cosine"])
def test_a_cutoff_of_one_step_starts_and_then_has_ended(kind: Any) -> None:
    assert over(DropPathSchedule(kind=kind, cutoff=1, start=0.25, end=0.75), 3) == [0.25, 0.75, 0.75]


def test_piecewise_by_hand() -> None:
    schedule = DropPathSchedule(kind="piecewise", points=[(0, 0.0), (4, 1.0), (6, 0.5)])
    assert over(schedule, 9) == [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.5, 0.5]


def test_piecewise_equals_interpolation() -> None:
    points = [(0, 0.3), (3, 0.9), (10, 0.1), (11, 1.0)]
    got = over(DropPathSchedule(kind="piecewise", points=points), 20)
    np.testing.assert_allclose(got, np.interp(range(20), [s for s, _ in points], [m for _, m in points]), atol=1e-12)


def test_piecewise_with_one_point_is_constant() -> None:
    assert over(DropPathSchedule(kind="piecewise", points=[(0, 0.4)]), 3) == [0.4] * 3


# ---- what holds for every kind --------------------------------------------------------------------------------------


def test_every_kind_has_an_example() -> None:
    assert set(EXAMPLES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pure_function_of_the_step_in_the_unit_interval(kind: str) -> None:
    schedule = EXAMPLES[kind]
    forth = over(schedule, 30)
    back = [schedule(step) for step in reversed(range(30))][::-1]
    assert forth == back == over(pickle.loads(pickle.dumps(schedule)), 30)
    assert all(type(m) is float and 0.0 <= m <= 1.0 for m in forth)
    assert schedule(10**9) == forth[-1]


@pytest.mark.parametrize("start", np.linspace(0, 1, 11))
@pytest.mark.parametrize("kind", ["ramp", "cosine"])
def test_rounding_never_leaves_the_unit_interval(kind: Any, start: float) -> None:
    for end in np.linspace(0, 1, 11):
        values = over(DropPathSchedule(kind=kind, cutoff=37, start=float(start), end=float(end)), 40)
        assert min(values) >= 0.0 and max(values) <= 1.0


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_unknown_kind_and_shape() -> None:
    with pytest.raises(ValueError, match=r"schedule kind must be one of constant, ramp, .*piecewise, got 'linear'"):
        DropPathSchedule(kind="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule shape must be linear or constant, got 'cosine'"):
        DropPathSchedule(kind="early", cutoff=3, shape="cosine")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ramp", "cosine", "early", "late"])
@pytest.mark.parametrize("cutoff", [None, 0, -3])
def test_a_missing_or_empty_cutoff(kind: Any, cutoff: int | None) -> None:
    with pytest.raises(ValueError, match=f"schedule '{kind}' needs a cutoff of at least 1 step, got {cutoff}"):
        DropPathSchedule(kind=kind, cutoff=cutoff)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_multipliers_outside_the_unit_interval(value: float) -> None:
    message = r"schedule multipliers must be in \[0, 1\]"
    with pytest.raises(ValueError, match=message):
        DropPathSchedule(kind="ramp", cutoff=3, start=value)
    with pytest.raises(ValueError, match=message):
        DropPathSchedule(kind="cosine", cutoff=3, end=value)
    with pytest.raises(ValueError, match=message):
        DropPathSchedule(kind="piecewise", points=[(0, 1.0), (3, value)])


@pytest.mark.parametrize("steps", [[], [1, 2], [0, 2, 2], [0, 3, 1]])
def test_points_that_do_not_rise_from_zero(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="schedule 'piecewise' needs points at rising steps from 0, got steps"):
        DropPathSchedule(kind="piecewise", points=[(s, 0.5) for s in steps])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "erly"}, r"schedule kind must be one of .*, got 'erly'; did you mean 'early'\?"),
        ({"kind": ["ramp"]}, r"schedule kind must be one of .*, got \['ramp'\]"),
        ({"kind": "early", "cutoff": 3, "shape": "liner"}, "got 'liner'; did you mean 'linear'"),
        ({"kind": "late", "cutoff": "5"}, "needs a cutoff of at least 1 step, got '5'"),
        ({"kind": "late", "cutoff": [5]}, r"needs a cutoff of at least 1 step, got \[5\]"),
        ({"kind": "late", "cutoff": True}, "needs a cutoff of at least 1 step, got True"),
        ({"kind": "late", "cutoff": math.nan}, "needs a cutoff of at least 1 step, got nan"),
        ({"kind": "ramp", "cutoff": 5, "start": "0"}, r"multipliers must be in \[0, 1\], got \['0', 1.0\]"),
        ({"kind": "ramp", "cutoff": 5, "end": None}, r"multipliers must be in \[0, 1\], got \[0.0, None\]"),
        ({"kind": "ramp", "cutoff": 5, "end": True}, r"multipliers must be in \[0, 1\], got \[0.0, True\]"),
        ({"kind": "piecewise", "points": [(0, "1")]}, r"multipliers must be in \[0, 1\]"),
        ({"kind": "piecewise", "points": None}, "points must be pairs of a step and a multiplier, got None"),
        ({"kind": "piecewise", "points": 3}, "points must be pairs of a step and a multiplier, got 3"),
        ({"kind": "piecewise", "points": "ab"}, "points must be pairs of a step and a multiplier, got 'ab'"),
        ({"kind": "piecewise", "points": [0, 1]}, "points must be pairs of a step and a multiplier"),
        ({"kind": "piecewise", "points": [(0, 1, 2)]}, "points must be pairs of a step and a multiplier"),
        ({"kind": "piecewise", "points": [("0", 1)]}, "points must be pairs of a step and a multiplier"),
    ],
)
def test_what_is_no_number_is_refused_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DropPathSchedule(**settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["3", None, [1], -1, True, math.nan])
def test_what_is_no_step_is_refused(kind: str, step: Any) -> None:
    with pytest.raises(ValueError, match="schedule: a step must be a number of at least 0, got"):
        EXAMPLES[kind](step)
    assert EXAMPLES[kind](np.int64(3)) == EXAMPLES[kind](3)  # type: ignore[arg-type]
