"""What is minimised: the config's section `loss`, and the loss built from it. Of torch, timm and torchvision.

The loss of a batch is the mean over its samples, each times the weight of its class. It is divided by the number of samples
and not by the sum of their weights, as torch's CrossEntropyLoss does with classes (with shares it does as we do): so the
gradient of a step is the same in one batch, in several that are accumulated, and over any number of processes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torchvision.ops import sigmoid_focal_loss

from files.errors import ConfigError, FieldError
from files.words import counted
from training.data.augment import AugmentSection
from training.section import Fraction, Section

_KEYS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "bce": ("bce_target_threshold", "bce_sum_classes", "bce_pos_weight"),
    "focal": ("gamma", "alpha"),
}


class LossSection(Section):
    """What is minimised. Label smoothing, mixup and cutmix belong to `augment` and work with every loss."""

    name: Literal["cross_entropy", "bce", "focal"] = Field(
        default="cross_entropy",
        description="cross_entropy: of the softmax. bce: binary cross entropy of each class, timm's. focal: the same, where "
        "what is easy counts less, torchvision's, summed over classes.",
    )
    class_weights: Literal["auto"] | list[float] | None = Field(
        default=None,
        description="How much a sample of each class counts: one number per class, in the order of the classes. auto: n / "
        "(K n_c), of n samples in K classes with n_c each: 1 on average over samples. Default: all count alike.",
    )
    bce_target_threshold: Fraction | None = Field(
        default=None, description="bce only: shares above it become 1, others 0. Default: shares as they are."
    )
    bce_sum_classes: bool | None = Field(
        default=None, description="bce only: sum over classes, not their mean. Default false."
    )
    bce_pos_weight: float | None = Field(
        default=None, gt=0, description="bce only: factor on the part of the loss where the class is the right one."
    )
    gamma: float | None = Field(
        default=None,
        ge=0,
        description="focal only: how much less counts what is easy: 0 (as much), or at least 1. Default 2.",
    )
    alpha: float | None = Field(
        default=None,
        description="focal only: weight of the right class, in [0, 1], and 1 - alpha of the others; -1: none. Default 0.25.",
    )

    @model_validator(mode="after")
    def _check(self) -> "LossSection":
        own = _KEYS[self.name]
        for key in (key for keys in _KEYS.values() for key in keys if key not in own):
            if getattr(self, key) is not None:
                of = next(name for name, keys in _KEYS.items() if key in keys)
                raise FieldError(key, f"has no effect with name {self.name!r}, only with {of!r}")
        # Defaults of the loss are filled in, so that the saved configuration says what ran.
        for key, value in {"bce_sum_classes": False, "gamma": 2.0, "alpha": 0.25}.items():
            if key in own and getattr(self, key) is None:
                setattr(self, key, value)
        if self.gamma is not None and 0 < self.gamma < 1:  # its gradient has no end where a class is surely recognised
            raise FieldError("gamma", f"must be 0 or at least 1, got {self.gamma:g}: between them gradients become NaN")
        if self.alpha is not None and self.alpha != -1 and not 0 <= self.alpha <= 1:
            raise FieldError("alpha", f"must be in [0, 1], or -1 for none, got {self.alpha:g}")
        if isinstance(self.class_weights, list):
            negative = next((w for w in self.class_weights if w < 0), None)
            if negative is not None:
                raise FieldError("class_weights", f"each must be at least 0, got {negative:g}")
            if not any(self.class_weights):
                raise FieldError("class_weights", "one of them must be greater than 0, or nothing is learned")
        return self

    @property
    def in_words(self) -> str:
        """What is not torch's plain cross entropy; empty for that."""
        given = self.model_dump(exclude_none=True)
        if isinstance(self.class_weights, list):
            given["class_weights"] = f"from {min(self.class_weights):g} to {max(self.class_weights):g}"
        words = [f"{key} {value}".replace("_", " ") for key, value in given.items() if key != "name"]
        return ", ".join([self.name, *words]) if words or self.name != "cross_entropy" else ""


