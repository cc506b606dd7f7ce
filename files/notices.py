"""The project's own warnings in a command: a line as its other notices are, not Python's with a path and a line of code.

Of several processes of one run, which all warn of the same, the main one alone says it.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def own_notices(say: Callable[[str], object]) -> Iterator[None]:
    """Hands the words of what the project's code warns of to `say`; what others warn of is shown as ever.

    For commands, whose user reads the words alone. Whoever imports the packages gets Python's warnings, to filter and catch.
    Of torchrun's processes the main one says them. What another may have to say alone, the warning's category says by an
    attribute `concerns`: "machine" is said by one process of each machine, "process" by every one.
    """
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if _is_own(sys._getframe(1)):
            if _speaks(getattr(category, "concerns", "run")):
                say(str(message))
        else:
            others(message, category, filename, lineno, *rest)

    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = others


def is_main_process() -> bool:
    """Whether this process is the main one of those that torchrun started, or stands alone, as the environment says."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _speaks(concerns: str) -> bool:
    """Whether this process says what concerns the whole "run", its "machine", or the "process" itself."""
    first_here = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0"
    return concerns == "process" or is_main_process() or (concerns == "machine" and first_here)


def _is_own(frame: FrameType | None) -> bool:
    """Whether the code that called `warnings.warn` is the project's.

    The file that Python names is that of a caller, by `stacklevel`, and so perhaps another's.
    """
    while frame is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
        frame = frame.f_back
    # what torch warns of in C++ has the frame of whoever called torch, which calls no `warn`
    if frame is None or "warn" not in frame.f_code.co_names:
        return False
    file = Path(frame.f_code.co_filename)
    return file.is_relative_to(ROOT) and "site-packages" not in file.parts
