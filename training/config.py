"""The schema of a training run: configs/train/*.yaml and overrides such as `optim.epochs=3` -> TrainConfig.

One self-contained file per run. Types are strict (an integer may stand for a number, nothing else is converted), NaN
and infinity are refused, and an unknown key, or one without effect where it stands, is an error with its line.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, field_validator, model_validator
from timm.optim import list_optimizers  # pyright: ignore[reportPrivateImportUsage]

from configs import CONFIGS
from files.errors import ConfigError, FieldError, nearest
from files.strict_yaml import annotation_at, dump_yaml, known_keys, load_yaml, set_overrides, unknown_key, validate
from layers.rates import ProfileName, RateIs
from layers.schedule import SETTINGS, DropPathSchedule, Kind
from training.data.augment import AugmentSection
from training.data.section import DataSection
from training.loss import LossSection
from training.lr_schedule import LrScheduleName, check_schedule, known_schedule
from training.recipe import DistillSection, EarlyStoppingSection, FreezeSection, LogSection
from training.section import Fraction, Pair, Section

DEFAULT_CONFIG: Path = CONFIGS / "train" / "digits.yaml"


class ModelSection(Section):
    """What to train. Any further key overrides the model's own configuration, for example `depths: [1, 1, 1, 1]`."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        min_length=1,
        description="A registered model (see list_models), the path of a model's YAML, timm/NAME or torchvision/NAME.",
    )
    num_classes: int | None = Field(default=None, ge=1, description="Classes of the head. Default: those of the data.")
    pretrained: bool = Field(default=False, description="Start from published weights, downloaded through timm.")
    checkpoint: str | None = Field(
        default=None, description="Start from these weights: a run's best folder or a weights file."
    )

    @property
    def overrides(self) -> dict[str, Any]:
        """The further keys; `create_model` checks them against the model's configuration."""
        return dict(self.model_extra or {})


class ScheduleSection(Section):
    """How the drop-path rates change over training: a multiplier of every rate, moved at each optimizer step."""

    kind: Kind = Field(
        default="constant",
        description="constant: 1 throughout. ramp, cosine: from start to end. early: from 1 to 0 at the cutoff. "
        "late: 0, then 1 from the cutoff. piecewise: linear between points.",
    )
    cutoff_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Epochs; needed by early and late. ramp and cosine: where end is reached, default the end.",
    )
    shape: Literal["linear", "constant"] | None = Field(
        default=None, description="early only: fall linearly to the cutoff, or stay at 1 until it. Default linear."
    )
    start: Fraction | None = Field(
        default=None, description="ramp and cosine: multiplier at the first step, default 0."
    )
    end: Fraction | None = Field(default=None, description="ramp and cosine: multiplier that is reached, default 1.")
    points: list[Pair] | None = Field(
        default=None, min_length=1, description="piecewise only: [epoch, multiplier] pairs, epochs rising from 0."
    )

    @model_validator(mode="after")
    def _check(self) -> "ScheduleSection":
        allowed = [f"{name}_epochs" if name == "cutoff" else name for name in SETTINGS[self.kind]]
        for key in type(self).model_fields:
            if key not in ("kind", *allowed) and getattr(self, key) is not None:
                which = f"its keys are {', '.join(allowed)}" if allowed else "it takes no further key"
                raise FieldError(key, f"has no effect with kind {self.kind!r}; {which}", beside="kind")
        # what rises or falls to an end has the whole run for it by default
        if "cutoff_epochs" in allowed and "end" not in allowed and self.cutoff_epochs is None:
            raise FieldError("kind", f"{self.kind!r} needs cutoff_epochs: epochs, greater than 0")
        if "points" in allowed:
            self._check_points()
        # Defaults of the kind are filled in, so that the saved configuration says what ran.
        if "shape" in allowed and self.shape is None:
            self.shape = "linear"
        if "end" in allowed:
            self.start = 0.0 if self.start is None else self.start
            self.end = 1.0 if self.end is None else self.end
        return self

    def _check_points(self) -> None:
        if self.points is None:
            raise FieldError("kind", f"{self.kind!r} needs points: [epoch, multiplier] pairs such as [[0, 0], [9, 1]]")
        epochs = [epoch for epoch, _ in self.points]
        if epochs[0] != 0 or any(b <= a for a, b in pairwise(epochs)):
            raise FieldError("points", f"epochs must rise strictly from 0, got {epochs}")
        if not all(0 <= multiplier <= 1 for _, multiplier in self.points):
            raise FieldError("points", f"multipliers must be in [0, 1], got {[m for _, m in self.points]}")


