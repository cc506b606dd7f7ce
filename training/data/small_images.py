"""Small grey images in memory, transformed a batch at a time: the pipeline of digits and mnist5k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from training.data.draws import ERASE, hash_words, uniform
from training.data.transforms import ImageSpec, apply_seeded, build_erase, recolour_steps, to_tensor_steps

if TYPE_CHECKING:
    from training.config import AugmentSection


class SmallImages:
    """Small grey images in memory, known by their rows in the table they come from.

    Args:
        images: (N, 1, H, W) in [0, 1].
        targets: N places in `class_names`.
        rows: N numbers.
        class_names: The classes in the order of their targets.
    """

    location = ""

    def __init__(self, images: Tensor, targets: list[int], rows: list[int], class_names: list[str]) -> None:
        self.images = images
        self.targets = targets
        self.rows = rows
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return str(self.rows[index])

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index, 0].numpy())  # of floats, where 1 is white

    def pipeline(self, augment: AugmentSection, spec: ImageSpec) -> SmallImagesPipeline:
        return SmallImagesPipeline(self.images, augment, spec)


class SmallImagesPipeline:
    """Small grey images, resized and transformed a batch at a time.

    Images are kept as small as they are: resizing a batch costs far less than transforming it, and no large tensor lives
    in each worker. Policies and colour jitter work on PIL images, one by one (a grey image stays one if the model takes
    1 channel), before crop, rotation, shift, zoom and flip, which are one affine map with bilinear sampling and black
    outside.
    """

    def __init__(self, images: Tensor, augment: AugmentSection, spec: ImageSpec) -> None:
        self.images = images
        self.augment = augment
        self.size = spec.input_size
        self.mean = torch.tensor(spec.mean).reshape(-1, 1, 1)  # (C, 1, 1)
        self.std = torch.tensor(spec.std).reshape(-1, 1, 1)  # (C, 1, 1)
        self.recolour = (
            v2.Compose([v2.ToPILImage(), *steps, *to_tensor_steps()])
            if (steps := recolour_steps(augment, spec))
            else None
        )
        self.erase = build_erase(augment)
        self.moves = bool(augment.crop_scale or augment.rotate or augment.translate or augment.zoom or augment.hflip)

    def plain(self, indices: Sequence[int]) -> Tensor:
        return self._normalise(self._resized(indices))

    def augmented(self, indices: Sequence[int], streams: np.ndarray) -> Tensor:
        images = self._resized(indices)
        if self.recolour is not None:
            images = images.expand(-1, self.size[0], -1, -1)  # (B, C, H, W)
            images = torch.stack(
                [apply_seeded(self.recolour, *pair) for pair in zip(images, streams.tolist(), strict=True)]
            )
        if self.moves:
            images = _affine(images, self.augment, streams)
        images = self._normalise(images)
        if self.erase is not None:
            for image, stream in zip(images, hash_words(ERASE, streams).tolist(), strict=True):
                apply_seeded(self.erase, image, stream)  # in place
        return images

    def _resized(self, indices: Sequence[int]) -> Tensor:
        images = self.images[torch.as_tensor(indices)]  # (B, 1, h, w)
        return F.interpolate(images, self.size[1:], mode="bilinear", antialias=True)  # (B, 1, H, W)

    def _normalise(self, images: Tensor) -> Tensor:
        return images.sub(self.mean).div_(self.std)  # grey images take the channels of mean: (B, C, H, W)


def _affine(images: Tensor, augment: AugmentSection, streams: np.ndarray) -> Tensor:
    """Crops, rotates, shifts, zooms and flips each image of (B, C, H, W) by its own draws, in one bilinear sampling.

    Elementwise arithmetic throughout: a batched matrix product may round differently at another batch size.
    """
    height, width = images.shape[-2:]
    angle, shift_x, shift_y, zoom, flip, area, ratio, crop_x, crop_y = uniform(streams, 9).T
    angle = np.radians((2 * angle - 1) * augment.rotate)
    zoom = 1 + (2 * zoom - 1) * augment.zoom
    # Half sides of the crop window as shares of the image; 1 without a crop. A window that would stick out is cut at
    # the border (torchvision draws again instead).
    half_x = half_y = np.ones_like(area)
    if augment.crop_scale is not None:
        low, high = augment.crop_scale
        area = low + (high - low) * area
        low, high = (math.log(limit) for limit in augment.crop_ratio)
        ratio = np.exp(low + (high - low) * ratio)
        half_x, half_y = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
    # The middle of what is sampled, in [-1, 1] units of the image: the crop's middle less the shift.
    middle_x = (1 - half_x) * (2 * crop_x - 1) - 2 * augment.translate * (2 * shift_x - 1)
    middle_y = (1 - half_y) * (2 * crop_y - 1) - 2 * augment.translate * (2 * shift_y - 1)
    half_x = np.where(flip < augment.hflip, -half_x, half_x)
    # From output to input: window, then rotation and zoom. Units are half sides, so a rotation needs the aspect.
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    aspect = height / width

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).reshape(-1, 1, 1)  # (B, 1, 1)

    x = (torch.arange(width) * 2 + 1) / width - 1  # (W,), pixel centres
    y = ((torch.arange(height) * 2 + 1) / height - 1).reshape(-1, 1)  # (H, 1)
    grid_x = (
        column(cos * half_x) * x + column(-sin * aspect * half_y) * y + column(cos * middle_x - sin * aspect * middle_y)
    )
    grid_y = (
        column(sin / aspect * half_x) * x + column(cos * half_y) * y + column(sin / aspect * middle_x + cos * middle_y)
    )
    grid = torch.stack([grid_x, grid_y], dim=-1)  # (B, H, W, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
