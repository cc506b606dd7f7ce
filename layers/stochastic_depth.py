"""Old address of `stochastic_depth`, whose names it hands on, so that code written for it goes on working."""

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if not name.startswith("__"):
        for place in ("setting", "report", "blocks", "compute"):
            module = importlib.import_module(f"stochastic_depth.{place}")
            if hasattr(module, name):
                warnings.warn(
                    f"layers.stochastic_depth has moved: from stochastic_depth import {name}",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
