"""One writer per folder: a lock that the kernel gives back when its process ends, however it ends.

The lock is on the file `.lock` in the folder (`flock`), which says who holds it. A file that a killed process left behind
locks nothing. Where the system has no such locks (Windows, some network file systems) a folder is not locked, with a warning
in the second case; over NFS it holds between machines only where the server keeps locks.
"""

import contextlib
import datetime
import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from files.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _close_in_child() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def locked(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Holds the lock of a folder that exists.

    Children of this process do not: one that outlives it, such as a loader's worker, keeps nobody out.

    Args:
        folder: To lock.
        wait: Seconds to wait for another process to give it back.

    Raises:
        ConfigError: Another process holds it; the message says which, and since when.
    """
    held = _acquire(folder, wait)
    if held is None:
        yield
        return
    _held.add(held)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_at(folder / LOCK, held):
                os.unlink(folder / LOCK)  # while it is held: nobody can have locked this very file
        _held.discard(held)
        os.close(held)


def is_locked(folder: Path) -> bool:
    """Whether a process that lives, this one or another, holds the lock of a folder: whether a run goes on there.

    Changes nothing in the folder. False where locks cannot be had, and where the folder is not there.
    """
    return holder(folder) is not None


def holder(folder: Path) -> str | None:
    """Who holds the lock of a folder and since when, in words; None where nobody does."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _who(descriptor) if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    finally:
        os.close(descriptor)
    return None


def refuse_locked(folder: Path) -> None:
    """Raises as `locked` would, and locks nothing."""
    who = holder(folder)
    if who is not None:
        raise _in_use(folder, who)


def _acquire(folder: Path, wait: float) -> int | None:
    """A descriptor of the locked file; None where the folder cannot be locked."""
    if fcntl is None:
        return None
    attempts = 4 + int(wait / 0.05)
    while True:
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another --output") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = _who(descriptor)
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                attempts -= 1
                if attempts:
                    time.sleep(0.05)  # perhaps somebody who only asks, see `holder`
                    continue
                raise _in_use(folder, who) from None
            warnings.warn(
                f"{folder}: cannot be locked here ({error.strerror}); take care that no second run writes to it",
                stacklevel=4,
            )
            return None
        if _is_at(folder / LOCK, descriptor):
            break
        os.close(descriptor)  # its holder removed it between our two calls
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    with contextlib.suppress(OSError):  # on a full disk nobody can read who holds it, which is no reason to stop
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts).encode(), 0)
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at that path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _in_use(folder: Path, who: str) -> ConfigError:
    return ConfigError(f"{folder}: a run goes on here, {who}; wait for it or stop it, or choose another --output")


def _who(descriptor: int) -> str:
    try:
        facts = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {facts['pid']} on {facts['host']}, since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
