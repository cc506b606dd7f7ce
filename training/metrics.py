"""What an evaluation measures. A new metric is one entry of METRICS: it has its column in metrics.csv, its place in the
line of each epoch, in TensorBoard and in the report, and is measured by validate.py too.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from files.errors import nearest
from training.distributed import World


class Gathering(ABC):
    """What is gathered batch by batch and over processes: by a metric for itself, or for several that share it."""

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


class Metric(Gathering):
    """One number about a model.

    Args:
        column: Its name in metrics.csv.
        label: What people call it, in the line of an epoch and in the report.
        form: How it is written, a format specification.
        percent: It is a percentage, the higher the better; the report draws all of these in one chart.
        in_bar: The bar shows its last value while the run goes on.
        in_line: The line of an epoch shows it.
    """

    def __init__(
        self,
        column: str,
        label: str,
        form: str,
        *,
        percent: bool = False,
        in_bar: bool = False,
        in_line: bool = True,
    ) -> None:
        self.column, self.label, self.form, self.percent = column, label, form, percent
        self.in_bar, self.in_line = in_bar, in_line
        self.reset()

    @property
    def gathering(self) -> Gathering:
        """What gathers for it: itself, or what it shares with others."""
        return self

    @property
    def sign(self) -> int:
        """1 where more is better, as of a percentage; -1 where less is."""
        return 1 if self.percent else -1

    def text(self, value: float) -> str:
        """The value with its label."""
        return f"{self.label} {value:{self.form}}"

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


class Predictions(Gathering):
    """The most likely class of each sample and its probability, counted per class and per bin of confidence.

    Batches leave three numbers per sample on the device; all else is done once, in `merge`. A sample whose largest logit
    is not finite has no prediction: it is a sample of its class and no hit, and stands in no bin and no cell.

    Args:
        confusion: Keep the confusion matrix too.

    Attributes:
        samples: Of each class, (K,) counts.
        predicted: How often each class was predicted, (K,) counts.
        hits: How often it was so rightly, (K,) counts.
        confusion: Counts (K, K), by class and predicted class; None unless asked for, or of more than `MOST_CLASSES`.
        bins: (3, `BINS`) in float64: samples, hits, and the sum of confidences, of each bin.
    """

    BINS = 15
    """Of equal width, (0, 1/15] to (14/15, 1], as in Guo et al. 2017 (arXiv 1706.04599)."""

    MOST_CLASSES = 5000
    """Of a confusion matrix, which takes 8 K^2 bytes, and as much again between processes: 200 MB for 5,000 classes."""

    def __init__(self, *, confusion: bool = False) -> None:
        self.with_confusion = confusion
        self.reset()

    def reset(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []  # of each batch (B,): confidences, predictions, targets
        self.classes = 0
        self.samples = self.predicted = self.hits = torch.zeros(0, dtype=torch.int64)
        self.confusion: Tensor | None = None
        self.bins = torch.zeros(3, self.BINS, dtype=torch.float64)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        logits = logits.detach()
        largest, predicted = logits.max(dim=1)
        confidence = (largest - logits.logsumexp(dim=1)).exp()
        self.parts.append((confidence, predicted, targets))
        self.classes = logits.shape[1]

    def merge(self, world: World) -> None:
        # a process that saw no batch does not know how many classes there are
        known = torch.zeros(world.size, dtype=torch.float64)
        known[world.rank] = self.classes
        classes = self.classes = int(world.sum(known).max())
        per_class, bins, pairs = self._own_counts(classes)
        sent = [per_class, bins, *([] if pairs is None else [pairs])]
        total = world.sum(torch.cat([part.flatten().double() for part in sent])).cpu()
        parts = total.split([part.numel() for part in sent])
        self.samples, self.predicted, self.hits = parts[0].reshape(3, classes).long()
        self.bins = parts[1].reshape(3, self.BINS)
        self.confusion = None if pairs is None else parts[2].reshape(classes, classes).long()
        self.parts = []

    def _own_counts(self, classes: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """This process's counts: (3, K) of classes, (3, `BINS`) of bins, (K, K) of pairs."""
        empty = torch.zeros(0)
        confidence, predicted, targets = (
            torch.cat(part).cpu() for part in (zip(*self.parts, strict=True) if self.parts else [[empty]] * 3)
        )
        predicted, targets = predicted.long(), targets.long()
        samples, known = targets, confidence.isfinite()
        confidence, predicted, targets = confidence[known], predicted[known], targets[known]
        right = predicted == targets
        per_class = torch.stack([part.bincount(minlength=classes) for part in (samples, predicted, targets[right])])
        edges = torch.linspace(0, 1, self.BINS + 1)[1:-1]
        place = torch.bucketize(confidence, edges)  # the first edge that is not below it
        weights = (torch.ones_like(confidence), right, confidence)
        bins = torch.stack([place.bincount(weight.double(), minlength=self.BINS) for weight in weights])
        if not self.with_confusion or classes > self.MOST_CLASSES:
            return per_class, bins, None
        pairs = (targets * classes + predicted).bincount(minlength=classes**2)
        return per_class, bins, pairs.reshape(classes, classes)

    def recall(self) -> Tensor:
        """Share of each class that was recognised, (K,) in float64; NaN for a class without samples."""
        return self.hits.double() / self.samples


