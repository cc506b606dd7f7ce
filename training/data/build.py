"""Data sets, augmentation, sampling and mixing: every draw is a pure function of (seed, epoch, sample index).

Two data sets: `digits` (scikit-learn's 1,797 handwritten digits, no download) and `folder` (ROOT/train/CLASS/*.jpg and
ROOT/val/CLASS/*.jpg). A training sample is addressed by (epoch, index) and a batch is (images, targets, indices).
Because the draws belong to the sample and not to the process that makes it, the number of workers changes nothing, a
run resumed in mid-epoch sees the images the uninterrupted one would have seen, and the training loop's own random
stream is left alone.

Libraries draw from global generators (timm's policies from Python's and NumPy's, torchvision's from torch's), so all
three are seeded before each sample and put back after each batch. Digits need none of them for crop, rotation, shift,
zoom and flip: those draws come from a counter-based hash and one affine map transforms the whole batch.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from files.errors import ConfigError
from training.data.dataset import DataBundle
from training.data.digits import DIGIT_NAMES, _digits_bundle
from training.data.draws import _MIX, _ORDER, _global_generators_kept, _hash, _seed_global_generators
from training.data.folder import LeftOut, _folder_bundle, _scan, _train_and_val_folders
from training.data.skipping import collate
from training.data.transforms import ImageSpec, _check_spec

if TYPE_CHECKING:
    from training.config import AugmentSection, DataSection


logger = logging.getLogger(__name__)


def build_datasets(data: DataSection, augment: AugmentSection, spec: ImageSpec, *, seed: int) -> DataBundle:
    """Builds the training and validation data sets.

    Digits come with the augmentation that `augment` says, flips included: a config for digits sets `hflip: 0`.

    Args:
        data: Which data, and where.
        augment: How training images are changed; validation images never are.
        spec: The model's input.
        seed: The run's seed. The digits' split does not depend on it.

    Raises:
        ConfigError: For a missing, empty or inconsistent folder, an unknown policy, or a spec that cannot be met.
    """
    _check_spec(spec)
    if augment.crop_scale is None and not np.allclose(augment.crop_ratio, (3 / 4, 4 / 3)):
        warnings.warn("augment.crop_ratio has no effect without augment.crop_scale", stacklevel=2)
    if data.dataset == "digits":
        bundle = _digits_bundle(augment, spec, seed)
    elif data.dataset == "folder":
        bundle = _folder_bundle(data, augment, spec, seed)
    else:
        raise ConfigError(f"data.dataset: {data.dataset!r} is not one of 'digits', 'folder'")
    bundle.train.replace_unreadable = data.on_error == "skip"
    return bundle


def class_names_of_data(data: DataSection) -> list[str]:
    """Names of the classes in the order of their targets, without building the data sets.

    Raises:
        ConfigError: For a missing or wrong folder.
    """
    if data.dataset == "digits" or data.root is None:
        return list(DIGIT_NAMES)
    return sorted(_scan(_train_and_val_folders(Path(data.root).expanduser())[0], LeftOut()))


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): a permutation that is a pure function of (seed, epoch), dealt out to the ranks.

    Every rank gets the same number of whole batches and what is left over is dropped, so that no rank waits for
    another. Give it to a DataLoader as `batch_sampler`. It lives in the main process: setting its position before
    `iter(loader)` works with persistent workers too. It does not go to the next epoch by itself, since workers run
    ahead of the loop, which alone knows where it is.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
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

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # No generator function: the position is read now and not when the first batch is asked for.
        generator = torch.Generator().manual_seed(int(_hash(self.seed, _ORDER, self.epoch)[0]))
        order = torch.randperm(self.length, generator=generator)
        whole = order[: self.batches_per_epoch * self.world_size * self.batch_size]
        mine = whole.reshape(self.batches_per_epoch, self.world_size, self.batch_size)[self.start_batch :, self.rank]
        epoch = self.epoch
        return ([(epoch, index) for index in batch.tolist()] for batch in mine)


def build_train_loader(
    bundle: DataBundle, data: DataSection, *, seed: int, rank: int = 0, world_size: int = 1, device: torch.device
) -> DataLoader:
    """A loader whose `batch_sampler` is an EpochSampler; batches are (images, targets, indices).

    Raises:
        ConfigError: If the training set does not fill one batch on every process.
    """
    sampler = EpochSampler(len(bundle.train), data.batch_size, seed=seed, rank=rank, world_size=world_size)
    if sampler.batches_per_epoch == 0:
        processes = f" x {world_size} processes = {data.batch_size * world_size}" if world_size > 1 else ""
        most = len(bundle.train) // world_size
        advice = f"at most {most} here" if most else f"use at most {len(bundle.train)} processes"
        raise ConfigError(
            f"data.batch_size: {data.batch_size}{processes} is more than the {len(bundle.train)} training images; "
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
        # Each iter() draws a base seed for the workers. From torch's global generator, that would move the training
        # loop's random stream, and once more after a resume in mid-epoch. Nothing depends on this seed.
        "generator": torch.Generator().manual_seed(0),
    }


class BatchMixer:
    """Mixup and cutmix by timm, seeded by (seed, rank, step): a pure function of its arguments.

    If both are on, each batch takes one of them at random. Without either (`enabled` is False) images and integer
    targets pass through unchanged, and label smoothing is the loss's business; otherwise targets are soft and smoothed
    here, also after `mixup_off_epoch` (0-based: epochs from that one on are not mixed; 0 means never off), so that the
    loss does not change in mid-run.

    timm mixes sample i with sample B - 1 - i and wants an even batch: of an odd one, the last sample stays as it is.
    """

    def __init__(self, augment: AugmentSection, num_classes: int, *, seed: int, rank: int = 0) -> None:
        self.enabled = augment.mixup > 0 or augment.cutmix > 0
        self.off_epoch = augment.mixup_off_epoch
        self.seed = seed
        self.rank = rank
        self.num_classes = num_classes
        self.smoothing = augment.label_smoothing
        if self.off_epoch and not self.enabled:
            warnings.warn("augment.mixup_off_epoch has no effect without augment.mixup or augment.cutmix", stacklevel=2)
        self._mixup = Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            label_smoothing=self.smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, targets: Tensor, step: int, *, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Mixes a batch; `images` may be changed in place.

        Args:
            images: (B, C, H, W).
            targets: (B,), int64.
            step: Counts batches from the start of training, so that no two have the same draws.
            epoch: 0-based, compared with `mixup_off_epoch`.

        Returns:
            Images (B, C, H, W), and targets (B, num_classes) in float32, or as given if the mixer is disabled.
        """
        if not self.enabled:
            return images, targets
        even = len(images) // 2 * 2
        if even == 0 or (self.off_epoch and epoch >= self.off_epoch):
            return images, self._unmixed(targets)
        stream = int(_hash(self.seed, _MIX, self.rank, step)[0])
        with _global_generators_kept():
            _seed_global_generators(stream)
            mixed, soft = self._mixup(images[:even], targets[:even])
        if even < len(images):
            mixed, soft = torch.cat([mixed, images[even:]]), torch.cat([soft, self._unmixed(targets[even:])])
        return mixed, soft

    def _unmixed(self, targets: Tensor) -> Tensor:
        return mixup_target(targets, self.num_classes, smoothing=self.smoothing)
