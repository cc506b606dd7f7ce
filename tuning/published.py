"""Published drop-path rates: configs/published/drop_path.yaml, read and checked.

Knows names of models, and none of their classes. `python -m tuning.published` prints the table of the docs.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from configs import CONFIGS
from files.errors import FieldError, nearest
from files.strict_yaml import load_yaml, validate
from files.words import counted
from training.section import Fraction, Section

PUBLISHED: Path = CONFIGS / "published" / "drop_path.yaml"
Purpose = Literal["train", "finetune", "pretrain"]
Pretraining = Literal["imagenet-1k", "imagenet-21k", "self-supervised"]
WORDS: dict[str, str] = {"train": "from scratch", "finetune": "fine-tuning", "pretrain": "without labels"}


class Size(Section):
    """One size of a family."""

    models: list[str] = Field(min_length=1, description="Patterns of names, without library; see the file.")
    blocks: int = Field(ge=1, description="Residual blocks.")
    params: float = Field(gt=0, description="Parameters in millions.")


class Family(Section):
    """Models that are built alike."""

    label: str = Field(min_length=1, description="Its name for people.")
    models: list[str] = Field(min_length=1, description="Patterns of its models' names, without library.")
    kin: list[str] = Field(default=[], description="Patterns of names of models for which it speaks as well.")
    sizes: dict[str, Size] = Field(min_length=1)


class Row(Section):
    """One published rate."""

    family: str
    size: str
    rate: Fraction = Field(description="The largest over blocks.")
    profile: Literal["linear", "linear_from_first", "constant"] = "linear"
    schedule: Literal["constant", "early", "late"] = "constant"
    purpose: Purpose
    pretraining: Pretraining | None = Field(default=None, description="finetune only.")
    data: str = Field(description="What it was trained on; a name of images.")
    image_size: int | None = Field(default=None, ge=1, description="Pixels, one side.")
    epochs: int | None = Field(default=None, ge=1)
    mixing: bool | None = Field(default=None, description="Whether mixup and cutmix were on.")
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "Row":
        if self.pretraining is not None and self.purpose != "finetune":
            raise FieldError("pretraining", f"has no meaning with purpose {self.purpose!r}")
        return self

    @property
    def conditions(self) -> str:
        """Purpose, data and recipe in words."""
        start = f" after {self.pretraining}" if self.pretraining else ""
        parts = [f"{WORDS[self.purpose]}{start}", self.data]
        parts += [f"{self.image_size} px"] if self.image_size else []
        parts += [counted(self.epochs, "epoch")] if self.epochs else []
        parts += ["mixup and cutmix off"] if self.mixing is False else []
        return ", ".join(parts)


class Published(Section):
    """All of the file."""

    images: dict[str, int] = Field(description="Training images of each data set.")
    families: dict[str, Family]
    rates: list[Row] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "Published":
        for i, row in enumerate(self.rates):
            sizes = self.families[row.family].sizes if row.family in self.families else None
            known = {"family": self.families, "size": sizes or {row.size}, "data": self.images}
            for key, names in known.items():
                word = getattr(row, key)
                if word not in names:
                    raise FieldError(f"rates.{i}.{key}", f"unknown {key} {word!r}{nearest(word, names)}")
        for name, family in self.families.items():
            unused = family.sizes.keys() - {row.size for row in self.rates if row.family == name}
            if unused:
                raise FieldError(f"families.{name}", f"no rate of its size {min(unused)!r}")
        return self

    def size_of(self, row: Row) -> Size:
        """Blocks and parameters of a row's model."""
        return self.families[row.family].sizes[row.size]

    def of_family(self, name: str, purpose: Purpose, schedule: str = "constant") -> list[Row]:
        """The rows of a family for a purpose, in the file's order."""
        return [r for r in self.rates if (r.family, r.purpose, r.schedule) == (name, purpose, schedule)]

    def families_of(self, model: str) -> tuple[list[str], list[str]]:
        """Names of the families that a model's name is of, and of those that speak for it as kin."""
        own = [name for name, family in self.families.items() if matches(model, family.models)]
        return own, [name for name, family in self.families.items() if matches(model, family.kin) and name not in own]

    def is_size(self, row: Row, model: str) -> bool:
        """Whether a row is of the very model of this name."""
        return matches(model, self.families[row.family].models) and matches(model, self.size_of(row).models)


def matches(model: str, patterns: Sequence[str]) -> bool:
    """Whether a model's name, with or without library and tag, fits one of the patterns.

    Args:
        model: As in `model.name`: poolformer_s12, timm/swin_tiny_patch4_window7_224.ms_in1k, path/to/my_model.yaml.
        patterns: As in the file; one with a dot is compared with the tag.
    """
    if model.endswith((".yaml", ".yml")):
        model = Path(model).stem
    tagged = model.rpartition("/")[2]
    base = tagged.partition(".")[0]
    return any(fnmatchcase(tagged if "." in pattern else base, pattern) for pattern in patterns)


@cache
def load_published(path: Path = PUBLISHED) -> Published:
    """The file as a whole.

    Raises:
        ConfigError: It is not as its schema says; names file, line and key.
    """
    return validate(Published, load_yaml(path))


def series(published: Published) -> Iterator[list[Row]]:
    """Rows that differ in size and rate alone, together, in the file's order."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in published.rates:
        key = tuple(v for k, v in row.model_dump().items() if k not in ("size", "rate"))
        groups.setdefault(key, []).append(row)
    yield from groups.values()


def markdown_table(published: Published) -> str:
    """The table of docs/stochastic-depth.md: a line per series."""
    lines = ["| model | rate | profile | conditions | source |", "|---|---|---|---|---|"]
    for rows in series(published):
        first = rows[0]
        sizes = " / ".join(row.size for row in rows)
        rates = " / ".join(f"{row.rate:g}" for row in rows)
        profile = first.profile if first.schedule == "constant" else f"{first.profile}, {first.schedule}"
        label = published.families[first.family].label
        lines.append(f"| {label} {sizes} | {rates} | {profile} | {first.conditions} | {first.source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table(load_published()))
