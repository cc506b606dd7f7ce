"""Old address of `stochastic_depth`, whose names it hands on, so that code written for it goes on working."""

import importlib
import warnings
from typing import Any

PLACES = ("", ".blocks", ".compute", ".report", ".setting")


def __getattr__(name: str) -> Any:
    if not name.startswith("__"):
        for place in (f"stochastic_depth{part}" for part in PLACES):
            module = importlib.import_module(place)
            if hasattr(module, name):
                warnings.warn(
                    f"layers.stochastic_depth has moved: from {place} import {name}", DeprecationWarning, stacklevel=2
                )
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
