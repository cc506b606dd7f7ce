"""Signals to a whole process group leave loader workers at work; their parent still ends them, and so does its death."""

import os
import select
import signal
import time
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset, get_worker_info

from training.data.workers import leave_signals_to_the_run

pytestmark = pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="needs sigtimedwait")


class Pids(Dataset[int]):
    """Samples that are the process that makes them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        assert get_worker_info() is not None
        return os.getpid()


def loader(**options: Any) -> DataLoader:
    return DataLoader(Pids(), num_workers=1, prefetch_factor=2, worker_init_fn=leave_signals_to_the_run, **options)


def handler(number: int, frame: Any) -> None:
    raise AssertionError("a worker ran the training process's handler")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_from_elsewhere_does_nothing(number: signal.Signals) -> None:
    before = signal.signal(number, handler)  # inherited by the worker
    try:
        batches = iter(loader())
        pid = int(next(batches))
        assert pid != os.getpid()
        child = os.fork()  # the parent of the worker is this process, so that another one sends the signal
        if child == 0:
            os.kill(pid, number)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.05)
        assert [int(batch) for batch in batches] == [pid] * 11
    finally:
        signal.signal(number, before)


def test_the_parent_ends_a_worker() -> None:
    data = loader(persistent_workers=True)
    batches = iter(data)
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.parametrize("when", ["starting", "at work"])
def test_no_worker_outlives_a_parent_that_was_killed(when: str) -> None:
    """Not even one that had yet to look who its parent is. A worker shows by a pipe that it is there."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.close(read)

        def late(worker: int) -> None:
            while when == "starting" and os.getppid() == parent_of_the_worker:
                time.sleep(0.01)
            os.write(write, b"ready")
            leave_signals_to_the_run(worker)

        parent_of_the_worker = os.getpid()
        options = {"num_workers": 1, "persistent_workers": True, "worker_init_fn": late}
        batches = iter(DataLoader(Pids(), **options))
        if when == "at work":
            next(batches)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
    said = b""
    while select.select([read], [], [], 20)[0] and (text := os.read(read, 100)):
        said += text
    ended = bool(select.select([read], [], [], 0)[0])
    os.close(read)
    assert said == b"ready" and ended
