"""Sections of a training config for what is not in every run: distillation, freezing, early stopping, logs."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from files.errors import FieldError
from training.metrics import known_column, sign_of
from training.section import Fraction, Section


class EarlyStoppingSection(Section):
    """Ends a run that no longer improves."""

    patience: int | None = Field(
        default=None, ge=1, description="Epochs in a row without a better value after which the run ends; null: off."
    )
    metric: str = Field(default="val_top1", description="What must improve: a column of metrics.csv that is a metric.")
    mode: Literal["auto", "max", "min"] = Field(
        default="auto",
        description="Whether more is better, or less. auto: less of losses and errors, more of the rest.",
    )
    min_delta: float = Field(default=0.0, ge=0, description="Better is by more than this, in the metric's unit.")

    @field_validator("metric")
    @classmethod
    def _check_metric(cls, metric: str) -> str:
        return known_column(metric)

    @model_validator(mode="after")
    def _check(self) -> "EarlyStoppingSection":
        if self.patience is None and self.min_delta:
            raise FieldError("min_delta", "has no effect without early_stopping.patience")
        return self

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return {"max": 1, "min": -1, "auto": sign_of(self.metric)}[self.mode]


class FreezeSection(Section):
    """Parts of the model that are not trained at first: a linear probe, then fine-tuning; or that are never trained."""

    epochs: Literal["all"] | Annotated[int, Field(ge=0)] = Field(
        default=0, description="The first epochs, in which they are frozen; 0: none. all: the whole run."
    )
    stages: Literal["all"] | Annotated[int, Field(ge=0)] | list[str] = Field(
        default="all",
        description="What is frozen. all: all but the classifier. A number: the stem and so many stages (blocks, where a "
        "model has no stages). A list: parts of the model by name, as in [stem, stages.0].",
    )

    @model_validator(mode="after")
    def _check(self) -> "FreezeSection":
        if self.epochs == 0 and self.stages != "all":
            raise FieldError("stages", "has no effect without freeze.epochs: a number, or all")
        return self


class DistillSection(Section):
    """A trained teacher whose opinion is part of the loss: (1 - alpha) * loss + alpha * distance from the teacher."""

    teacher: str | None = Field(
        default=None,
        min_length=1,
        description="A run's folder, weights beside their config.json, or a model's name as in model.name; null: off.",
    )
    pretrained: bool = Field(default=False, description="A name's published weights, downloaded through timm.")
    checkpoint: str | None = Field(default=None, description="A name's weights: a folder or a file.")
    kind: Literal["soft", "hard"] = Field(
        default="soft", description="soft: the teacher's probabilities (Hinton). hard: the class it gives (DeiT)."
    )
    alpha: Fraction = Field(default=0.5, gt=0, description="The teacher's share of the loss, in (0, 1].")
    temperature: float = Field(
        default=1.0, gt=0, description="soft only: softens both; the distance is times its square."
    )

    @model_validator(mode="after")
    def _check(self) -> "DistillSection":
        if self.teacher is None:
            for name, field in type(self).model_fields.items():
                if getattr(self, name) != field.default:
                    raise FieldError(name, "has no effect without distill.teacher")
        if self.pretrained and self.checkpoint is not None:
            raise FieldError("checkpoint", "and pretrained are two sources of weights; give one")
        if self.kind == "hard" and self.temperature != 1:
            raise FieldError("temperature", "has no effect with kind 'hard'")
        return self


class LogSection(Section):
    """When the figures of an epoch are taken, and where they go besides metrics.csv, TensorBoard and the report."""

    validate_every: int = Field(
        default=1,
        ge=1,
        description="Epochs between two validations; the last epoch is always validated. best/ is the best of those.",
    )

    report: bool = Field(default=True, description="Write report.html at the end; it can be made later all the same.")
    wandb: str | None = Field(
        default=None, min_length=1, description="A project of Weights & Biases (extra wandb); null: not there."
    )
