"""What a person sees of a run, and the signals they send it."""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from training.metrics import METRICS
from training.run_folder import RunFolder
from training.setup import Setup
from training.state import Progress
from training.tracking import open_tracker


class Stopped(BaseException):
    """A signal came before there was a step to finish; its text is the signal's name. No `except Exception` catches it."""


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, so that the loop finishes its step; a second Ctrl-C stops at once.

    Args:
        early: There is nothing to finish yet: raise `Stopped` instead, until `finish_steps`.
    """

    def __init__(self, *, early: bool = False) -> None:
        self.received: str | None = None
        self._early = early
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other can take signals
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        """Stops the run as a signal would, at the end of its step and on all processes; any thread may ask."""
        self.received = self.received or reason

    def finish_steps(self) -> None:
        """From here on a signal is noted, and whoever looks at `received` stops when it is time.

        Raises:
            Stopped: One came already, where its exception was lost.
        """
        self._early = False
        if self.received is not None:
            raise Stopped(self.received)

    def until_told(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, at least one of them, until a signal is received: for work that can be done again."""
        for batch in batches:
            yield batch
            if self.received is not None:
                return

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if self._early:
            raise Stopped(self.received)


class PlainLines:
    """What of tqdm is used here, for logs: now and then a line, without control characters.

    Args:
        total: Steps of the whole run.
        initial: Those that were done before.
        disable: Write no such lines.
        mininterval: Seconds between two lines.
    """

    def __init__(self, *, total: int, initial: int, disable: bool, mininterval: float, **_: Any) -> None:
        self.total, self.done, self.initial = total, initial, initial
        self.disable, self.mininterval = disable, mininterval
        self.description = self.postfix = ""
        self.started = self.last = time.monotonic()

    def set_description(self, text: str, refresh: bool = True) -> None:
        self.description = text

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = text

    def update(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.disable or now - self.last < self.mininterval:
            return
        self.last = now
        passed = now - self.started
        left = passed / (self.done - self.initial) * (self.total - self.done)
        times = f"{tqdm.format_interval(passed)} passed, {tqdm.format_interval(left)} left"
        print(
            f"{self.description}  step {self.done}/{self.total}  {self.postfix}  {times}", file=sys.stderr, flush=True
        )

    def write(self, line: str) -> None:
        print(line, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class ProgressBar:
    """A bar over all steps of the run on the main process, in a log a line now and then; and a line per epoch."""

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self.setup = setup
        self.epochs = setup.config.optim.epochs
        self.measured = ""
        make = tqdm if sys.stderr.isatty() else PlainLines
        self.bar: Any = make(
            total=setup.total_steps,
            initial=progress.step,
            disable=not setup.world.is_main,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def write(self, line: str) -> None:
        if self.setup.world.is_main:
            self.bar.write(line)

    def step(self, progress: Progress, loss: float) -> None:
        self.bar.set_description(f"epoch {progress.epoch + 1}/{self.epochs}", refresh=False)
        rate = progress.samples * self.setup.world.size / max(progress.epoch_seconds, 1e-9)
        self.bar.set_postfix_str(
            f"loss {loss:.3f}{self.measured} {rate:.0f} images/s lr {self.setup.lr:.2e} "
            f"drop path {self.setup.drop_path_rate:.3f}",
            refresh=False,
        )
        self.bar.update()

    def epoch(self, row: dict[str, float]) -> None:
        measured = METRICS if not math.isnan(row["val_top1"]) else ()
        told = [metric.text(row[metric.column]) for metric in measured if metric.in_line] or ["not validated"]
        if measured:
            self.measured = "".join(f" {m.label} {f'{row[m.column]:{m.form}}'.strip()}" for m in measured if m.in_bar)
        self.write(
            f"epoch {row['epoch']:>3}/{self.epochs}  train loss {row['train_loss']:.4f}  {'  '.join(told)}"
            f"  {row['images_per_second']:.0f} images/s, {row['data_share']:.0%} waiting for data"
            f"  lr {row['lr']:.2e}  drop path {row['drop_path_rate']:.3f}  {row['seconds']:.1f} s"
        )


class Board:
    """Scalars of the main process, for TensorBoard and what else section `log` names.

    Where TensorBoard's cannot be written, that is said once and the run goes on.
    """

    def __init__(self, setup: Setup, folder: RunFolder, progress: Progress) -> None:
        # purge_step hides what was written from the step on that a run is resumed from: that of a checkpoint at the end of
        # an epoch, saved before its validation, is written again
        self.writer = None
        self.tracker = open_tracker(setup.config, folder, setup.world)
        self._hook, threading.excepthook = threading.excepthook, self._quiet
        if setup.world.is_main:
            with self._optional():
                from torch.utils.tensorboard.writer import (
                    SummaryWriter,  # half a second that other processes need not spend
                )

                self.writer = SummaryWriter(str(folder.tensorboard), purge_step=progress.step or None)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._optional():
            if self.writer is not None:
                self.writer.close()
        threading.excepthook = self._hook
        self.tracker.finish(failed=kind is not None)

    def write(self, row: dict[str, float], step: int) -> None:
        scalars = {key: value for key, value in row.items() if key not in ("epoch", "step") and not math.isnan(value)}
        with self._optional():
            if self.writer is not None:
                for key, value in scalars.items():
                    self.writer.add_scalar(key, value, step)
                self.writer.flush()
        self.tracker.write(scalars, step)

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.writer = None
            tqdm.write(f"warning: no curves for TensorBoard from here on: {error.strerror or error}", file=sys.stderr)

    def _quiet(self, thrown: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread of its own, raises there and in `write` too; once is enough."""
        if not type(thrown.thread).__module__.startswith("tensorboard"):
            self._hook(thrown)
