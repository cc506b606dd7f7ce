"""Sections: strict, finite, no unknown key."""

import pytest
from pydantic import ValidationError

from training.section import Fraction, Section


class Part(Section):
    share: Fraction = 0.5


def test_an_integer_stands_for_a_number() -> None:
    assert Part(share=1).share == 1.0


@pytest.mark.parametrize("given", [{"share": "0.5"}, {"share": 1.5}, {"share": float("nan")}, {"other": 1}])
def test_what_is_refused(given: dict) -> None:
    with pytest.raises(ValidationError):
        Part(**given)