class DropPathSection(Section):
    """Stochastic depth: how often which block is dropped."""

    rate: Fraction | None = Field(
        default=None,
        description="In [0, 1]; see rate_is. Default: the rate published for training the model, or where the run starts "
        "from weights for fine-tuning it; else 0.",
    )
    profile: ProfileName | list[Fraction] = Field(
        default="linear",
        description="How the rate is spread over depth, or one rate in [0, 1] per block, first to last.",
    )
    rate_is: RateIs = Field(
        default="max",
        description="What rate measures: the largest rate, the mean over blocks, or the share of compute dropped.",
    )
    mode: Literal["mask", "skip", "batch"] = Field(
        default="mask",
        description="mask: compute, then zero. skip: do not compute dropped samples. batch: one draw per batch.",
    )
    break_even: Fraction | dict[str, Fraction] | None = Field(
        default=None,
        description="Rate from which skipping pays; below it, skip masks: one, or by kind of branch. Default: measured.",
    )
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)


def build_schedule(section: DropPathSection, steps_per_epoch: int, epochs: int) -> DropPathSchedule:
    """The config's schedule, given in epochs, in optimizer steps."""
    schedule = section.schedule
    cutoff_epochs = schedule.cutoff_epochs
    if "end" in SETTINGS[schedule.kind] and cutoff_epochs is None:
        cutoff_epochs = epochs
    given: dict[str, Any] = {
        "cutoff": None if cutoff_epochs is None else max(1, round(cutoff_epochs * steps_per_epoch)),
        "shape": schedule.shape,
        "start": schedule.start,
        "end": schedule.end,
        "points": schedule.points and tuple((round(epoch * steps_per_epoch), m) for epoch, m in schedule.points),
    }
    return DropPathSchedule(kind=schedule.kind, **{key: value for key, value in given.items() if value is not None})


