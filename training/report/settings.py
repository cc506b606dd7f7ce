"""A run's settings on a page: what differs from the defaults, what differs between runs, how to run it again."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from files.errors import ConfigError
from models.factory import model_facts
from training.config import TrainConfig
from training.report.runs import Run
from training.report.words import UNKNOWN, in_words

# Filled in by the run itself: they say what the data and the model are, not what was chosen.
_FILLED_IN = ("data.class_names", "drop_path.break_even")
_LONGEST = 90


class Difference(NamedTuple):
    """A key of the config with what differs, each in words."""

    key: str
    values: list[str]


def from_defaults(run: Run) -> list[Difference]:
    """Keys whose value is not the schema's default, with the value and the default.

    Keys of the model are compared with those of the model of its name; left out where that is not known here.
    """
    default = _defaults()
    of_model = _model_defaults(run)
    if of_model is not None:
        default |= of_model
    told = []
    for key, value in flat(run.config).items():
        if key not in default and key.startswith("model.") and of_model is None:
            continue
        if key not in _FILLED_IN and (key not in default or default[key] != value):
            told.append(Difference(key, [_short(value), _short(default[key]) if key in default else UNKNOWN]))
    return told


def between(runs: Sequence[Run]) -> list[Difference]:
    """Keys whose values differ between runs, with the value of each; a dash where a config lacks the key."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _FILLED_IN)
    lacking = object()
    told = []
    for key in keys:
        values = [config.get(key, lacking) for config in configs]
        if any(value != values[0] for value in values):
            told.append(Difference(key, [UNKNOWN if value is lacking else _short(value) for value in values]))
    return told


def command_to_repeat(run: Run) -> str:
    """Trains the same config again, beside the run."""
    processes = run.environment.get("processes")
    several = isinstance(processes, int) and processes > 1
    start = f"torchrun --nproc-per-node {processes} train.py" if several else "python train.py"
    config, again = run.path / "config.yaml", run.path.with_name(f"{run.path.name}-again")
    return f"{start} --config {shlex.quote(str(config))} --output {shlex.quote(str(again))}"


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys; a mapping below another is taken apart too."""
    told: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in _FILLED_IN:
            told |= flat(value, f"{prefix}{key}.")
        else:
            told[f"{prefix}{key}"] = value
    return told


def _defaults() -> dict[str, Any]:
    """The schema's defaults by dotted keys; keys that must be given have none."""
    told: dict[str, Any] = {}
    for name, field in TrainConfig.model_fields.items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            told[name] = value.model_dump() if hasattr(value, "model_dump") else value
        else:
            section = field.annotation
            assert isinstance(section, type) and issubclass(section, BaseModel)
            parts = section.model_fields.items()
            told[name] = {key: part.get_default(call_default_factory=True) for key, part in parts}
            told[name] = {key: value for key, value in told[name].items() if value is not PydanticUndefined}
    return flat(told)


def _model_defaults(run: Run) -> dict[str, Any] | None:
    """What the model of that name has where a config says nothing."""
    name = run.setting("model", "name")
    try:
        return flat({"model": model_facts(name).arguments}) if isinstance(name, str) else None
    except (ConfigError, ValueError, RuntimeError):
        return None


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} values"
    words = "none" if value is None else str(value).lower() if isinstance(value, bool) else in_words(value)
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}\u2026"
