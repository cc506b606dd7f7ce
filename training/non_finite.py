"""Steps whose loss or gradient is not finite: the run stops before them, or leaves them out, counted and listed."""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from files.durable import save_text
from files.errors import Failure
from files.words import counted
from training.checkpoint import has_checkpoints
from training.distributed import World

if TYPE_CHECKING:
    from training.config import OptimSection, TrainConfig
    from training.state import Progress

COLUMNS = ("epoch", "step", "rank", "samples")
"""Of non_finite.csv. Epochs count from 1, steps from 0; samples are indices of the training data, separated by blanks."""

Seen = Sequence[tuple[Tensor, Tensor, Tensor]]
"""Of each batch of a step: its loss, (B,) rows of logits that are not finite, (B,) sample indices."""


class NonFiniteError(Failure):
    """A loss or gradient that is not finite; raised on all ranks before the optimizer step."""


class NonFiniteSteps:
    """What a run does about steps that are not finite (`optim.on_non_finite`).

    A step that is left out changes nothing but the random streams: neither weights nor average, nor the optimizer's state,
    nor running statistics of norms. Schedules go by the number of the step and move on. So what comes after does not depend
    on when the run was interrupted.

    Args:
        optim: The config's section.
        ways: What may be changed so that it does not happen.

    Attributes:
        limit: Steps that may be left out; None: stop at the first.
        path: The list, of which each process writes its own rows; None: not written.
    """

    def __init__(self, optim: OptimSection, ways: Sequence[str] = ()) -> None:
        self.limit = optim.max_non_finite if optim.on_non_finite == "skip" else None
        self.path: Path | None = None
        self.ways = ways
        self._buffers: list[Tensor] = []

    def keep(self, model: nn.Module) -> None:
        """Before a step: notes what its forward passes change. Nothing where the run would stop."""
        if self.limit is not None:
            self._buffers = [buffer.clone() for buffer in model.buffers()]

    def meet(self, world: World, model: nn.Module, progress: Progress, faults: list[int], seen: Seen) -> None:
        """After a step that was not finite on some rank, on every rank: puts back what it changed, and lists it.

        Raises:
            NonFiniteError: The run is to stop, at this step or after so many.
        """
        # the exchange of gradients spreads what one rank's loss began to all ranks
        ranks = [rank for rank, fault in enumerate(faults) if fault == max(faults)]
        own = suspects(seen) if world.rank in ranks else []
        if self.limit is None:
            raise self._error(world, progress.step, ranks, own, "stopped before the optimizer step")
        if own:
            self._append(progress, world.rank, own)
        if progress.non_finite >= self.limit:
            were = "was" if progress.non_finite == 1 else "were"
            why = f"{counted(progress.non_finite, 'step')} {were} left out before it, "
            why += f"optim.max_non_finite is {self.limit}"
            raise self._error(world, progress.step, ranks, own, why)
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
        if world.is_main:
            which = ", ".join(map(str, ranks))
            tqdm.write(
                f"warning: step {progress.step}: loss or gradient is not finite on rank {which}; left out "
                f"({progress.non_finite + 1} of at most {self.limit})",
                file=sys.stderr,
            )

    def start(self, step: int) -> None:
        """Begins the list, or keeps of it what came before a step: a run that goes on from there writes the rest again."""
        if self.path is None or (self.limit is None and not self.path.exists()):
            return
        rows: list[list[str]] = []
        try:
            with self.path.open(newline="", errors="replace") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS) and row[1].isdecimal()]
        except (FileNotFoundError, csv.Error):
            pass
        kept = [row for row in rows if int(row[1]) < step]
        save_text(self.path, "".join(",".join(row) + "\n" for row in (COLUMNS, *kept)))

    def _error(self, world: World, step: int, ranks: list[int], own: list[int], what: str) -> NonFiniteError:
        """The error to raise on this rank; it names its own samples where it is at fault."""
        shown = ", ".join(map(str, own[:16])) + (f" and {len(own) - 16} more" if len(own) > 16 else "")
        where = f"\nrank {world.rank}: in training samples {shown}" if own else ""
        saved = self.path is not None and has_checkpoints(self.path.parent / "checkpoints")
        further = [" or ".join(self.ways), "the last checkpoint is good" if saved else ""]
        advice = "; ".join(filter(None, further))
        told = f"step {step}: loss or gradient is not finite on rank {', '.join(map(str, ranks))}; {what}{where}"
        return NonFiniteError(f"{told}\n{advice}".rstrip())

    def _append(self, progress: Progress, rank: int, samples: list[int]) -> None:
        """Adds a row, on disk when this returns, by one write: several processes may do so at once."""
        if self.path is None:
            return
        with self.path.open("a") as file:
            file.write(f"{progress.epoch + 1},{progress.step},{rank},{' '.join(map(str, samples))}\n")
            file.flush()
            os.fsync(file.fileno())


def suspects(seen: Seen) -> list[int]:
    """Samples in which it may have begun: those with logits that are not finite, else all of a batch, else all."""
    found: list[int] = []
    for loss, rows, indices in seen:
        if not math.isfinite(loss.item()):
            found += indices[rows.cpu()].tolist() or indices.tolist()
    return found or [index for _, _, indices in seen for index in indices.tolist()]


def ways_out(config: TrainConfig, model: nn.Module, precision: torch.dtype) -> list[str]:
    """What of a run may be changed so that its steps are finite; nothing that is so already."""
    ways = ["lower optim.lr"]
    if config.optim.clip_grad is None:
        ways.append("set optim.clip_grad")
    if precision != torch.float32:
        ways.append("use runtime.precision=float32")
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if normed and config.drop_path.mode == "skip" and config.drop_path.rate != 0:
        # over two samples of one position each the gradient of a batch norm is 300 times that of its input, layer by layer
        ways.append("give the batch norms more samples (data.batch_size, or drop_path.mode=mask)")
    return ways