class OptimSection(Section):
    """Optimizer and learning rate; any optimizer of timm."""

    name: str = Field(default="adamw", description="A name of timm.optim.list_optimizers().")
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate, for the batch as it is: nothing is scaled.")
    weight_decay: float = Field(default=0.05, ge=0, description="Not applied to biases, norms and scales.")
    epochs: int = Field(default=300, ge=1, description="Passes over the training data.")
    warmup_epochs: float = Field(default=5.0, ge=0, description="Epochs of linear warm-up, part of epochs.")
    warmup_lr: float = Field(default=1e-6, ge=0, description="Learning rate at the first step of the warm-up.")
    min_lr: float = Field(default=1e-6, ge=0, description="Learning rate that schedules fall to.")
    schedule: LrScheduleName = Field(
        default="cosine",
        description="After the warm-up, by timm's names: cosine, tanh and poly fall to min_lr; step and "
        "multistep multiply by decay_rate; wsd and rsqrt hold, then decay; constant.",
    )
    decay_epochs: float | None = Field(
        default=None,
        gt=0,
        description="step: epochs between two decays. wsd, rsqrt: epochs of the decay, default a fifth.",
    )
    decay_milestones: list[float] | None = Field(
        default=None,
        min_length=1,
        description="multistep: epochs after which the rate is lowered, from the run's start.",
    )
    decay_rate: float | None = Field(
        default=None, gt=0, description="step, multistep: factor, default 0.1. poly: the power."
    )
    cooldown_epochs: float | None = Field(
        default=None, ge=0, description="Epochs at min_lr at the end, part of epochs. Of schedules that fall to it."
    )
    cycle_limit: int | None = Field(
        default=None, ge=1, le=1000, description="cosine, tanh, poly: cycles that the run is divided into, default 1."
    )
    cycle_mul: float | None = Field(default=None, ge=1, description="Length of a cycle over the one before, default 1.")
    cycle_decay: float | None = Field(
        default=None, gt=0, le=1, description="Peak of a cycle over that before, default 1."
    )
    k_decay: float | None = Field(default=None, gt=0, le=10, description="cosine, poly: k of k-decay, default 1.")
    clip_grad: float | None = Field(
        default=None, gt=0, description="Largest norm of all gradients together. Default: no limit."
    )
    accumulate: int = Field(
        default=1, ge=1, description="Forward passes per optimizer step; an epoch of fewer batches is one step."
    )
    layer_decay: float | None = Field(
        default=None, gt=0, le=1, description="Factor on lr per layer, from the head down."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of optimizers that have one.")
    betas: Pair | None = Field(
        default=None, description="Of the Adam family, each in [0, 1). Default: the optimizer's."
    )
    eps: float | None = Field(default=None, gt=0, description="Of the Adam family. Default: the optimizer's.")
    on_non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="A loss or gradient that is not finite. stop: before the step, naming samples. skip: all processes leave "
        "the step out; the run folder's non_finite.csv lists them.",
    )
    max_non_finite: int | None = Field(
        default=None, ge=1, description="on_non_finite 'skip' only: steps left out before the run stops. Default 10."
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        known = [str(n) for n in list_optimizers()]
        if name not in known:
            raise ValueError(
                f"unknown optimizer {name!r}{nearest(name, known)} (timm.optim.list_optimizers() has them all)"
            )
        return name

    @field_validator("schedule", mode="before")
    @classmethod
    def _check_schedule(cls, schedule: Any) -> Any:
        return known_schedule(schedule)

    @model_validator(mode="after")
    def _check(self) -> "OptimSection":
        if self.betas and not all(0 <= b < 1 for b in self.betas):
            raise FieldError("betas", f"each must be in [0, 1), got {self.betas}")
        if self.on_non_finite == "skip":
            self.max_non_finite = self.max_non_finite or 10
        elif self.max_non_finite is not None:
            raise FieldError("max_non_finite", "has no effect with on_non_finite 'stop'; set optim.on_non_finite=skip")
        if self.warmup_epochs > self.epochs:
            raise FieldError(
                "warmup_epochs",
                f"must be at most optim.epochs ({self.epochs}), got {self.warmup_epochs:g}",
                beside="epochs",
            )
        check_schedule(self)
        return self


class EmaSection(Section):
    """A moving average of the weights, evaluated and saved in place of the raw ones."""

    enabled: bool = Field(default=False, description="Keep it.")
    decay: float = Field(default=0.9999, gt=0, lt=1, description="Weight of the old average at each optimizer step.")
    warmup: bool = Field(
        default=False, description="Let decay rise to its value, so that short runs forget their start."
    )


Compile: TypeAlias = Literal["blocks"] | bool


class RuntimeSection(Section):
    """Where and how to compute; what is learned does not depend on it, but for rounding."""

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N or mps. auto: the best there is.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of autocast. auto: bfloat16 where the device is fast at it (GPUs since Ampere, CPUs with AVX512-BF16 or "
        "AMX), else float32 (older GPUs: float16). config.yaml of a run says what it came to, and a resumed run keeps that.",
    )
    channels_last: Literal["auto"] | bool = Field(default="auto", description="Memory format. auto: on CUDA.")
    compile: Compile = Field(
        default=False,
        description="torch.compile. true: the model, as a whole. blocks: each residual block by itself; those that are alike "
        "share what is compiled, so that the time to compile does not grow with depth.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="Of several processes. ddp: each holds the whole model. fsdp: each holds a piece of weights, gradients "
        "and optimizer state (torch's FSDP2), for models that need it.",
    )
    deterministic: bool = Field(default=False, description="Deterministic algorithms only; slower on CUDA.")
    tf32: bool = Field(default=True, description="TF32 matrix products for float32 on CUDA.")
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        default="auto",
        description="CPU threads per process. auto: OMP_NUM_THREADS where it is set, else the cores there are, shared out "
        "between the processes. A small model gains nothing from more than 1, which also suffers least beside others.",
    )
    fast_paths: bool = Field(
        default=True,
        description="In eager code, of any model: faster forms that are equal but for rounding and keep less for backward. "
        "On a CPU of linear layers, activations, norms, depthwise convolutions, attention, pooling and scales; on a GPU of "
        "norms, pooling, StarReLU, depthwise convolutions and of taking and adding samples. false: torch's plain operators.",
    )
    keep_memory: bool = Field(
        default=True,
        description="On Linux, train.py: freed memory stays with the process, which saves fetching it again at each step. "
        "false: as the C library does it, which holds less between steps.",
    )
    timeout_minutes: float = Field(
        default=10.0, gt=0, le=10_080, description="How long a process waits for the others before the run ends."
    )

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        known = ["auto", "cpu", "cuda", "cuda:0", "mps"]
        if device not in known and not re.fullmatch(r"cuda:(0|[1-9]\d{0,3})", device):
            raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps, got {device!r}{nearest(device, known)}")
        return device


class CheckpointSection(Section):
    """When the state of the run is saved; it is also saved on SIGTERM and SIGUSR1."""

    every_epochs: int | None = Field(default=1, ge=1, description="Epochs between checkpoints; null: not by epochs.")
    every_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps between checkpoints; null: not by steps."
    )
    keep: int = Field(default=2, ge=1, description="Checkpoints kept; older ones are deleted.")
    background: bool = Field(
        default=True,
        description="true: the state is copied, and training goes on while a thread writes it. false: training waits.",
    )


