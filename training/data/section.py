"""The config's section `data`: what to train on. Which keys a kind of data has, `training.data.kinds` says."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from files.errors import FieldError, nearest
from training.data.kinds import EXAMPLES, KINDS, DataKind, kind_of
from training.section import Section


class DataSection(Section):
    """What to train on."""

    dataset: str = Field(
        description=" ".join(f"{name}: {kind.description}." for name, kind in KINDS.items()),
        json_schema_extra={"enum": list(KINDS)},
    )
    root: str | None = Field(
        default=None,
        description="Where the data lie; of dataset "
        + ", ".join(name for name, kind in KINDS.items() if "root" in (*kind.needs, *kind.takes))
        + ".",
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="Pixels, height and width. Default: the model's; where model.image_size is given too, they are equal.",
    )
    batch_size: int = Field(default=128, ge=1, description="Samples per process and forward pass.")
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="Samples per process in validation. Default: batch_size."
    )
    workers: int = Field(
        default=4, ge=0, description="Loader processes per training process; results do not depend on it."
    )
    decoder: Literal["auto", "torchcodec", "pillow"] = Field(
        default="auto",
        description="What decodes JPEG files; all else Pillow does. auto: torchcodec where it is installed, else Pillow.",
    )
    class_names: list[str] | None = Field(
        default=None, description="Names of the classes, in order: filled in. Where given, the data must have these."
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
            known = " or ".join(repr(f"{name}/NAME" if kind.named else name) for name, kind in KINDS.items())
            raise ValueError(f"expected {known}, got {dataset!r}{nearest(dataset, KINDS)}")
        return dataset

    @model_validator(mode="after")
    def _check(self) -> "DataSection":
        kind = self.kind
        for key in kind.needs:
            if not getattr(self, key):
                at = key if key in self.model_fields_set else "dataset"
                raise FieldError(at, f"dataset {self.dataset!r} needs a {key}, for example data.{key}={EXAMPLES[key]}")
        for key in sorted({key for other in KINDS.values() for key in (*other.needs, *other.takes)}):
            if getattr(self, key) is not None and key not in (*kind.needs, *kind.takes):
                raise FieldError(key, f"has no effect with dataset {self.dataset!r}; leave it out or set it to null")
        if kind.in_memory and self.on_error == "skip":
            raise FieldError("on_error", f"'skip' has no effect with dataset {self.dataset!r}, which is in memory")
        if kind.in_memory and self.decoder != "auto":
            raise FieldError(
                "decoder", f"has no effect with dataset {self.dataset!r}, which is in memory; leave it out"
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
