"""Random resized crops of pixels in uint8: where they lie, and how they are resized.

Boxes are those of torchvision's and timm's RandomResizedCrop in distribution, drawn from numbers that belong to the sample
rather than from a global generator. Resizing is torch's, antialiased as Pillow's and several times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from training.data.decoding import picture_of, pixels_of
from training.data.normalise import Box

_ATTEMPTS = 10
CROP_DRAWS = 4 * _ATTEMPTS
"""Numbers in [0, 1) that a box takes at most."""

# The others are Pillow's alone (box, hamming, lanczos), or round otherwise there (nearest).
_ON_TENSORS = ("bilinear", "bicubic")


def crop_box(
    draws: Sequence[float] | np.ndarray,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """A random part of an image.

    Args:
        draws: `CROP_DRAWS` numbers in [0, 1).
        height: Of the image.
        width: Of the image.
        scale: Smallest and largest share of the area, drawn uniformly.
        ratio: Smallest and largest width over height, drawn uniformly in their logarithm.

    Returns:
        The first of ten that fit; failing that, the largest in the middle whose ratio is allowed.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_ATTEMPTS):
        share, aspect, top, left = (float(u) for u in draws[4 * attempt : 4 * attempt + 4])
        area = (scale[0] + (scale[1] - scale[0]) * share) * height * width
        aspect = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def resized(pixels: Tensor, size: Sequence[int], interpolation: str, *, box: Box | None = None) -> Tensor:
    """An image, or a box of it, at another size, antialiased.

    Args:
        pixels: (C, H, W) in uint8.
        size: Height and width of the result.
        interpolation: A name of `torchvision.transforms.InterpolationMode`.
        box: The part to take; None for all.

    Returns:
        (C, *size) in uint8, channels together in memory.
    """
    if box is not None:
        top, left, height, width = box
        pixels = pixels[:, top : top + height, left : left + width]
    if interpolation not in _ON_TENSORS:
        resize = v2.Resize(list(size), interpolation=v2.InterpolationMode(interpolation))
        return pixels_of(resize(picture_of(pixels)))
    # With the channels together torch resizes all three at once. torchvision's functional.resize ends here as well, by
    # way of checks that cost as much as the resizing.
    batch = pixels[None].contiguous(memory_format=torch.channels_last)  # (1, C, H, W)
    return F.interpolate(batch, list(size), mode=interpolation, antialias=True)[0]


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Images (C, H, W) as a batch (B, C, H, W) in which channels lie together, as in the images."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)  # by way of (B, H, W, C)
