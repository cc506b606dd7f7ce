"""The config's section `data`: what to train on. Which keys a kind of data has, `training.data.kinds` says."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from files.errors import FieldError, nearest
from training.data.kinds import EXAMPLES, KINDS, DataKind, kind_of, spellings
from training.section import Fraction, Section

EpochAndSize = Annotated[list[int], Field(min_length=2, max_length=2)]


class DataSection(Section):
    """What to train on."""

    dataset: str = Field(
        description=" ".join(f"{name}: {kind.description}." for name, kind in KINDS.items()),
        json_schema_extra={
            "anyOf": [
                {"enum": [name for name, kind in KINDS.items() if not kind.named]},
                *({"pattern": f"^{name}/.+$"} for name, kind in KINDS.items() if kind.named),
            ]
        },
    )
    root: str | None = Field(
        default=None,
        description="Where the data lie; of dataset "
        + ", ".join(name for name, kind in KINDS.items() if "root" in (*kind.needs, *kind.takes))
        + ".",
    )
    train_file: str | None = Field(
        default=None, description="csv: the table of the training part, with a line of column names."
    )
    val_file: str | None = Field(
        default=None, description="csv: that of the validation part; without it, give val_fraction or folds."
    )
    test_file: str | None = Field(
        default=None, description="csv: that of a test part, which training does not look at."
    )
    path_column: str | None = Field(
        default=None,
        description="csv: the column of paths, relative to root or else to the table's folder. Default: path.",
    )
    image_column: str | None = Field(
        default=None, description="huggingface: the column of images. Default: the only one."
    )
    label_column: str | None = Field(
        default=None, description="csv, huggingface: the column of labels. Default: label, or the only one of classes."
    )
    config_name: str | None = Field(
        default=None, description="huggingface: the data set's config, where it has several."
    )
    train_split: str | None = Field(default=None, description="huggingface: the split to train on. Default: train.")
    val_split: str | None = Field(
        default=None,
        description="huggingface: the split to validate on. Default: the first of validation, val, valid and test.",
    )
    train_shards: str | None = Field(
        default=None,
        description="webdataset: shards to train on, as in train-{000..127}.tar, shards/*.tar or https://host/{0..9}.tar; "
        "relative to root. Default: by their names.",
    )
    val_shards: str | None = Field(default=None, description="webdataset: shards to validate on, as train_shards.")
    label_key: str | None = Field(
        default=None, description="webdataset: the key of .json that has the label. Default: .cls, or else `label`."
    )
    image_key: str | None = Field(
        default=None, description="webdataset: the end of the image's name, as in jpg. Default: the only image."
    )
    cache: str | None = Field(
        default=None,
        description="webdataset: the folder that keeps shards fetched from a URL. Default: ~/.cache/drop-path-zoo/shards.",
    )
    download: bool | None = Field(
        default=None, description="torchvision: download what is not in root. Default: never; such data are refused."
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="Pixels, height and width. Default: the model's; where model.image_size is given too, they are equal.",
    )
    image_size_schedule: list[EpochAndSize] | None = Field(
        default=None,
        min_length=1,
        description="[epoch, pixels] pairs, epochs rising from 0: image sizes of training, as in [[0, 128], [5, 160]]. "
        "Validation is at image_size. Default: all at image_size.",
    )
    batch_size: int = Field(default=128, ge=1, description="Samples per process and forward pass.")
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="Samples per process in validation. Default: batch_size."
    )
    workers: int = Field(
        default=4, ge=0, le=1024, description="Loader processes per training process; results do not depend on it."
    )
    sampler: Literal["shuffle", "balanced"] = Field(
        default="shuffle",
        description="What an epoch trains on. shuffle: every image once. balanced: as many images, every class equally "
        "often: images of small classes come several times, each time augmented anew.",
    )
    balance_power: Fraction | None = Field(
        default=None,
        description="sampler 'balanced' only: how far. 1: equally often. 0.5: by the square root of a class's size. "
        "0: as they are. Default 1.",
    )
    decoder: Literal["auto", "torchcodec", "pillow"] = Field(
        default="auto",
        description="What decodes JPEG files; all else Pillow does. auto: torchcodec where it is installed, else Pillow.",
    )
    class_names: list[str] | None = Field(
        default=None, description="Names of the classes, in order: filled in. Where given, the data must have these."
    )
    classes: list[str] | None = Field(
        default=None, min_length=2, description="Classes to keep, in any order; the others are left out. Default: all."
    )
    val_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Of data without a part for validation: the share of each class that is held back for it, chosen by "
        "the samples' names alone.",
    )
    folds: int | None = Field(
        default=None, ge=2, description="As val_fraction, for cross-validation: the number of parts. Needs fold."
    )
    fold: int | None = Field(default=None, ge=0, description="Which of the folds validates, from 0.")
    train_samples: int | None = Field(
        default=None,
        ge=1,
        description="Train on so many samples only, drawn by seed, each class in proportion. Default: all.",
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop",
        description="An image that cannot be read in mid-run. stop: save and stop. skip: another takes its place in "
        "training, validation leaves it out; the run folder's skipped.csv lists them.",
    )
    max_skipped: int | None = Field(
        default=None, ge=1, description="on_error 'skip' only: files skipped before the run stops. Default 100."
    )

    @field_validator("dataset")
    @classmethod
    def _check_dataset(cls, dataset: str) -> str:
        if kind_of(dataset) is None:
            known = [word for name, kind in KINDS.items() for word in spellings(name, kind)]
            raise ValueError(f"expected {' or '.join(map(repr, known))}, got {dataset!r}{nearest(dataset, known)}")
        return dataset

    @field_validator("classes", mode="before")
    @classmethod
    def _numbers_are_names(cls, classes: Any) -> Any:
        if not isinstance(classes, list):
            return classes
        return [str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in classes]

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: list[str] | None) -> list[str] | None:
        for name in classes or []:
            if (classes or []).count(name) > 1:
                raise ValueError(f"{name!r} is listed twice")
        return classes

    @model_validator(mode="after")
    def _check_split(self) -> "DataSection":
        if self.folds is not None and self.val_fraction is not None:
            raise FieldError("folds", "give data.val_fraction or data.folds, not both")
        if self.folds is not None and self.fold is None:
            raise FieldError("folds", f"{self.folds} folds need data.fold, 0 to {self.folds - 1}: which one validates")
        if self.fold is not None and self.folds is None:
            raise FieldError("fold", "has no effect without data.folds; leave it out or set it to null")
        if self.fold is not None and self.folds is not None and self.fold >= self.folds:
            raise FieldError("fold", f"{self.fold} is not one of {self.folds} folds, 0 to {self.folds - 1}")
        return self

    @model_validator(mode="after")
    def _check(self) -> "DataSection":
        kind = self.kind
        for key in kind.needs:
            if not getattr(self, key):
                at = key if key in self.model_fields_set else "dataset"
                raise FieldError(at, f"dataset {self.dataset!r} needs a {key}, for example data.{key}={EXAMPLES[key]}")
        for key in sorted({key for other in KINDS.values() for key in (*other.needs, *other.takes)}):
            if getattr(self, key) is not None and key not in (*kind.needs, *kind.takes):
                told = f"has no effect with dataset {self.dataset!r}; leave it out or set it to null"
                raise FieldError(key, told, beside="dataset")
        if self.image_size_schedule is not None:
            epochs = [epoch for epoch, _ in self.image_size_schedule]
            if epochs[0] != 0 or any(b <= a for a, b in pairwise(epochs)):
                raise FieldError("image_size_schedule", f"epochs must rise strictly from 0, got {epochs}")
            if any(size < 1 for _, size in self.image_size_schedule):
                raise FieldError("image_size_schedule", f"sizes must be at least 1, got {self.image_size_schedule}")
        if kind.in_memory and self.on_error == "skip":
            told = f"'skip' has no effect with dataset {self.dataset!r}, which is in memory"
            raise FieldError("on_error", told, beside="dataset")
        if self.sampler == "balanced":
            self.balance_power = 1.0 if self.balance_power is None else self.balance_power
        elif self.balance_power is not None:
            raise FieldError("balance_power", "has no effect with sampler 'shuffle'; set data.sampler=balanced")
        if kind.in_memory and self.decoder != "auto":
            raise FieldError(
                "decoder",
                f"has no effect with dataset {self.dataset!r}, which is in memory; leave it out",
                beside="dataset",
            )
        if self.on_error == "skip":
            self.max_skipped = self.max_skipped or 100
        elif self.max_skipped is not None:
            raise FieldError("max_skipped", "has no effect with on_error 'stop'; set data.on_error=skip")
        return self

    @property
    def kind(self) -> DataKind:
        """The kind of data."""
        kind = kind_of(self.dataset)
        assert kind is not None, "checked above"
        return kind
