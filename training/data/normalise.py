"""What is done to a whole batch, on the device: bytes become numbers, and what random erasing covers becomes noise.

Workers give images in uint8, a quarter of the memory to hand over and to copy. Both steps are pure functions of their
arguments: where a batch is made, and by how many workers, changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from training.data.draws import ERASE, SAMPLE, hash_words, uniform

if TYPE_CHECKING:
    from training.data.transforms import ImageSpec

# Random erasing as timm has it: share of the area, smallest and largest; smallest aspect ratio; attempts at a box.
_AREA, _ASPECT, _ATTEMPTS = (0.02, 1 / 3), 0.3, 10

Box = tuple[int, int, int, int]
"""Top, left, height, width, in pixels."""


class Normalise:
    """From a batch of a loader to the model's input: uint8 in 0..255 becomes float32, normalised by mean and std.

    A batch in float32 is ready, and passes as it is: digits, which their own pipeline normalises.
    """

    def __init__(self, spec: ImageSpec) -> None:
        shift, scale = 255.0 * torch.tensor([spec.mean, spec.std], dtype=torch.float64).reshape(2, -1, 1, 1)
        self._by_device = {torch.device("cpu"): (shift.float(), (1 / scale).float())}  # each (C, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises (B, C, H, W) on the device where it lies; of a CPU, in the contiguous layout."""
        if images.dtype != torch.uint8:
            return images
        shift, scale = self._on(images.device)
        # Channels that lie together, three numbers at a time, are slow to compute with on a CPU.
        layout = torch.contiguous_format if images.device.type == "cpu" else torch.preserve_format
        return images.to(torch.float32, memory_format=layout).sub_(shift).mul_(scale)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._by_device:
            shift, scale = self._by_device[torch.device("cpu")]
            self._by_device[device] = shift.to(device), scale.to(device)
        return self._by_device[device]


class RandomErase:
    """Random erasing of normalised images, as timm's training script has it: a box of normal noise per pixel.

    Boxes and noise are drawn by (seed, epoch, batch, index), on the device of the batch: equal on the same kind of device.
    A sample that an epoch has several times is erased each time in another place.

    Args:
        probability: Per image; 0 leaves batches alone.
        seed: The run's.
    """

    def __init__(self, probability: float, *, seed: int) -> None:
        self.probability = probability
        self.seed = seed

    def __call__(self, images: Tensor, indices: Tensor, *, epoch: int, batch: int = 0) -> Tensor:
        """Erases in place.

        Args:
            images: (B, C, H, W), normalised.
            indices: (B,), of the samples.
            epoch: 0-based.
            batch: Its number in the run or in the epoch.

        Returns:
            The images.
        """
        if self.probability == 0:
            return images
        channels, height, width = images.shape[1:]
        rows = indices.tolist()
        copies = [rows[:row].count(index) for row, index in enumerate(rows)]
        streams = hash_words(ERASE, hash_words(self.seed, SAMPLE, epoch, rows), batch, copies)
        generator = torch.Generator(images.device)
        for row, (stream, draws) in enumerate(zip(streams.tolist(), uniform(streams, 1 + 4 * _ATTEMPTS), strict=True)):
            if draws[0] < self.probability and (box := erased_box(draws[1:], height, width)):
                top, left, h, w = box
                generator.manual_seed(stream)
                # drawn apart from the batch, whose memory format may be either
                noise = torch.randn((channels, h, w), generator=generator, device=images.device, dtype=images.dtype)
                images[row, :, top : top + h, left : left + w] = noise
        return images


def erased_box(draws: Sequence[float] | np.ndarray, height: int, width: int) -> Box | None:
    """The box that random erasing covers, by numbers in [0, 1): four per attempt. None where no attempt fits."""
    low, high = _AREA
    log_aspect = math.log(_ASPECT)
    for attempt in range(len(draws) // 4):
        area, aspect, top, left = (float(u) for u in draws[4 * attempt : 4 * attempt + 4])
        area = (low + (high - low) * area) * height * width
        aspect = math.exp(log_aspect * (1 - 2 * aspect))  # from log 0.3 to log 1 / 0.3
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    return None
