"""The schema of a study: configs/tune/*.yaml and overrides such as `search.trials=6` -> TuneConfig.

A study is a training config, what is varied in it, and how. The smallest one:

    train: configs/train/digits.yaml
    space: {drop_path.rate: {low: 0.0, high: 0.5}}

Read as a training config is: the same strict YAML, and errors with file, line and key. On the command line
`search.trials=6` sets a key of the study, and a key of the training config stands for `overrides`: `optim.epochs=3`.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from configs import CONFIGS
from files.errors import ConfigError, FieldError, nearest
from files.strict_yaml import (
    Document,
    annotation_at,
    dump_yaml,
    known_keys,
    load_yaml,
    set_overrides,
    unknown_key,
    validate,
)
from files.words import counted
from training.config import TrainConfig, annotation_of_key
from training.metrics import known_column, sign_of
from training.section import Section

DEFAULT_CONFIG: Path = CONFIGS / "tune" / "digits.yaml"
DEFAULT_TRIALS = 12
MOST_JOBS = 1024
FRESH = 1000
"""The first seed that no search takes."""
Number = int | float
Start = Literal["zero", "published", "advice"]


class RangeSection(Section):
    """A range of numbers, both ends included."""

    low: Number = Field(description="The least value.")
    high: Number = Field(description="The greatest value.")
    log: bool = Field(default=False, description="Search evenly over the logarithm, as for lr.")
    step: Number | None = Field(default=None, gt=0, description="Only low, low + step, ... are tried. Default: all.")

    @model_validator(mode="after")
    def _check(self) -> "RangeSection":
        if self.low > self.high:
            raise FieldError("low", f"{self.low:g} is above high, {self.high:g}; swap them")
        if self.log and self.low <= 0:
            raise FieldError("log", f"a logarithm needs low above 0, got {self.low:g}; leave log out, or raise low")
        if self.log and self.step is not None:
            raise FieldError("step", "has no effect with log; give one of them, or a list of values")
        return self


class SearchSection(Section):
    """Which configurations are tried."""

    sampler: Literal["auto", "gp", "tpe", "grid", "random"] = Field(
        default="auto",
        description="Optuna's. auto: gp (a Gaussian process that knows of noise) for up to four parameters, tpe for more. "
        "grid: every combination.",
    )
    trials: int | None = Field(
        default=None, ge=1, description="Configurations tried, those it starts with included. Default: 12; grid: all."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of the sampler; in one process a study repeats itself.")
    start: list[Start] | None = Field(
        default=None,
        description="What is tried first: zero (rate 0), published (the model's own rate), advice (the advisor's). "
        "Default: all three; of a grid, none.",
    )
    enqueue: list[dict[str, Any]] = Field(
        default_factory=list, description="Further configurations to try first; keys left out are as in train."
    )

    @model_validator(mode="after")
    def _check(self) -> "SearchSection":
        if self.sampler == "grid":
            for key in ("trials", "start", "enqueue"):
                if getattr(self, key):
                    raise FieldError(key, "has no effect with sampler 'grid', which tries every combination once")
        if self.start is None:
            self.start = [] if self.sampler == "grid" else ["zero", "published", "advice"]
        return self


class RaceSection(Section):
    """Who goes on: scores over few seeds are noisy, and more seeds are spent only on what may win."""

    seeds: list[Annotated[int, Field(ge=1, le=FRESH)]] = Field(
        default_factory=lambda: [1, 2, 4], min_length=1, description="Seeds that a trial has at the end of each round."
    )
    keep: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="Trials that go on after each round but the last. Default: half, then half of those."
    )

    @model_validator(mode="after")
    def _check(self) -> "RaceSection":
        if any(b <= a for a, b in pairwise(self.seeds)):
            raise FieldError("seeds", f"must rise from round to round, got {self.seeds}")
        if self.keep is not None:
            rounds = len(self.seeds) - 1
            if len(self.keep) != rounds:
                raise FieldError(
                    "keep", f"needs {counted(rounds, 'entry')}, one after each round but the last, got {self.keep}"
                )
            if any(b > a for a, b in pairwise(self.keep)):
                raise FieldError("keep", f"must not rise from round to round, got {self.keep}")
        return self

    def kept(self, trials: int) -> list[int]:
        """How many of that many trials go on after each round but the last."""
        if self.keep is not None:
            return self.keep
        counts = []
        for _ in self.seeds[1:]:
            trials = (trials + 1) // 2
            counts.append(trials)
        return counts


class ObjectiveSection(Section):
    """What is compared: a validation metric of the model at the end of its training."""

    metric: str = Field(default="val_top1", description="A column of metrics.csv that is a metric; of the last epoch.")
    mode: Literal["auto", "max", "min"] = Field(
        default="auto",
        description="Whether more is better, or less: what is true of the metric, auto says it too.",
    )

    @field_validator("metric")
    @classmethod
    def _check_metric(cls, metric: str) -> str:
        return known_column(metric)

    @model_validator(mode="after")
    def _check_mode(self) -> "ObjectiveSection":
        more = self.sign > 0
        if self.mode == ("min" if more else "max"):
            raise FieldError(
                "mode",
                f"{self.mode!r} would look for the worst model: {'more' if more else 'less'} of {self.metric} is better; "
                f"leave it out, or give {'max' if more else 'min'!r}",
            )
        return self

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return sign_of(self.metric)


class VerdictSection(Section):
    """The final: the winner, rate 0 and the published rate, on seeds and data that the search never saw."""

    seeds: int = Field(default=8, ge=1, le=1000, description="Fresh seeds of each; below 6 nothing can be significant.")
    first_seed: int = Field(default=FRESH, ge=FRESH, lt=2**31, description="They are this one and those behind it.")
    split: Literal["test", "val"] = Field(
        default="test", description="What they are scored on. val: what the search saw, so that it proves little."
    )


class TuneConfig(Section):
    """One study."""

    train: str | dict[str, Any] = Field(
        description="The training config that is tuned: itself, or a path from here, from beside this file or above it."
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="Keys of the training config and their values, as in {optim.epochs: 30}."
    )
    space: dict[str, RangeSection | list[Any]] = Field(
        description="Keys of the training config and what is tried: {low, high, log, step}, or a list of values."
    )
    search: SearchSection = Field(default_factory=SearchSection)
    race: RaceSection = Field(default_factory=RaceSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    verdict: VerdictSection | None = Field(default_factory=VerdictSection, description="null: no final.")
    storage: str | None = Field(
        default=None,
        min_length=1,
        description="Where Optuna keeps the trials: any URL it takes, as in postgresql://host/name. Default: a journal "
        "file in the folder of the study.",
    )
    jobs: int = Field(default=1, ge=1, le=MOST_JOBS, description="Processes on this machine, which share its cores.")

    @field_validator("space", mode="before")
    @classmethod
    def _check_kinds(cls, space: Any) -> Any:
        """Here, since the keys of a range are none that the config knows by name."""
        known = RangeSection.model_fields
        for key, values in space.items() if isinstance(space, dict) else ():
            if not isinstance(values, (dict, list)):
                shown = json.dumps(values, default=str)
                raise FieldError(
                    (key,), f"expected a range, as in {{low: 0.0, high: 0.5}}, or a list of values, got {shown}"
                )
            for name in values if isinstance(values, dict) else ():
                if name not in known:
                    hint = nearest(str(name), known) or f"; known here: {', '.join(known)}"
                    raise FieldError((key, str(name)), f"unknown key{hint}")
        return space

    @field_validator("space")
    @classmethod
    def _check_space(cls, space: dict[str, Any]) -> dict[str, Any]:
        if not space:
            raise ValueError("is empty; name what to vary, as in {drop_path.rate: {low: 0.0, high: 0.5}}")
        return space


FREE_TO_CHANGE = ("jobs", "search.trials", "race", "verdict")
"""What may be another when a study goes on: nothing that was trained depends on it."""

BY_THE_STUDY = {
    "seed": "seeds are given by race.seeds and verdict.first_seed",
    "log.validate_every": "a study validates at the end of a run",
    "log.report": "a study writes one report of all runs",
}
"""Keys of the training config that a study sets itself, and why."""


@dataclass(frozen=True)
class StudyConfig:
    """A study as read.

    Attributes:
        tune: The study's own config.
        document: The training config with the overrides, as it was written: candidates are made of it.
        base: The same, checked.
        name: Of the folder where none is given.
        places: Where keys of the study were given, for messages.
    """

    tune: TuneConfig
    document: Document
    base: TrainConfig
    name: str
    places: Document

    def refuse(self, key: str, message: str, *rest: str | int) -> ConfigError:
        """The error to raise about a key of the study: `refuse("space", ..., "drop_path.rate")`."""
        return ConfigError(f"{self.places.where((*key.split('.'), *rest))}{message}")


def load_study(path: Path | str | None, overrides: Sequence[str] = ()) -> StudyConfig:
    """Defaults, then the file, then the overrides in their order.

    Args:
        path: A YAML file; None for `configs/tune/digits.yaml`.
        overrides: KEY=VALUE, of the study (`race.seeds=[1, 2]`) or of its training config (`optim.epochs=3`).

    Raises:
        ConfigError: Naming file and line, or the override, with key, value and what is allowed.
    """
    path = DEFAULT_CONFIG if path is None else Path(path)
    document = load_yaml(path)
    for word in overrides:
        _set(document, word)
    tune = validate(TuneConfig, document)
    train = _training_document(document, path)
    for key, value in tune.overrides.items():
        where = document.where(("overrides", key))
        check_key(key, where)
        train.set(tuple(key.split(".")), deepcopy(value), place=where.removesuffix(": "))
    base = validate(TrainConfig, train)
    return StudyConfig(tune, train, base, path.stem, document)


def check_key(key: str, where: str) -> Any:
    """The type of a key of the training config that a study may set, `None` where only the value can tell.

    Args:
        key: Dotted.
        where: Opening of the message.

    Raises:
        ConfigError: There is no such key, or the study sets it itself.
    """
    if key in BY_THE_STUDY:
        raise ConfigError(f"{where}has no effect: {BY_THE_STUDY[key]}")
    try:
        return annotation_of_key(key)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _set(document: Document, word: str) -> None:
    """Sets what one word of the command line says, in the study or in its overrides."""
    key = word.partition("=")[0].strip()
    section, _, rest = key.partition(".")
    mine, theirs = known_keys(TuneConfig), known_keys(TrainConfig)
    if section in ("overrides", "space") and rest:  # their keys have dots and are one
        scratch = Document({})
        annotation = (lambda _: annotation_of_key(rest)) if section == "overrides" else (lambda _: None)
        set_overrides(scratch, [word], annotation=annotation, example="overrides.optim.epochs=3")
        _put(document, section, rest, scratch, key)
    elif section in TuneConfig.model_fields or "=" not in word:
        set_overrides(document, [word], annotation=_annotation, example="search.trials=6")
    elif section in TrainConfig.model_fields:
        scratch = Document({})
        set_overrides(scratch, [word], annotation=annotation_of_key, example="optim.epochs=3")
        _put(document, "overrides", key, scratch, key)
    else:
        close = difflib.get_close_matches(key, [*mine, *theirs], n=1, cutoff=0.5)
        known = ", ".join(TuneConfig.model_fields)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {known}, and keys of the training config"
        raise ConfigError(f"on the command line: {word}: unknown key; {hint}")


def _put(document: Document, section: str, key: str, scratch: Document, given: str) -> None:
    """Moves a value that was read from a word to one key of a section."""
    value: Any = scratch.data
    for part in given.split("."):
        value = value[part]
    place = str(next(iter(scratch.places.values())))
    document.set((section, key), value, place=place)


def _annotation(key: str) -> Any:
    known = known_keys(TuneConfig)
    if key not in known:
        raise ConfigError(unknown_key(key, known))
    return annotation_at(TuneConfig, key)


def _training_document(document: Document, path: Path) -> Document:
    """The training config that a study names or holds."""
    train = document.data["train"]
    if isinstance(train, dict):
        places = {at[1:]: place for at, place in document.places.items() if at[:1] == ("train",)}
        return Document(deepcopy(train), document.source, document.path, places)
    # from here, else from beside the study, or from the folder above it in which both lie
    places = [Path(train), *(folder / train for folder in path.resolve().parents)]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        try:
            load_yaml(train)
        except ConfigError as error:
            raise ConfigError(f"{document.where(('train',))}{error}") from None
    return load_yaml(found or train)


def dump_study(config: TuneConfig) -> str:
    """YAML with every key, defaults included."""
    return dump_yaml(config.model_dump())


def json_schema() -> dict[str, Any]:
    """JSON schema of a study, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TuneConfig.model_json_schema()}


def first_difference(before: Mapping[str, Any], after: Mapping[str, Any], free: Sequence[str] = ()) -> str | None:
    """The first key, dotted, in which two dumped configs differ, with both values; None where they do not."""
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if key in free or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = [name.removeprefix(f"{key}.") for name in free if name.startswith(f"{key}.")]
            found = first_difference(old, new, inner)
            if found is None:
                continue
            return f"{key}.{found}"
        return f"{key} is {new!r} here and {old!r} there"
    return None
