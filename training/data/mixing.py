"""Mixup and CutMix of a batch, drawn by (seed, step)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from training.data.draws import MIX, global_generators_kept, hash_words, seed_global_generators

if TYPE_CHECKING:
    from training.config import AugmentSection


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
        stream = int(hash_words(self.seed, MIX, self.rank, step)[0])
        with global_generators_kept():
            seed_global_generators(stream)
            mixed, soft = self._mixup(images[:even], targets[:even])
        if even < len(images):
            mixed, soft = torch.cat([mixed, images[even:]]), torch.cat([soft, self._unmixed(targets[even:])])
        return mixed, soft

    def _unmixed(self, targets: Tensor) -> Tensor:
        return mixup_target(targets, self.num_classes, smoothing=self.smoothing)
