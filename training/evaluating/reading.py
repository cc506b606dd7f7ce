"""From samples by index to batches that a model takes: nothing is augmented, nothing shuffled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from training.data.dataset import ValDataset
from training.data.normalise import Normalise
from training.data.skipping import collate
from training.data.transforms import ImageSpec


def build_loader(
    dataset: ValDataset, indices: Sequence[int], *, batch_size: int, workers: int, device: torch.device
) -> DataLoader:
    """Batches (images, targets, indices) of some samples in their order, or a `PartialBatch` for one.

    Args:
        dataset: The samples.
        indices: Those to read.
        batch_size: The last batch may be smaller.
        workers: Processes that read; not more than there are batches.
        device: Where the batches go.
    """
    options: dict[str, Any] = {"pin_memory": device.type == "cuda"}
    options["num_workers"] = min(workers, math.ceil(len(indices) / batch_size))
    options["generator"] = torch.Generator().manual_seed(0)  # or each pass would draw from torch's own
    return DataLoader(dataset, sampler=indices, batch_size=batch_size, collate_fn=collate, **options)


class ModelInput:
    """Makes of a loader's batch of images the input of a model, on its device.

    Args:
        spec: The model's input.
        device: Where the model is.
    """

    def __init__(self, spec: ImageSpec, device: torch.device) -> None:
        self.device = device
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.normalise = Normalise(spec)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), in uint8 or already normalised -> normalised, in float32."""
        images = self.normalise(images.to(self.device, non_blocking=True))
        return images.contiguous(memory_format=self.memory_format)
