"""JSON as the standard has it: without NaN and Infinity, which Python's own writer leaves in."""

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite, at any depth; tuples become lists, as in JSON."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(content: Any, *, indent: int | None = 2) -> str:
    """Content as JSON, with null for numbers that are not finite: JSON has none."""
    return json.dumps(finite(content), indent=indent, allow_nan=False) + "\n"
