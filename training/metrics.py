"""What an evaluation measures. A new metric is one entry of METRICS: it has its column in metrics.csv, its place in the
line of each epoch, in TensorBoard and in the report.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from training.distributed import World


class Metric(ABC):
    """One number about a model, gathered batch by batch and over processes.

    Args:
        column: Its name in metrics.csv.
        label: What people call it, in the line of an epoch and in the report.
        form: How it is written, a format specification.
        percent: It is a percentage; the report draws all of these in one chart.
        in_bar: The bar shows its last value while the run goes on.
    """

    def __init__(self, column: str, label: str, form: str, *, percent: bool = False, in_bar: bool = False) -> None:
        self.column, self.label, self.form, self.percent, self.in_bar = column, label, form, percent, in_bar
        self.reset()

    def text(self, value: float) -> str:
        """The value with its label."""
        return f"{self.label} {value:{self.form}}"

    @abstractmethod
    def reset(self) -> None:
        """Forgets all batches."""

    @abstractmethod
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch, without waiting for the device.

        Args:
            logits: (B, K), float32.
            targets: Classes, (B,).
        """

    @abstractmethod
    def merge(self, world: World) -> None:
        """Adds what the other processes gathered. Every process calls it, also one that saw no batch."""

    @abstractmethod
    def value(self) -> float:
        """The number over all that was gathered; there is at least one sample."""


class Mean(Metric):
    """The mean over samples of something.

    Args:
        measure: Of logits (B, K) and targets (B,) its sum over the batch, a tensor without dimensions.
        scale: Multiplies the mean: 100 for a percentage.
        rest: See `Metric`.
    """

    def __init__(
        self,
        column: str,
        label: str,
        measure: Callable[[Tensor, Tensor], Tensor],
        *,
        form: str = ".4f",
        percent: bool = False,
        in_bar: bool = False,
    ) -> None:
        self.measure, self.scale = measure, 100 if percent else 1
        super().__init__(column, label, form, percent=percent, in_bar=in_bar)

    def reset(self) -> None:
        self.parts: list[Tensor] = []  # of each batch, left on the device
        self.samples = 0
        self.sum = 0.0

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.parts.append(self.measure(logits, targets).detach().float())
        self.samples += len(targets)

    def merge(self, world: World) -> None:
        own = sum(torch.stack(self.parts).tolist()) if self.parts else 0.0  # in double precision
        self.parts = []
        total, samples = world.sum(torch.tensor([own, self.samples], dtype=torch.float64)).tolist()
        self.sum, self.samples = total, int(samples)

    def value(self) -> float:
        return self.scale * self.sum / self.samples


def among_top(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Counts the samples whose class is among the `count` with the largest logits."""

    def hits(logits: Tensor, targets: Tensor) -> Tensor:
        top = logits.topk(min(count, logits.shape[1]), dim=1).indices  # (B, count)
        return (top == targets[:, None]).sum()

    return hits


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy without smoothing."""
    return cross_entropy(logits, targets, reduction="sum")


METRICS: Sequence[Metric] = (
    Mean("val_loss", "val loss", summed_loss),
    Mean("val_top1", "top-1", among_top(1), form="6.2f", percent=True, in_bar=True),
    Mean("val_top5", "top-5", among_top(5), form="6.2f", percent=True),
)
