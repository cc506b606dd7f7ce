"""Files that survive a kill at any operation: written beside their place, synced, renamed."""

import contextlib
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from files.errors import Failure, nearest


class CheckpointError(Failure):
    """A checkpoint that is damaged or could not be written; the message names the file and what is wrong."""


class RubbishWarning(UserWarning):
    """Something that this process wanted to remove is still there."""

    concerns = "process"  # see files.notices


def save_text(path: Path, text: str) -> None:
    """Writes a text file so that a kill leaves the old or the new one.

    Raises:
        CheckpointError: It could not be written; what was there before is untouched.
    """
    temp = path.with_name(f".tmp-{path.name}")
    try:
        with together(bool, path):
            temp.unlink(missing_ok=True)
            write_durably(temp, lambda file: file.write(text.encode()))
            os.replace(temp, path)
            sync_folder(path.parent)
    except CheckpointError:
        with contextlib.suppress(OSError):  # give a full disk its room back
            temp.unlink()
        raise


@contextlib.contextmanager
def together(barrier: Callable[[bool], bool], final: Path) -> Iterator[None]:
    """Runs one stage on all ranks; when it fails on any, it fails on all, so that none is left waiting."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = barrier(error is not None)
    if error is not None:
        raise CheckpointError(f"{final} was not saved, what was there before is untouched: {_reason(error)}") from error
    if failed:
        raise CheckpointError(f"{final} was not saved, what was there before is untouched: another rank failed")


def _reason(error: BaseException) -> str:
    """The operating system's words where it was the cause: torch hides a full disk behind an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with open(path, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def publish(temp: Path, final: Path) -> None:
    """Moves a finished folder to its place, durably, and then removes the one it replaces."""
    sync_folder(temp)
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        if old.exists():  # rubbish of an earlier save that could not be removed is in the way
            names = (old.with_name(f".left-{final.name}-{i}") for i in itertools.count())
            os.rename(old, next(name for name in names if not name.exists()))
        os.rename(final, old)
    os.rename(temp, final)
    sync_folder(final.parent)
    if old.exists():
        remove(old)


def settled(path: Path) -> Path:
    """`path`, or where a save that was killed between its two renames has set it aside."""
    old = path.parent / f".old-{path.name}"
    return old if path.name and not path.exists() and old.exists() else path


def tidy(folder: Path, pattern: str) -> None:
    """Undoes what killed saves left behind: brings back what was set aside, removes what was never finished."""
    for old in folder.glob(f".old-{pattern}"):
        final = old.with_name(old.name.removeprefix(".old-"))
        if final.exists():
            remove(old)
        else:
            os.rename(old, final)
            sync_folder(folder)
    for stray in folder.glob(f".tmp-{pattern}"):
        remove(stray)


def remove(path: Path) -> None:
    with warn_only(path):
        shutil.rmtree(path)


@contextlib.contextmanager
def warn_only(path: Path) -> Iterator[None]:
    """Rubbish that cannot be removed is no reason to stop a run."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{path}: cannot be removed: {error.strerror}", RubbishWarning, stacklevel=2)


def make_folder(folder: Path, *, parents: bool = True) -> None:
    """Makes a folder, durably; without `parents`, only where there is one to hold it."""
    if not folder.exists():
        folder.mkdir(parents=parents)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest_beside(path: Path) -> str:
    """A suggestion from the names beside a path that does not exist; or that it is a link whose target does not."""
    if os.path.islink(path):
        return ", only a link that leads nowhere"
    with contextlib.suppress(OSError):
        return nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return ""
