"""A folder has one writer; a dead one keeps nobody out."""

import errno
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from files import lock
from files.errors import ConfigError
from files.lock import LOCK, holder, is_locked, locked, refuse_locked

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="no flock")


def child(act: Callable[[], object]) -> int:
    """Runs something in a child process that then sleeps; returns its id as soon as it was done."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os.write(writing, b"x")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_writer_is_refused_and_told_who_is_the_first(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(ConfigError, match="a run goes on here") as caught, locked(tmp_path):
            pass
        told = str(caught.value)
        assert f"process {os.getpid()} on {socket.gethostname()}, since 20" in told and len(told.splitlines()) == 1
        with pytest.raises(ConfigError, match=re.escape(told)):
            refuse_locked(tmp_path)
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path) and not list(tmp_path.iterdir())
    refuse_locked(tmp_path)
    with locked(tmp_path):
        pass


def test_one_may_wait_for_the_other(tmp_path: Path) -> None:
    held = locked(tmp_path)
    pid = child(held.__enter__)
    with pytest.raises(ConfigError, match=f"process {pid}"), locked(tmp_path, wait=0.1):
        pass
    threading.Timer(0.5, end, [pid]).start()
    with locked(tmp_path, wait=60):
        assert holder(tmp_path) is not None and f"process {os.getpid()}" in str(holder(tmp_path))


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    held = locked(tmp_path)
    pid = child(held.__enter__)
    try:
        assert f"process {pid} on " in (holder(tmp_path) or "")
        with pytest.raises(ConfigError, match=f"process {pid}"), locked(tmp_path):
            pass
    finally:
        end(pid)
    assert (tmp_path / LOCK).exists() and not is_locked(tmp_path)
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in (holder(tmp_path) or "")


def test_a_child_that_outlives_the_holder_keeps_nobody_out(tmp_path: Path) -> None:
    with locked(tmp_path):
        pid = child(lambda: None)
        assert is_locked(tmp_path)
    try:
        with locked(tmp_path):
            pass
    finally:
        end(pid)


def test_a_deleted_folder_is_let_go_without_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder):
        (folder / LOCK).unlink()
        folder.rmdir()
    with locked(tmp_path):
        (tmp_path / LOCK).unlink()
        with locked(tmp_path):  # what somebody deletes protects no more
            pass


def test_no_lock_and_no_holder_where_there_is_no_folder(tmp_path: Path) -> None:
    assert holder(tmp_path / "none") is None
    with pytest.raises(ConfigError, match=r"cannot write to .*none: No such file"), locked(tmp_path / "none"):
        pass


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"3", b"\xff", b'{"pid": 1}'])
def test_a_damaged_file_still_locks(text: bytes, tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / LOCK).write_bytes(text)
        assert holder(tmp_path) == "another process"


def test_a_file_system_without_locks_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLocks:
        LOCK_EX = LOCK_NB = LOCK_SH = 0

        @staticmethod
        def flock(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "fcntl", NoLocks)
    with pytest.warns(UserWarning, match="cannot be locked here .No locks available."), locked(tmp_path):
        assert not is_locked(tmp_path)
    monkeypatch.setattr(lock, "fcntl", None)
    with locked(tmp_path):
        assert holder(tmp_path) is None
