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
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from files.errors import ConfigError
from training.data.dataset import DataBundle
from training.data.digits import DIGIT_NAMES, _digits_bundle
from training.data.draws import _MIX, _global_generators_kept, _hash, _seed_global_generators
from training.data.folder import LeftOut, _folder_bundle, _scan, _train_and_val_folders
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
