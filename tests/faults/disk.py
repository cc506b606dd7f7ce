"""A disk that fails: ends the process, or raises, at the k-th write, fsync or rename since it was installed.

`install` is called in the process under test, by a hook.
"""

import io
import os
from collections.abc import Callable
from typing import Any

from files import durable

count = 0


def install(at: int, act: Callable[[], Any]) -> None:
    """Counts the operations from here on and acts before number `at`, counted from 1; 0: only counts."""

    def operation() -> None:
        global count
        count += 1
        if count == at:
            act()

    class File(io.FileIO):
        def write(self, data: Any, /) -> int:
            operation()
            return super().write(data) or 0

    def opened(path: Any, mode: str = "r", **options: Any) -> Any:
        return io.BufferedWriter(File(path, mode), buffer_size=4096) if mode == "xb" else open(path, mode, **options)

    durable.open = opened  # type: ignore[attr-defined]
    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name), operation))


def counted(real: Callable[..., Any], operation: Callable[[], None]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        operation()
        return real(*arguments, **options)

    return call
