"""Sections: strict, finite, no unknown key."""

import pytest
from pydantic import ValidationError

from training.section import Fraction, Section


class Part(Section):
    share: Fraction = 0.5
    count: int = 1
    pairs: list[list[int]] | None = None


def test_an_integer_stands_for_a_number() -> None:
    assert Part(share=1).share == 1.0


@pytest.mark.parametrize("given", [{"share": "0.5"}, {"share": 1.5}, {"share": float("nan")}, {"other": 1}])
def test_what_is_refused(given: dict) -> None:
    with pytest.raises(ValidationError):
        Part(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"count": 2**32}, "must be at most 4294967295, got 4294967296"),
        ({"count": -(10**400)}, "must be at least -4294967295"),
        ({"pairs": [[0, 1], [1, 10**30]]}, "must be at most 4294967295"),
    ],
)
def test_an_integer_that_would_overflow_is_refused(given: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Part(**given)
    assert Part(count=2**32 - 1, pairs=[[0, -5]]).count == 2**32 - 1
