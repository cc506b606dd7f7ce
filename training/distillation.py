"""Distillation: a trained teacher's opinion of each training image is part of the loss.

soft: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (https://arxiv.org/abs/1503.02531): the divergence
of the student's probabilities from the teacher's, both at temperature T, times T^2, as a mean over images (DeiT's code
divides by the number of classes as well). hard: Touvron et al. 2021, DeiT (https://arxiv.org/abs/2012.12877): cross
entropy with the class that the teacher gives; without its distillation token, so that any student will do.

The teacher sees what the student sees, mixed and augmented alike, in its own normalisation and at its own size. It is in no
checkpoint; its hash is, and a run goes on with the same teacher only.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files.errors import ConfigError
from files.words import counted
from models.factory import class_difference, class_names_of, create_model
from models.loading import trained_config, trained_foreign
from models.weights import load_weights, weights_sha256
from training.config import RuntimeSection
from training.processor import speed_up
from training.recipe import DistillSection

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits (B, K) and targets, (B,) classes or (B, K) shares."""


class NoTeacher:
    """The loss as it is."""

    identity: dict[str, Any] | None = None

    def __call__(self, loss_fn: Loss, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return loss_fn(logits, targets)

    def describe(self) -> str:
        """Nothing to say in the plan."""
        return ""


class Distillation:
    """Adds a teacher's part to any loss: (1 - alpha) * loss + alpha * divergence from the teacher.

    Args:
        section: The config's.
        teacher: A model with `pretrained_cfg`, on the device; put into evaluation mode for good.
        student_cfg: The `pretrained_cfg` of what is trained: how its images are normalised.
        autocast: Precision of the teacher's forward pass; can be entered again and again.

    Attributes:
        identity: What the teacher is known by: its name and the hash of its weights.
    """

    def __init__(
        self,
        section: DistillSection,
        teacher: nn.Module,
        student_cfg: dict[str, Any],
        autocast: AbstractContextManager[Any],
    ) -> None:
        self.section = section
        self.teacher = teacher.eval().requires_grad_(False)
        self.autocast = autocast
        cfg: Any = teacher.pretrained_cfg
        self.channels, *size = cfg["input_size"]
        self.size: Sequence[int] = size
        device = next(teacher.parameters()).device

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device).reshape(-1, 1, 1)  # (C, 1, 1)

        # (x * std + mean - theirs) / their std, in one multiplication and one addition
        scale = column(student_cfg["std"]) / column(cfg["std"])
        shift = (column(student_cfg["mean"]) - column(cfg["mean"])) / column(cfg["std"])
        self.affine = (scale, shift) if (scale != 1).any() or (shift != 0).any() else None
        self.identity: dict[str, Any] | None = {
            "name": section.teacher,
            "weights_sha256": weights_sha256(teacher.state_dict()),
        }

    def __call__(self, loss_fn: Loss, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The whole loss of a batch.

        Args:
            loss_fn: The loss without a teacher.
            images: As the student sees them, (B, C, H, W).
            logits: The student's, (B, K), float32.
            targets: For `loss_fn`.
        """
        with torch.no_grad(), self.autocast:
            opinion = self.teacher(self._as_it_sees(images))
        return (1 - self.section.alpha) * loss_fn(logits, targets) + self.section.alpha * self._part(
            logits, opinion.float()
        )

    def _part(self, logits: Tensor, opinion: Tensor) -> Tensor:
        if self.section.kind == "hard":
            return F.cross_entropy(logits, opinion.argmax(dim=1))
        t = self.section.temperature
        own, theirs = (logits / t).log_softmax(dim=1), (opinion / t).log_softmax(dim=1)
        return F.kl_div(own, theirs, reduction="batchmean", log_target=True) * t**2

    def _as_it_sees(self, images: Tensor) -> Tensor:
        """Images in the teacher's channels, normalisation and size."""
        if self.affine is not None:
            images = images * self.affine[0] + self.affine[1]  # grey images take the channels of mean: (B, 3, H, W)
        images = images.expand(-1, self.channels, -1, -1)
        if list(images.shape[-2:]) != list(self.size):
            images = F.interpolate(images, list(self.size), mode="bicubic", antialias=True)
        return images

    def describe(self) -> str:
        """A line of the plan."""
        assert self.identity is not None
        section, count = self.section, sum(p.numel() for p in self.teacher.parameters())
        how = f"{section.kind}, alpha {section.alpha:g}"
        how += f", temperature {section.temperature:g}" if section.kind == "soft" else ""
        return (
            f"teacher   {section.teacher}: {count / 1e6:.3g} M parameters, weights {self.identity['weights_sha256'][:12]}, "
            f"images of {' x '.join(map(str, self.size))}; {how}"
        )


def build_distillation(
    section: DistillSection,
    student: Any,
    class_names: Sequence[str],
    *,
    device: torch.device,
    memory_format: torch.memory_format,
    runtime: RuntimeSection,
    autocast: AbstractContextManager[Any],
) -> Distillation | NoTeacher:
    """The teacher that the config asks for, loaded and checked against the student.

    Raises:
        ConfigError: There is no such teacher or it has no weights; its classes or channels are others.
    """
    if section.teacher is None:
        return NoTeacher()
    teacher = _load_teacher(section)
    if teacher.num_classes != student.num_classes:
        raise ConfigError(
            f"distill.teacher: {section.teacher} has {counted(teacher.num_classes, 'class')}, this run "
            f"{student.num_classes}; fine-tune the teacher on this data first"
        )
    names = class_names_of(teacher)
    if names is not None and (difference := class_difference(names, list(class_names))):
        raise ConfigError(f"distill.teacher: {section.teacher} was trained on other classes: {difference}")
    channels, own = teacher.pretrained_cfg["input_size"][0], student.pretrained_cfg["input_size"][0]
    if channels != own and own != 1:
        raise ConfigError(f"distill.teacher: {section.teacher} takes {channels} channels, this run's images have {own}")
    speed_up(teacher, runtime, device)
    teacher.to(device, memory_format=memory_format)
    return Distillation(section, teacher, student.pretrained_cfg, autocast)


def _load_teacher(section: DistillSection) -> Any:
    """The model with its weights, by name or from where a run or timm left it."""
    assert section.teacher is not None
    path = Path(section.teacher)
    try:
        if not path.exists():
            if not section.pretrained and section.checkpoint is None:
                raise ConfigError(
                    f"{section.teacher} is no file or folder, and as a model's name it needs weights: "
                    "distill.pretrained=true or distill.checkpoint"
                )
            return create_model(section.teacher, pretrained=section.pretrained, checkpoint=section.checkpoint)
        if section.pretrained or section.checkpoint is not None:
            raise ConfigError(f"{path} has weights; leave out pretrained and checkpoint")
        path = path / "best" if (path / "best").is_dir() else path
        _, saved = load_weights(path)
        foreign = trained_foreign(saved or {})
        if foreign is not None:
            name, arguments = foreign
            return create_model(name, checkpoint=path, **arguments)
        config = trained_config(saved or {}, str(path))
        if config is None:
            raise ConfigError(f"{path} does not say of which model it is; give its name, and distill.checkpoint={path}")
        return create_model(config, checkpoint=path)
    except ConfigError as error:
        raise ConfigError(f"distill.teacher: {error}") from None
