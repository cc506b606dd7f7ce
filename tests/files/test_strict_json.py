"""JSON without NaN and Infinity."""

import json

import pytest

from files.strict_json import finite, json_text


@pytest.mark.parametrize("indent", [2, None])
def test_json_has_no_numbers_that_are_none(indent: int | None) -> None:
    told = json_text({"nll": float("nan"), "rows": [(float("inf"), 1.5, 2, "x", None)]}, indent=indent)
    assert json.loads(told, parse_constant=pytest.fail) == {"nll": None, "rows": [[None, 1.5, 2, "x", None]]}
    assert told.endswith("}\n") and (indent is None) == (told.count("\n") == 1)


def test_what_is_finite_stays() -> None:
    content = {"a": [1, 2.5, True, "NaN", None], "b": {"c": 0.0}}
    assert finite(content) == content