def class_weights(section: LossSection, samples_per_class: Sequence[int], num_classes: int) -> Tensor | None:
    """The weight of each class, (num_classes,) in float32; None where all count alike.

    Args:
        section: Of the config.
        samples_per_class: Of the training data.
        num_classes: Of the model, which may have more than the data.

    Raises:
        ConfigError: The list given has another length.
    """
    given = section.class_weights
    if given is None:
        return None
    if given != "auto":
        if len(given) != num_classes:
            raise ConfigError(
                f"loss.class_weights: {counted(len(given), 'number')} for {counted(num_classes, 'class')}; "
                "one per class is needed, or auto"
            )
        return torch.tensor(given)
    counts = torch.zeros(num_classes, dtype=torch.float64)
    counts[: len(samples_per_class)] = torch.tensor(samples_per_class, dtype=torch.float64)
    there = counts > 0  # of the others nothing is to be learned
    return torch.where(there, counts.sum() / (there.sum() * counts), 0.0).float()


class _WeightedCrossEntropy(nn.Module):
    """torch's cross entropy with a weight on the term of each class, divided by the number of samples."""

    weights: Tensor

    def __init__(self, weights: Tensor, *, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weights", weights)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = cross_entropy(logits, targets, self.weights, reduction="sum", label_smoothing=self.smoothing)
        return loss / len(logits)


class _BinaryOfSamples(BinaryCrossEntropy):
    """timm's binary cross entropy of each sample, (B,): the sum or the mean over classes."""

    def __init__(self, *, over_classes: Callable[..., Tensor], **options: Any) -> None:
        super().__init__(reduction="none", **options)
        self.over_classes = over_classes

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.over_classes(super().forward(x, target), dim=1)


class _FocalOfSamples(nn.Module):
    """torchvision's focal loss (Lin et al. 2017, arXiv 1708.02002) of each sample, summed over classes, (B,)."""

    def __init__(self, *, gamma: float, alpha: float, smoothing: float) -> None:
        super().__init__()
        self.gamma, self.alpha, self.smoothing = gamma, alpha, smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            classes = logits.shape[1]
            targets = one_hot(targets, classes) * (1 - self.smoothing) + self.smoothing / classes  # (B, K)
        return sigmoid_focal_loss(logits, targets.to(logits.dtype), alpha=self.alpha, gamma=self.gamma).sum(dim=1)


class _MeanOfSamples(nn.Module):
    """The mean over samples of a loss, each times the weight of its class: of shares, the mean of their weights.

    Args:
        loss: Of logits (B, K) and targets, (B,) classes or (B, K) shares: one number per sample, (B,).
        weights: Of the classes, (K,).
    """

    weights: Tensor

    def __init__(self, loss: nn.Module, weights: Tensor) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("weights", weights)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = self.weights[targets] if targets.ndim == 1 else targets.to(self.weights.dtype) @ self.weights  # (B,)
        return (self.loss(logits, targets) * weights).mean()


def build_loss(
    section: LossSection, augment: AugmentSection, *, mixed: bool, num_classes: int, weights: Tensor | None = None
) -> nn.Module:
    """The mean loss of a batch, of logits (B, K) in float32 and targets: (B,) classes or (B, K) shares.

    Args:
        section: Says which loss.
        augment: Says the label smoothing.
        mixed: Targets come from the mixer, which has smoothed them already.
        num_classes: K.
        weights: Of the classes, see `class_weights`.
    """
    smoothing = 0.0 if mixed else augment.label_smoothing
    if section.name == "cross_entropy":
        if weights is None:
            return nn.CrossEntropyLoss(label_smoothing=smoothing)
        return _WeightedCrossEntropy(weights, smoothing=smoothing)
    all_alike = torch.ones(num_classes) if weights is None else weights
    if section.name == "focal":
        assert section.gamma is not None and section.alpha is not None
        return _MeanOfSamples(_FocalOfSamples(gamma=section.gamma, alpha=section.alpha, smoothing=smoothing), all_alike)
    binary = _BinaryOfSamples(
        over_classes=torch.sum if section.bce_sum_classes else torch.mean,
        smoothing=smoothing,
        target_threshold=section.bce_target_threshold,
        pos_weight=section.bce_pos_weight,
    )
    return _MeanOfSamples(binary, all_alike)
