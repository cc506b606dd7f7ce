"""Checkpoints that cost training little: the state is copied, and a thread writes the copy.

At most one save is under way; the next waits for it. Several processes meet while they save (`save_checkpoint`), and
training has collectives of its own meanwhile, so that the threads have a process group to themselves, `World.apart`.
Nothing of the format changes: a kill at any moment leaves the old checkpoint or the new one.
"""

import copy
import os
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from training.run_folder import RunFolder
from training.state import RunState, Snapshot

_SAVERS: "weakref.WeakSet[Saver]" = weakref.WeakSet()


class Saver:
    """Saves a run as `checkpoint.background` says. Every rank calls the same methods at the same steps.

    A save that failed is told at the next call, on every rank, since a save that fails on one rank fails on all.
    So that a run need not go on until then, `on_failure` is called at once, from the thread.

    Args:
        state: Of the run.
        folder: Its folder.
        on_failure: Called with a reason, in words; `StopSignals.ask` stops all ranks at the end of their step.
    """

    def __init__(self, state: RunState, folder: RunFolder, *, on_failure: Callable[[str], object]) -> None:
        self.state = state
        self.folder = folder
        self.background = state.setup.config.checkpoint.background
        self.on_failure = on_failure
        self._world = state.setup.world.apart() if self.background else state.setup.world
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "Saver":
        _SAVERS.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets a save under way end, unless the run is to stop at once (a second Ctrl-C)."""
        _SAVERS.discard(self)
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):  # which says more than a failed save; of that, a line
            self.join()
            if self._error is not None:
                tqdm.write(f"warning: {self._error}", file=sys.stderr)

    def save(self) -> None:
        """Begins a save of the state as it is now, after waiting for one under way.

        Raises:
            CheckpointError: On every rank: the save before, or one in the foreground, has failed.
        """
        self.wait()
        snapshot = self.state.snapshot()
        if not self.background:
            snapshot.write(self.folder, self._world)
            return
        # a daemon: a run that has to stop at once leaves the old checkpoint rather than wait for the new one
        self._thread = threading.Thread(target=self._write, args=(copied(snapshot),), name="saving", daemon=True)
        self._thread.start()

    def save_and_wait(self) -> Path:
        """Saves the state as it is now and returns the checkpoint's folder. Raises as `save`."""
        self.wait()
        return self.state.snapshot().write(self.folder, self._world)

    def wait(self) -> None:
        """Until the save under way, if any, is on disk. Raises as `save`."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """As `wait`, but keeps a failure to be told by the next call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            snapshot.write(self.folder, self._world)
        except Exception as error:  # told in the main thread
            self._error = error
            self.on_failure("a failed save")


def copied(snapshot: Snapshot) -> Snapshot:
    """A snapshot that no step changes: tensors are copied to the CPU, containers are new."""
    return Snapshot(snapshot.step, _copied(snapshot.shared), _copied(snapshot.own), snapshot.keep)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        new = copy.copy(value)  # with what a state dict has beside its items
        for key, item in value.items():
            new[key] = _copied(item)
        return new
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return value


def _join_all() -> None:
    """A process forked amid a write would inherit locks that the writing thread holds and nobody ever frees."""
    for saver in list(_SAVERS):
        saver.join()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_join_all)