class TrainConfig(Section):
    """One training run."""

    seed: int = Field(default=0, ge=0, lt=2**32, description="Of weights, order, augmentation and drop path.")
    model: ModelSection
    drop_path: DropPathSection = Field(default_factory=DropPathSection)
    data: DataSection
    augment: AugmentSection = Field(default_factory=AugmentSection)
    loss: LossSection = Field(default_factory=LossSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    ema: EmaSection = Field(default_factory=EmaSection)
    runtime: RuntimeSection = Field(default_factory=RuntimeSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    freeze: FreezeSection = Field(default_factory=FreezeSection)
    early_stopping: EarlyStoppingSection = Field(default_factory=EarlyStoppingSection)
    log: LogSection = Field(default_factory=LogSection)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What the model is built with beside its name and classes: the other keys of `model`, and `data.image_size`."""
        size = self.data.image_size
        return {**self.model.overrides, **({} if size is None else {"image_size": size})}

    @model_validator(mode="after")
    def _check_one_image_size(self) -> "TrainConfig":
        size, of_model = self.data.image_size, self.model.overrides.get("image_size")
        if size is not None and of_model is not None and of_model not in (size, [size, size]):
            raise FieldError(
                "data.image_size",
                f"is {size}, but model.image_size is {of_model}; give one of them, or both alike",
                beside="model.image_size",
            )
        return self

    @model_validator(mode="after")
    def _check_validated_where_needed(self) -> "TrainConfig":
        if self.early_stopping.patience is not None and self.log.validate_every > 1:
            needed = "needs a validation after every epoch: log.validate_every=1"
            raise FieldError("early_stopping.patience", needed, beside="log.validate_every")
        return self

    @model_validator(mode="after")
    def _check_balanced_once(self) -> "TrainConfig":
        if self.data.sampler == "balanced" and self.loss.class_weights == "auto":
            raise FieldError(
                "loss.class_weights",
                "'auto' would do again what data.sampler 'balanced' does; choose one",
                beside="data.sampler",
            )
        return self

    @model_validator(mode="after")
    def _check_schedule_fits(self) -> "TrainConfig":
        schedule, epochs = self.drop_path.schedule, self.optim.epochs
        ends = {"cutoff_epochs": schedule.cutoff_epochs, "points": schedule.points and schedule.points[-1][0]}
        for key, end in ends.items():
            if end is not None and end > epochs:
                told = f"ends at epoch {end:g}, beyond optim.epochs ({epochs})"
                raise FieldError(f"drop_path.schedule.{key}", told, beside="optim.epochs")
        return self

    @model_validator(mode="after")
    def _check_sizes_fit(self) -> "TrainConfig":
        last, epochs = (self.data.image_size_schedule or [[0, 0]])[-1][0], self.optim.epochs
        if last >= epochs:
            told = f"epoch {last} is none of this run's, 0 to {epochs - 1}"
            raise FieldError("data.image_size_schedule", told, beside="optim.epochs")
        return self

    @model_validator(mode="after")
    def _check_freeze_fits(self) -> "TrainConfig":
        frozen, epochs = self.freeze.epochs, self.optim.epochs
        if frozen != "all" and frozen > epochs:
            told = f"{frozen} is beyond optim.epochs ({epochs}); all: the whole run"
            raise FieldError("freeze.epochs", told, beside="optim.epochs")
        return self


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Defaults, then the file, then the overrides in their order; the last word on a key wins.

    Args:
        path: A YAML file; None for the embedded default, `configs/train/digits.yaml`.
        overrides: KEY=VALUE, as in `optim.lr=1e-3`, `model.depths=[1, 1, 1, 1]` or `data.root=/path/of #2`; paths and
            names as they stand, all else in YAML, see `set_overrides`. A section given as a whole,
            `drop_path.schedule={kind: early, cutoff_epochs: 3}`, replaces the file's.

    Raises:
        ConfigError: Naming file and line, or the override, with key, value and what is allowed.
    """
    document = load_yaml(DEFAULT_CONFIG if path is None else path)
    set_overrides(document, overrides, annotation=annotation_of_key, example="optim.epochs=3")
    return validate(TrainConfig, document)


def annotation_of_key(key: str) -> Any:
    """The type of a dotted key that may be overridden, `None` where only the value can tell.

    Raises:
        ConfigError: There is no such key.
    """
    known = known_keys(TrainConfig)
    # model.* may be any key of the model's configuration, which create_model knows.
    if key not in known and not re.fullmatch(r"model(\.\w+)+", key):
        raise ConfigError(unknown_key(key, known))
    return annotation_at(TrainConfig, key)


def dump_config(config: TrainConfig) -> str:
    """YAML with every key, defaults included, that `load_config` reads back to an equal config."""
    return dump_yaml(config.model_dump())


def json_schema() -> dict[str, Any]:
    """JSON schema of a training config, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TrainConfig.model_json_schema()}
