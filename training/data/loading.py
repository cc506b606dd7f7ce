"""The order of samples, and the loaders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Sampler

from files.errors import ConfigError
from files.words import counted
from training.data.dataset import DataBundle, Position
from training.data.order import Balanced, Order, Shuffled
from training.data.skipping import collate
from training.data.workers import leave_signals_to_the_run

if TYPE_CHECKING:
    from training.config import DataSection


class EpochSampler(Sampler[list[Position]]):
    """Batches of (epoch, index): an order that is a pure function of (seed, epoch), dealt out to the ranks.

    Every rank gets the same number of whole batches and what is left over is dropped, so that no rank waits for
    another. Give it to a DataLoader as `batch_sampler`. It lives in the main process: setting its position before
    `iter(loader)` works with persistent workers too. It does not go to the next epoch by itself, since workers run
    ahead of the loop, which alone knows where it is.

    Args:
        length: Samples of an epoch.
        batch_size: Of each process.
        seed: Of the run.
        rank: Of this process.
        world_size: Number of processes.
        order: The samples of an epoch. Default: all of them, shuffled.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        order: Order | None = None,
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.order = order or Shuffled(length, seed=seed)
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start_batch = 0

    @property
    def batches_per_epoch(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """What the next `iter()` starts with: `batch` is the number of batches of that epoch already done."""
        if epoch < 0 or not 0 <= batch <= self.batches_per_epoch:
            raise ValueError(f"position ({epoch}, {batch}) is outside an epoch of {self.batches_per_epoch} batches")
        self.epoch = epoch
        self.start_batch = batch

    def __len__(self) -> int:
        """Batches that `iter()` will give: fewer than `batches_per_epoch` when it starts in mid-epoch."""
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[Position]]:
        # No generator function: the position is read now and not when the first batch is asked for.
        samples = self.order(self.epoch)  # (N, 1 or 2)
        whole = samples[: self.batches_per_epoch * self.world_size * self.batch_size]
        mine = whole.unflatten(0, (self.batches_per_epoch, self.world_size, self.batch_size))[
            self.start_batch :, self.rank
        ]
        epoch = self.epoch
        batches = mine.numpy()  # iterating over a tensor would make one of each batch at once
        return ([(epoch, *sample) for sample in batch.tolist()] for batch in batches)


def build_train_loader(
    bundle: DataBundle, data: DataSection, *, seed: int, rank: int = 0, world_size: int = 1, device: torch.device
) -> DataLoader:
    """A loader whose `batch_sampler` is an EpochSampler; batches are (images, targets, indices).

    Raises:
        ConfigError: If the training set does not fill one batch on every process.
    """
    order = None
    if data.sampler == "balanced":
        assert data.balance_power is not None
        order = Balanced(bundle.train.targets, power=data.balance_power, seed=seed)
    sampler = EpochSampler(len(bundle.train), data.batch_size, seed=seed, rank=rank, world_size=world_size, order=order)
    if sampler.batches_per_epoch == 0:
        processes = f" x {world_size} processes = {data.batch_size * world_size}" if world_size > 1 else ""
        most = len(bundle.train) // world_size
        advice = f"at most {most} here" if most else f"use at most {counted(len(bundle.train), 'process')}"
        raise ConfigError(
            f"data.batch_size: {data.batch_size}{processes} is more than the {counted(len(bundle.train), 'training image')}; "
            f"{advice}"
        )
    return DataLoader(bundle.train, batch_sampler=sampler, collate_fn=collate, **_loader_options(data.workers, device))


def build_val_loader(
    bundle: DataBundle, data: DataSection, *, rank: int = 0, world_size: int = 1, device: torch.device
) -> DataLoader:
    """A loader of samples rank, rank + world_size, ... in order; the last batch may be short, a rank may have none."""
    shard = range(rank, len(bundle.val), world_size)
    batch_size = data.eval_batch_size or data.batch_size
    workers = min(data.workers, math.ceil(len(shard) / batch_size))  # a worker without a batch is of no use
    options = _loader_options(workers, device)
    return DataLoader(bundle.val, sampler=shard, batch_size=batch_size, collate_fn=collate, **options)


def _loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": leave_signals_to_the_run,
        # Each iter() draws a base seed for the workers. From torch's global generator, that would move the training
        # loop's random stream, and once more after a resume in mid-epoch. Nothing depends on this seed.
        "generator": torch.Generator().manual_seed(0),
    }


def end_workers(loader: DataLoader) -> None:
    """Ends a loader's persistent workers now. Left to the garbage collector, which may close their queues first, each would
    be waited for 5 seconds; torch has no public way.
    """
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        loader._iterator = None
