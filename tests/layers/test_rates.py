"""drop_path_rates: hand-computed values, what a rate measures, and what is refused."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.drop import calculate_drop_path_rates

from layers.rates import PROFILES, RATE_IS, drop_path_rates

# Depths [1, 1, 2] with a largest rate of 0.3. cos(pi/3) = 1/2, hence the quarters of cosine.
BY_HAND = {
    "linear": [0.0, 0.1, 0.2, 0.3],
    "linear_from_first": [0.075, 0.15, 0.225, 0.3],
    "constant": [0.3, 0.3, 0.3, 0.3],
    "stagewise": [0.0, 0.15, 0.3, 0.3],
    "cosine": [0.0, 0.075, 0.225, 0.3],
    "reversed": [0.3, 0.2, 0.1, 0.0],
}
MEAN_AT_1 = {
    "linear": 0.5, "linear_from_first": 0.625, "constant": 1.0, "stagewise": 0.625, "cosine": 0.5, "reversed": 0.5
}  # fmt: skip


# ---- profiles -------------------------------------------------------------------------------------------------------


def test_every_profile_has_values_by_hand() -> None:
    assert set(BY_HAND) == set(PROFILES) == set(MEAN_AT_1)


@pytest.mark.parametrize("profile", PROFILES)
def test_hand_computed_values(profile: Any) -> None:
    rates = drop_path_rates(0.3, [1, 1, 2], profile)
    assert rates == pytest.approx(BY_HAND[profile], abs=1e-12)
    assert all(type(r) is float for r in rates)


@pytest.mark.parametrize("depths", [[2, 2, 6, 2], [6, 6, 18, 6], [1, 1], [7]])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 1.0])
def test_linear_is_what_timm_does(depths: list[int], rate: float) -> None:
    ours = drop_path_rates(rate, depths)
    timms = calculate_drop_path_rates(rate, depths)
    assert ours == pytest.approx(timms, abs=1e-6)  # timm's come from float32
    assert ours == pytest.approx(torch.linspace(0, rate, sum(depths), dtype=torch.float64).tolist(), abs=1e-12)


@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
def test_linear_from_first_is_equation_4(rate: float) -> None:
    # Huang et al. 2016: survival p_l = 1 - l / L * (1 - p_L), l from 1 to L
    survival = [1 - block / 12 * (1 - (1 - rate)) for block in range(1, 13)]
    assert drop_path_rates(rate, [2, 2, 6, 2], "linear_from_first") == pytest.approx(
        [1 - p for p in survival], abs=1e-12
    )


def test_stagewise_has_one_rate_per_stage() -> None:
    # timm's stagewise=True is a linear rise over blocks, only grouped by stage
    rates = drop_path_rates(0.3, [2, 1, 3, 2], "stagewise")
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3], abs=1e-12)
    assert drop_path_rates(0.3, [3], "stagewise") == [0.3, 0.3, 0.3]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("rate_is", RATE_IS)
def test_one_block_gets_the_rate(profile: Any, rate_is: Any) -> None:
    assert drop_path_rates(0.3, [1], profile, rate_is, block_macs=[2.0]) == pytest.approx([0.3], abs=1e-12)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("rate_is", RATE_IS)
def test_rate_zero(profile: Any, rate_is: Any) -> None:
    assert drop_path_rates(0, [1, 2, 1], profile, rate_is, block_macs=[1.0] * 4) == [0.0] * 4


# ---- what the rate measures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_max_and_mean_are_exact(profile: Any, rate: float) -> None:
    depths = [2, 2, 6, 2]
    assert max(drop_path_rates(rate, depths, profile, "max")) == pytest.approx(rate, abs=1e-12)
    rates = drop_path_rates(rate, depths, profile, "mean")
    assert sum(rates) / len(rates) == pytest.approx(rate, abs=1e-6)
    assert max(rates) <= 1.0


def test_mean_by_hand() -> None:
    # a linear rise has half its largest rate as its mean
    assert drop_path_rates(0.15, [1, 1, 2], "linear", "mean") == pytest.approx(BY_HAND["linear"], abs=1e-12)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("total", [None, 40.0])
def test_expected_macs_is_exact(profile: Any, total: float | None) -> None:
    block_macs = [5.0, 1.0, 7.0, 3.0, 2.0]
    rates = drop_path_rates(0.15, [2, 2, 1], profile, "expected_macs", block_macs=block_macs, total_macs=total)
    dropped = sum(r * m for r, m in zip(rates, block_macs, strict=True))
    assert dropped / (total or sum(block_macs)) == pytest.approx(0.15, abs=1e-6)


def test_expected_macs_by_hand() -> None:
    # with its largest rate at 1, linear drops (0 * 1 + 2 * 1/3 + 3 * 2/3 + 4 * 1) / 20 = 1/3 of this model
    rates = drop_path_rates(0.1, [1, 1, 2], "linear", "expected_macs", block_macs=[1.0, 2.0, 3.0, 4.0], total_macs=20.0)
    assert rates == pytest.approx(BY_HAND["linear"], abs=1e-12)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_mean_that_cannot_be_reached(profile: Any) -> None:
    depths, limit = [1, 1, 2], MEAN_AT_1[profile]
    assert max(drop_path_rates(limit, depths, profile, "mean")) == pytest.approx(1.0, abs=1e-12)
    if limit == 1.0:
        return
    with pytest.raises(ValueError, match=f"profile '{profile}' cannot reach mean 0.7: .*at 1 it is {limit:g}"):
        drop_path_rates(0.7, depths, profile, "mean")
    with pytest.raises(ValueError, match="cannot reach mean"):
        drop_path_rates(limit + 1e-6, depths, profile, "mean")


def test_a_share_of_compute_that_cannot_be_reached() -> None:
    with pytest.raises(ValueError, match=r"profile 'constant' cannot reach expected_macs 0.6: .*it is 0.5"):
        drop_path_rates(0.6, [2], "constant", "expected_macs", block_macs=[1.0, 1.0], total_macs=4.0)
    # all compute in the first stage, whose rate is always 0
    with pytest.raises(ValueError, match=r"profile 'stagewise' cannot reach expected_macs 0.1: .*it is 0"):
        drop_path_rates(0.1, [1, 1], "stagewise", "expected_macs", block_macs=[1.0, 0.0])


# ---- lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_type", [list, tuple])
def test_a_list_is_taken_as_it_is(as_type: Any) -> None:
    assert drop_path_rates(None, [1, 2], as_type([0.3, 0, 1])) == [0.3, 0.0, 1.0]


AS_LIST: list[Callable[[list[float]], Any]] = [
    list,
    tuple,
    np.array,
    lambda r: np.array(r, np.float32),
    torch.tensor,
    lambda r: torch.tensor(r, dtype=torch.float64, requires_grad=True),
    lambda r: [np.float32(x) for x in r],
    lambda r: list(torch.tensor(r)),
]


@pytest.mark.parametrize("as_list", AS_LIST)
def test_lists_arrays_and_tensors_are_profiles(as_list: Callable[[list[float]], Any]) -> None:
    rates = drop_path_rates(None, [1, 2], as_list([0.25, 0.0, 1.0]))
    assert rates == [0.25, 0.0, 1.0] and all(type(r) is float for r in rates)
    assert drop_path_rates(np.float64(0.25), [1, 1], as_list([0.0, 0.25])) == [0.0, 0.25]
    with pytest.raises(ValueError, match="has 2 entries, the model 3 blocks"):
        drop_path_rates(None, [1, 2], as_list([0.1, 0.2]))
    with pytest.raises(ValueError, match="drop-path rate 1 of the list must be a number in"):
        drop_path_rates(None, [2], as_list([0.1, 1.5]))


@pytest.mark.parametrize("space", [np.linspace, torch.linspace])
def test_a_linspace_is_linear(space: Any) -> None:
    assert drop_path_rates(None, [2, 2, 6, 2], space(0, 0.3, 12)) == pytest.approx(drop_path_rates(0.3, [2, 2, 6, 2]))


def test_no_list_of_rates() -> None:
    for profile in (
        np.zeros((2, 2)),
        torch.zeros(2, 2),
        np.float32(0.1),
        torch.tensor(0.1),
        {0.1: 0.2},
        {0.1},
        None,
        0.1,
        b"ab",
    ):
        with pytest.raises(ValueError, match=r"profile must be one of linear, .* or a list of rates, got"):
            drop_path_rates(0.1, [2], profile)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rate_is", "rate"), [("max", 0.4), ("mean", 0.2), ("expected_macs", 0.225)])
def test_a_list_may_stand_beside_the_rate_it_has(rate_is: Any, rate: float) -> None:
    profile, macs = [0.1, 0.1, 0.4], [3.0, 2.0, 5.0]  # 0.3 + 0.2 + 2 = 2.5 dropped
    total = 2.5 / 0.225
    rates = drop_path_rates(rate, [1, 2], profile, rate_is, block_macs=macs, total_macs=total)
    assert rates == profile
    with pytest.raises(ValueError, match=f"rate 0.3 contradicts the list of rates, whose {rate_is} is {rate}; leave"):
        drop_path_rates(0.3, [1, 2], profile, rate_is, block_macs=macs, total_macs=total)


@pytest.mark.parametrize("length", [0, 2, 4])
def test_a_list_of_the_wrong_length(length: int) -> None:
    with pytest.raises(ValueError, match=f"has {length} entries, the model 3 blocks"):
        drop_path_rates(None, [1, 2], [0.1] * length)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, math.inf, "0.1", True])
def test_a_list_with_what_is_no_rate(value: Any) -> None:
    with pytest.raises(ValueError, match=r"drop-path rate 1 of the list must be a number in \[0, 1\], got"):
        drop_path_rates(None, [1, 2], [0.1, value, 0.1])


# ---- numbers --------------------------------------------------------------------------------------------------------

NUMBERS: list[Callable[[float], Any]] = [
    np.float16,
    np.float32,
    np.float64,
    np.array,
    torch.tensor,
    lambda r: torch.tensor(r, dtype=torch.bfloat16),
    lambda r: torch.tensor(r, requires_grad=True),
    lambda r: torch.linspace(0, r, 3)[-1],
    lambda r: np.linspace(0, r, 3)[-1],
    Fraction,
]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("profile", PROFILES)
def test_numbers_of_numpy_and_torch(profile: Any, number: Callable[[float], Any]) -> None:
    rates = drop_path_rates(number(0.5), [1, 1, 2], profile)
    assert rates == drop_path_rates(0.5, [1, 1, 2], profile) and all(type(r) is float for r in rates)


def test_whole_numbers() -> None:
    ones: list[Any] = [1, np.int64(1), torch.tensor(1), np.array(1)]
    for one in ones:
        assert drop_path_rates(one, [2], "constant") == [1.0, 1.0]
    for depths in (np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), np.int32(2)]):
        assert drop_path_rates(0.5, depths, "stagewise") == [0.0, 0.5, 0.5]  # type: ignore[arg-type]


# ---- bad input ------------------------------------------------------------------------------------------------------


NO_RATES = [-0.1, 1.0001, math.nan, math.inf, "0.1", None, True, np.bool_(True), torch.tensor(True), np.str_("0.1"), 0.1j,
            np.float32(-0.1), torch.tensor(math.nan), torch.tensor([0.1]), np.linspace(0, 0.1, 2),
            torch.empty((), device="meta")]  # fmt: skip


@pytest.mark.parametrize("rate", NO_RATES, ids=repr)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_rate_that_is_none(profile: Any, rate: Any) -> None:
    with pytest.raises(ValueError, match=r"rate must be a number in \[0, 1\], got"):
        drop_path_rates(rate, [1, 2], profile)


def test_a_list_as_rate_is_sent_to_the_profile() -> None:
    for rates in ([0.1, 0.2], np.linspace(0.1, 0.2, 2), torch.linspace(0.1, 0.2, 2)):
        with pytest.raises(ValueError, match="a list of rates is given as the profile"):
            drop_path_rates(rates, [2])  # type: ignore[arg-type]


@pytest.mark.parametrize("depths", [[], [2, 0], [-1], [1.0], [True, 1], ["2"]])
def test_depths_that_are_none(depths: Any) -> None:
    with pytest.raises(ValueError, match="depths must be a list of block counts of at least 1"):
        drop_path_rates(0.1, depths)


def test_unknown_profile_and_meaning() -> None:
    with pytest.raises(ValueError, match=r"profile must be one of linear, .*reversed or a list of rates, got 'linaer'"):
        drop_path_rates(0.1, [2], "linaer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rate_is must be one of max, mean, expected_macs, got 'median'"):
        drop_path_rates(0.1, [2], "linear", "median")  # type: ignore[arg-type]


def test_expected_macs_needs_the_compute() -> None:
    with pytest.raises(ValueError, match="needs the compute of each block"):
        drop_path_rates(0.1, [2], "linear", "expected_macs")


@pytest.mark.parametrize("block_macs", [[1.0], [1.0, 1.0, 1.0], [0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0]])
def test_compute_that_makes_no_sense(block_macs: list[float]) -> None:
    with pytest.raises(ValueError, match="block_macs must hold 2 numbers >= 0, not all 0"):
        drop_path_rates(0.1, [2], "linear", "expected_macs", block_macs=block_macs)


def test_a_model_with_less_compute_than_its_blocks() -> None:
    with pytest.raises(ValueError, match="total_macs 1 is less than the blocks' own 2"):
        drop_path_rates(0.1, [2], "linear", "expected_macs", block_macs=[1.0, 1.0], total_macs=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": "revrsed"}, "got 'revrsed'; did you mean 'reversed'"),
        ({"rate_is": "men"}, "got 'men'; did you mean 'mean'"),
        ({"rate_is": ["max"]}, r"rate_is must be one of max, mean, expected_macs, got \['max'\]$"),
        ({"block_macs": "ab"}, "block_macs must hold 2 numbers >= 0, not all 0, got 'ab'"),
        ({"block_macs": 3}, "block_macs must hold 2 numbers >= 0, not all 0, got 3"),
        ({"block_macs": ["1", "2"]}, "block_macs must hold 2 numbers >= 0"),
        ({"block_macs": [True, 2]}, "block_macs must hold 2 numbers >= 0"),
        ({"block_macs": [1, math.inf]}, "block_macs must hold 2 numbers >= 0"),
        ({"block_macs": [1, 2], "total_macs": "3"}, "total_macs must be a number, got '3'"),
        ({"block_macs": [1, 2], "total_macs": math.nan}, "total_macs must be a number, got nan"),
    ],
)
def test_words_and_compute_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drop_path_rates(0.2, [2], **{"rate_is": "expected_macs", **settings})
