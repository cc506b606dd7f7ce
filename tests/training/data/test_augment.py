"""The section `augment`; what each policy does on images is in test_transforms.py."""

import pytest
from pydantic import ValidationError

from training.data.augment import AugmentSection, policy_problem


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-w4", "v0", "rand-tweights-n3"])
def test_a_policy_that_runs(policy: str) -> None:
    assert policy_problem(policy) is None and AugmentSection(auto_augment=policy).auto_augment == policy


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("rand-m101", "'m' must be from 0 to 100, got 101"),
        ("rand-m9-m8", "'m' is given twice"),
        ("augmx", "unknown policy 'augmx'; did you mean 'augmix'?"),
    ],
)
def test_a_policy_that_is_refused(policy: str, problem: str) -> None:
    assert policy_problem(policy) == problem
    with pytest.raises(ValidationError):
        AugmentSection(auto_augment=policy)


@pytest.mark.parametrize("crop", [[0.5, 0.4], [0.0, 1.0], [0.5, 1.5]])
def test_a_crop_that_is_none(crop: list[float]) -> None:
    with pytest.raises(ValidationError, match="0 < smallest <= largest"):
        AugmentSection(crop_scale=crop)
