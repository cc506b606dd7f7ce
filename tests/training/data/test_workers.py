"""Signals to a whole process group leave loader workers at work; their parent still ends them."""

import os
import signal
import time
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset, get_worker_info

from training.data.workers import leave_signals_to_the_run

pytestmark = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")


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
