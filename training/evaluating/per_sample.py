"""What a model said of each sample, gathered in the pass that measures it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.distributed import World
from training.metrics import Metric


@dataclass(frozen=True)
class Mistake:
    """A sample whose class was not the one predicted.

    Attributes:
        index: Of the sample.
        label: Its class.
        prediction: The class predicted.
        probability: Of the prediction.
        label_probability: Of the label.
    """

    index: int
    label: int
    prediction: int
    probability: float
    label_probability: float


class PerSample(Metric):
    """Prediction and probabilities of each sample; as a number, how many samples there were.

    Args:
        count: Samples of the part that is evaluated.

    Attributes:
        table: (count, 4) in float64: seen, prediction (-1: none, of logits that are not finite), its probability, the
            label's probability.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__("samples", "samples", ".0f", in_line=False)

    def watch(self, batches: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """The batches (images, targets, indices), whose indices are noted: a metric sees no more than the targets."""
        for batch in batches:
            self.indices = torch.as_tensor(batch[2])
            yield batch

    def reset(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []  # indices (B,) and numbers (3, B), left on the device
        self.indices = torch.zeros(0, dtype=torch.int64)
        self.table = torch.zeros(self.count, 4, dtype=torch.float64)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        probabilities = logits.softmax(dim=1)  # (B, K)
        top, prediction = probabilities.max(dim=1)  # (B,)
        prediction = torch.where(top.isnan(), -1, prediction)
        of_label = probabilities.gather(1, targets[:, None])[:, 0]  # (B,)
        self.parts.append((self.indices, torch.stack([prediction.float(), top, of_label])))  # exact up to 2^24 classes

    def merge(self, world: World) -> None:
        for indices, numbers in self.parts:
            self.table[indices, 0] = 1
            self.table[indices, 1:] = numbers.T.cpu().double()
        self.parts = []
        if world.size > 1:  # each sample is one process's: all others hold zeros
            self.table = world.sum(self.table).cpu()

    def value(self) -> float:
        return float(self.table[:, 0].sum())

    def mistakes(self, targets: list[int]) -> list[Mistake]:
        """Samples that were not recognised, likely wrong labels first.

        That is by self-confidence (Northcutt et al. 2021, arXiv 1911.00068): the lower the probability of the given label,
        the likelier it is wrong; among equal ones, the surer of another class comes first.
        """
        seen, prediction, top, of_label = self.table.T.numpy()
        labels = np.asarray(targets)
        wrong = np.flatnonzero((seen > 0) & (prediction >= 0) & (prediction != labels))
        order = wrong[np.lexsort((wrong, -top[wrong], of_label[wrong].round(6)))]  # equal as they are written
        return [Mistake(int(i), int(labels[i]), int(prediction[i]), float(top[i]), float(of_label[i])) for i in order]
