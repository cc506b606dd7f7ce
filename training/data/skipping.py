"""Samples that cannot be read: named, or skipped, counted and listed."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from files.csv_rows import csv_row
from files.words import counted
from training.data.dataset import MAX_REPLACEMENTS, ReadError, Sample, Unreadable
from training.data.source import name_below

if TYPE_CHECKING:
    from training.config import DataSection


@dataclass(frozen=True)
class PartialBatch:
    """What a loader gives in place of a batch in which something could not be read.

    Attributes:
        batch: (images, targets, indices) of the samples there are; None where there is none.
        unreadable: The others.
    """

    batch: Any
    unreadable: list[Unreadable]


def collate(samples: Sequence[Sample | Unreadable]) -> Any:
    """(images, targets, indices), or a PartialBatch."""
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if len(good) == len(samples):
        return _batch(good)
    return PartialBatch(_batch(good) if good else None, [s for s in samples if isinstance(s, Unreadable)])


def _batch(samples: Sequence[Sample]) -> list[Tensor]:
    """A batch of samples; images in uint8 keep the layout in which they were made, as rows of memory that move at once."""
    if samples[0][0].dtype != torch.uint8:
        return default_collate(list(samples))
    images, targets, indices = default_collate([(image.permute(1, 2, 0), *rest) for image, *rest in samples])
    return [images.permute(0, 3, 1, 2), targets, indices]  # (B, H, W, C) -> (B, C, H, W)


class SkipList:
    """What a run does about samples that cannot be read (`data.on_error`): stop at the first, or list and count them.

    The list is a file of the run folder: all processes add to it and a resumed run goes on with it, so a file counts once.

    Args:
        data: The config's section.

    Attributes:
        path: The list, columns part, name (relative to the root) and reason; None: kept in memory only.
    """

    def __init__(self, data: DataSection) -> None:
        self.limit = data.max_skipped if data.on_error == "skip" else None
        self.root = Path(data.root or ".").expanduser()
        self.path: Path | None = None
        self.known: set[tuple[str, str]] = set()

    def read(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches (images, targets, indices), after doing what is to be done about samples missing in them.

        Raises:
            ReadError: For the first unreadable sample, or the one above the ceiling, or a worker that died.
        """
        for batch in _received(batches):
            if isinstance(batch, PartialBatch):
                for unreadable in batch.unreadable:
                    self._note(unreadable)
                batch = batch.batch
            if batch is not None:
                yield batch

    def count(self, part: str) -> int:
        """Files of `train` or `val` skipped so far, by any process."""
        self.known |= self._listed()
        return sum(p == part for p, _ in self.known)

    def _note(self, unreadable: Unreadable) -> None:
        if self.limit is None:
            raise ReadError(f"{unreadable}\nmend or remove the file, or leave such files out: data.on_error=skip")
        if unreadable.part == "train" and not unreadable.replaced:
            raise ReadError(f"{unreadable}\nnor can any of {MAX_REPLACEMENTS} images drawn to replace it")
        key = (unreadable.part, name_below(unreadable.place, self.root))
        if key in self.known:
            return
        self.known |= self._listed()
        if key not in self.known:
            self.known.add(key)
            self._append((*key, unreadable.reason))
        if len(self.known) > self.limit:
            listed = f"; {self.path} lists them" if self.path else ""
            raise ReadError(
                f"{unreadable}\nthe run has skipped {counted(len(self.known), 'image')}, data.max_skipped is "
                f"{self.limit}{listed}; raise it, or mend the files and delete the list"
            )
        done = "another takes its place" if unreadable.replaced else "left out of validation"
        tqdm.write(f"warning: {unreadable}; {done} ({len(self.known)} of at most {self.limit})", file=sys.stderr)

    def _listed(self) -> set[tuple[str, str]]:
        if self.path is None:
            return set()
        found: set[tuple[str, str]] = set()
        # a damaged list is read as far as it goes: what is not in it is listed again
        with contextlib.suppress(FileNotFoundError, csv.Error), self._open("r") as file:
            found.update((row[0], row[1]) for row in csv.reader(file) if len(row) == 3 and row[0] != "part")
        return found

    def _append(self, row: tuple[str, str, str]) -> None:
        """Adds a row, on disk when this returns, by one write: several processes may do so at once."""
        if self.path is None:
            return
        rows = [row] if self.path.exists() else [("part", "name", "reason"), row]
        with self._open("a") as file:
            file.write("".join(map(csv_row, rows)))
            file.flush()
            os.fsync(file.fileno())

    def _open(self, mode: str) -> IO[str]:
        assert self.path is not None
        return self.path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")  # names may be any bytes


def _received(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches. A worker that dies while its batch is fetched breaks a connection before torch notices its death.

    Raises:
        ReadError: A worker died. Raised here only, where no step has begun: the run can be saved as it is.
    """
    iterator = None
    while True:
        try:
            if iterator is None:
                iterator = iter(batches)  # an epoch begins with a word from each worker that stays, or with its death
                _notice_deaths_here()
            batch = next(iterator)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            lost = RuntimeError(f"DataLoader worker cannot hand over a batch (has it died?): {what}")
            raise ReadError(lost_worker(lost)) from error
        except RuntimeError as error:
            lost = lost_worker(error)
            if lost is None:
                raise
            raise ReadError(lost) from error
        yield batch


def _notice_deaths_here() -> None:
    """Takes back torch's handler of SIGCHLD, which raises wherever the process is just then, in mid-step too.

    The loader looks after its workers itself whenever it waits for a batch.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        handler = signal.getsignal(signal.SIGCHLD)
        if (getattr(handler, "__module__", None) or "").startswith("torch."):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def lost_worker(error: BaseException) -> str | None:
    """What to say of loader's workers that died or cannot be heard any more; None where the error is another one."""
    text = str(error)
    if not text.startswith("DataLoader worker") and "Communication with the workers" not in text:
        return None
    first = textwrap.shorten(text.splitlines()[0], 300).rstrip(".")
    return f"{first}\nout of memory or of open files? use fewer data.workers, and go on with --resume"