class OfPredictions(Metric):
    """A number that is no mean over samples but follows from the counts of `Predictions`.

    Args:
        predictions: Shared by several, so that each batch is looked at once.
        measure: The number.
        rest: See `Metric`.
    """

    def __init__(
        self,
        column: str,
        label: str,
        measure: Callable[[Predictions], float],
        predictions: Predictions,
        *,
        percent: bool = False,
        in_line: bool = True,
    ) -> None:
        self.measure, self.predictions = measure, predictions
        super().__init__(column, label, "6.2f", percent=percent, in_line=in_line)

    @property
    def gathering(self) -> Gathering:
        return self.predictions

    def reset(self) -> None:
        self.predictions.reset()

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.predictions.update(logits, targets)

    def merge(self, world: World) -> None:
        self.predictions.merge(world)

    def value(self) -> float:
        return self.measure(self.predictions)


def balanced_accuracy(predictions: Predictions) -> float:
    """The mean of the recalls, in percent, over the classes that have samples; scikit-learn's `balanced_accuracy_score`."""
    return 100 * predictions.recall()[predictions.samples > 0].mean().item()


def macro_f1(predictions: Predictions) -> float:
    """The mean of the classes' F1, in percent: scikit-learn's `f1_score(average="macro", zero_division=0)`.

    Over the classes that have samples or were predicted: one that was predicted without having any counts as 0.
    """
    total = predictions.samples + predictions.predicted
    return 100 * (2 * predictions.hits.double() / total)[total > 0].mean().item()


def calibration_error(predictions: Predictions) -> float:
    """Expected calibration error in percent: how far confidence and accuracy are apart, on average over samples (ECE)."""
    samples, hits, confidences = predictions.bins
    return 100 * ((hits - confidences).abs().sum() / samples.sum()).item()


def among_top(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Counts the samples whose class is among the `count` with the largest logits, of which the largest must be finite."""

    def hits(logits: Tensor, targets: Tensor) -> Tensor:
        largest, top = logits.topk(min(count, logits.shape[1]), dim=1)  # (B, count); NaN is the largest of all
        return ((top == targets[:, None]) & largest[:, :1].isfinite()).sum()

    return hits


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy without smoothing."""
    return cross_entropy(logits, targets, reduction="sum")


PREDICTIONS = Predictions()

METRICS: Sequence[Metric] = (
    Mean("val_loss", "val loss", summed_loss),
    Mean("val_top1", "top-1", among_top(1), form="6.2f", percent=True, in_bar=True),
    Mean("val_top5", "top-5", among_top(5), form="6.2f", percent=True),
    OfPredictions("val_balanced", "balanced", balanced_accuracy, PREDICTIONS, percent=True),
    OfPredictions("val_macro_f1", "macro-F1", macro_f1, PREDICTIONS, percent=True, in_line=False),
    OfPredictions("val_ece", "ECE in %", calibration_error, PREDICTIONS, in_line=False),
)


def evaluation_metrics() -> tuple[list[Metric], Predictions]:
    """`METRICS` for an evaluation outside a run, apart from those of any run.

    Returns:
        The metrics, their columns without `val_`, and the loss as `nll`, which it is; and the predictions that come out
        of the same pass, with recalls and confusion matrix.
    """
    metrics, predictions = copy.deepcopy((list(METRICS), PREDICTIONS))  # one copy, so that they still share
    predictions.with_confusion = True
    for metric in metrics:
        metric.reset()
        metric.column = metric.column.removeprefix("val_")
        if metric.column == "loss":
            metric.column, metric.label = "nll", "NLL"
    return metrics, predictions


def known_column(column: str) -> str:
    """The column, where it is that of a metric in metrics.csv.

    Raises:
        ValueError: It is not.
    """
    known = [metric.column for metric in METRICS]
    if column not in known:
        raise ValueError(f"expected {' or '.join(map(repr, known))}, got {column!r}{nearest(column, known)}")
    return column


def sign_of(column: str) -> int:
    """`Metric.sign` of the metric with this column in metrics.csv."""
    return next(metric.sign for metric in METRICS if metric.column == column)
