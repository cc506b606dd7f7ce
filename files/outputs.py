"""Where a command may write: not where it cannot, nor where something lies that it was given."""

import os
from collections.abc import Iterable
from pathlib import Path

from files.errors import ConfigError

Kept = tuple[str | os.PathLike[str], str]
"""A file that stays as it is, and what it is, as a message goes on: "is one of the images"."""


def refuse_overwriting(told: str, path: Path, kept: Iterable[Kept]) -> None:
    """Refuses to write where one of these files lies, by whatever name: through a link, by a hard link too.

    Args:
        told: The option and the path, as the message begins.
        path: What is to be written.
        kept: What must stay; what is not there cannot be written over.

    Raises:
        ConfigError: Naming the path.
    """
    if not os.path.exists(path):
        return
    there = os.stat(path)
    for file, what in kept:
        try:
            other = os.stat(file)
        except (OSError, ValueError):  # told of when it is read
            continue
        if os.path.samestat(there, other):
            raise ConfigError(f"{told}: {what}; name another place")


def may_write(folder: Path) -> bool:
    """Whether files can be made in a folder, as far as its permissions tell."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def is_same(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two names are of one file, there or not."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)
