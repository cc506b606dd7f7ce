"""What a study varies: keys of the training config <-> Optuna's distributions, and the config of each candidate.

A candidate is the study's training config with some keys replaced, checked by the code that checks every training config.
Values that Optuna cannot hold, such as a whole schedule, are known to it by their JSON text.
"""

import contextlib
import hashlib
import itertools
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from files.errors import ConfigError
from files.strict_yaml import Document, validate
from models.factory import model_facts
from training.config import DropPathSection, TrainConfig
from tuning.config import RangeSection, StudyConfig, check_key

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Values = dict[str, Any]
"""Keys of the training config and values."""

# What changes nothing that is learned, so that two configs that differ in it are one candidate.
_NOT_LEARNED: dict[str, Any] = {
    "seed": True,
    "checkpoint": True,
    "log": True,
    "data": {"workers", "eval_batch_size", "on_error", "max_skipped", "class_names", "download", "cache"},
    "runtime": {"threads", "timeout_minutes"},
}
MOST_COMBINATIONS = 300
"""Of other values that are looked through for one that a refused value goes with."""
MOST_GRID_POINTS = 10_000


class Space:
    """The parameters of a study.

    Args:
        study: As read. Its space is checked here.

    Raises:
        ConfigError: An unknown key, one that holds another, one that nothing learned depends on, or a value that the
            training config refuses.
    """

    def __init__(self, study: StudyConfig) -> None:
        self.study = study
        self.parameters = study.tune.space
        self.whole: set[str] = set()
        """Ranges of integers."""
        for key, values in self.parameters.items():
            self._check_key(key)
            annotation = check_key(key, study.places.where(("space", key)))
            if isinstance(values, RangeSection):
                self._check_range(key, values, annotation)
            else:
                self._check_list(key, values)
        self._check_values()
        if study.tune.search.sampler == "grid":
            self._check_grid()
        for i, values in enumerate(study.tune.search.enqueue):
            self._check_enqueued(i, values)

    def _refuse(self, key: str, message: str) -> ConfigError:
        return self.study.refuse("space", message, key)

    def _check_key(self, key: str) -> None:
        for other in self.parameters:
            if other.startswith(f"{key}."):
                raise self._refuse(other, f"lies within {key}, which is varied as well; leave one of them out")
        section, _, rest = key.partition(".")
        free = _NOT_LEARNED.get(section, ())
        if (free is True and section != "seed") or (isinstance(free, set) and rest in free):
            raise self._refuse(key, "cannot be searched: nothing that is learned depends on it")

    def _check_range(self, key: str, values: RangeSection, annotation: Any) -> None:
        given = [v for v in (values.low, values.high, values.step) if v is not None]
        integers = all(isinstance(v, int) for v in given)
        kinds = _number_types(annotation)
        if annotation is not None and not kinds:
            raise self._refuse(key, "is no number; give a list of values")
        if kinds == {int} and not integers:
            raise self._refuse(key, f"is an integer; give integers, got {', '.join(f'{v:g}' for v in given)}")
        if integers and (annotation is None or kinds == {int}):
            self.whole.add(key)

    def _check_list(self, key: str, values: list[Any]) -> None:
        if not values:
            raise self._refuse(key, "has no values; list at least one")
        texts = [json.dumps(value, sort_keys=True) for value in values]
        for text in texts:
            if texts.count(text) > 1:
                raise self._refuse(key, f"lists {text} twice")

    def _check_values(self) -> None:
        """Every value of a list and both ends of a range must be possible, alone or beside some values of the others."""
        for key in self.parameters:
            for i, value in enumerate(self._examples(key)):
                refused: ConfigError | None = None
                for others in self._beside([key]):
                    try:
                        _check_model(self.candidate({**others, key: value}), key)
                    except ConfigError as error:
                        refused = refused or error
                    else:
                        break
                else:
                    listed = not isinstance(self.parameters[key], RangeSection)
                    where = self.study.places.where(("space", key, *([i] if listed else [])))
                    raise ConfigError(f"{where}the training config refuses {_text(value)}: {refused}")

    def _examples(self, key: str) -> list[Any]:
        values = self.parameters[key]
        return [values.low, values.high] if isinstance(values, RangeSection) else values

    def _ends(self, key: str) -> list[Any]:
        values = self._examples(key)
        numbers = all(isinstance(value, (int, float)) for value in values)
        return sorted({min(values), max(values)}) if numbers else values

    def _beside(self, keys: Sequence[str]) -> Iterator[Values]:
        """Nothing, then combinations of the other parameters."""
        yield {}
        others = [other for other in self.parameters if other not in keys]
        combinations = itertools.product(*(self._examples(other) for other in others))
        for values in itertools.islice(combinations, MOST_COMBINATIONS):
            yield dict(zip(others, values, strict=True))

    def _check_grid(self) -> None:
        points = 1
        for key, values in self.parameters.items():
            if isinstance(values, RangeSection) and values.step is None and key not in self.whole:
                raise self._refuse(
                    key, "a grid needs a step, as in {low: 0.0, high: 0.5, step: 0.1}, or a list of values"
                )
            if isinstance(values, RangeSection) and values.log:
                raise self._refuse(key, "a grid has even steps; instead of log, give a list of values")
            points *= len(self.grid_points(key))
        if points > MOST_GRID_POINTS:
            raise self.study.refuse(
                "search.sampler", f"a grid of {points} points is too much; name fewer values, or use random"
            )

    def _check_enqueued(self, i: int, values: Values) -> None:
        for key, value in values.items():
            if key not in self.parameters:
                raise self.study.refuse("search.enqueue", f"is not in the space: {', '.join(self.parameters)}", i, key)
            if not self.holds(key, value):
                raise self.study.refuse("search.enqueue", f"{_text(value)} is not in the space", i, key)

    def holds(self, key: str, value: Any) -> bool:
        """Whether a value is among those that are tried."""
        values = self.parameters[key]
        if not isinstance(values, RangeSection):
            return value in values
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and values.low <= value <= values.high and (key not in self.whole or value == int(value))

    @property
    def distributions(self) -> "dict[str, BaseDistribution]":
        """For Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        made: dict[str, BaseDistribution] = {}
        for key, values in self.parameters.items():
            if not isinstance(values, RangeSection):
                made[key] = CategoricalDistribution([_encoded(value) for value in values])
            elif key in self.whole:
                step = 1 if values.step is None else int(values.step)
                high = values.high - (values.high - values.low) % step  # as Optuna does, with a warning
                made[key] = IntDistribution(int(values.low), int(high), log=values.log, step=step)
            else:
                high = values.high if values.step is None else self.grid_points(key)[-1]
                made[key] = FloatDistribution(float(values.low), float(high), log=values.log, step=values.step)
        return made

    def encode(self, values: Values) -> dict[str, Any]:
        """Values as Optuna holds them."""
        return {
            key: (float(value) if key not in self.whole else value)
            if isinstance(self.parameters[key], RangeSection)
            else _encoded(value)
            for key, value in values.items()
        }

    def decode(self, params: Mapping[str, Any]) -> Values:
        """What `encode` was given, in the order of the space."""
        decoded = {}
        for key, values in self.parameters.items():
            if key in params and not isinstance(values, RangeSection):
                decoded[key] = deepcopy(next(v for v in values if _encoded(v) == params[key]))
            elif key in params:
                decoded[key] = params[key]
        return decoded

    def completed(self, values: Values) -> Values:
        """The values with all that they leave open: as in the training config where that is in the space, else the first."""
        base = self.study.base.model_dump()
        completed = {}
        for key in self.parameters:
            own = value_at(base, key)
            fallback = own if self.holds(key, own) else self._examples(key)[0]
            completed[key] = deepcopy(values.get(key, fallback))
        return completed

    def grid(self) -> list[Values]:
        """Every combination."""
        points = itertools.product(*(self.grid_points(key) for key in self.parameters))
        return [dict(zip(self.parameters, deepcopy(point), strict=True)) for point in points]

    def grid_points(self, key: str) -> list[Any]:
        """The values of a parameter: a list's, or those of a range with a step."""
        values = self.parameters[key]
        if not isinstance(values, RangeSection):
            return values
        step = values.step or 1
        count = int((values.high - values.low) / step * (1 + 1e-12) + 1e-9) + 1
        points = [values.low + i * step for i in range(count)]
        return points if key in self.whole else [round(point, 12) for point in points]

    def corners(self, keys: Sequence[str]) -> list[TrainConfig]:
        """A config for every combination of the least and greatest number, or of all values of another list, of some keys.

        Those that the training config refuses, whatever the other parameters are, are left out.
        """
        configs = []
        points = itertools.product(*(self._ends(key) for key in keys))
        for point in itertools.islice(points, MOST_COMBINATIONS):
            for others in self._beside(keys):
                with contextlib.suppress(ConfigError):
                    configs.append(self.candidate({**others, **dict(zip(keys, point, strict=True))}))
                    break
        return configs

    def candidate(self, values: Values) -> TrainConfig:
        """The training config with these values.

        Raises:
            ConfigError: It refuses them.
        """
        return candidate(self.study.document, values)


def candidate(document: Document, values: Values) -> TrainConfig:
    """A training config with some keys replaced.

    At rate 0 profile, schedule and meaning of the rate are set to their defaults, since nothing is dropped: candidates that
    differ in them alone are one, and trained once.

    Raises:
        ConfigError: The config refuses them.
    """
    changed = Document(deepcopy(document.data), document.source, document.path, dict(document.places))
    for key, value in values.items():
        changed.set(tuple(key.split(".")), deepcopy(value), place=f"{key}={_text(value)}")
    config = validate(TrainConfig, changed)
    section = config.drop_path
    if section.rate == 0 and isinstance(section.profile, str):
        nothing = DropPathSection(rate=0.0, mode=section.mode, break_even=section.break_even)
        config = config.model_copy(update={"drop_path": nothing})
    return config


def _check_model(config: TrainConfig, key: str) -> None:
    """Refuses a model that is not there, where the key names one: a training config is read without looking.

    Raises:
        ConfigError: With the nearest name.
    """
    if key in ("model", "model.name"):
        model_facts(config.model.name)


def digest_of(config: TrainConfig) -> str:
    """Twelve hexadecimal digits that name a candidate: of all that what it learns depends on, but the seed.

    Keys at their defaults are not part of it, so that one that a later version adds changes no digest.
    """
    learned = config.model_dump(mode="json", exclude=_NOT_LEARNED, exclude_defaults=True)
    return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:12]


def _number_types(annotation: Any) -> set[type]:
    """int and float, as far as an annotation allows them."""
    if annotation in (int, float):
        return {annotation}
    if get_origin(annotation) in (Union, types.UnionType) or hasattr(annotation, "__metadata__"):
        arms = get_args(annotation)[:1] if hasattr(annotation, "__metadata__") else get_args(annotation)
        return set().union(*(_number_types(arm) for arm in arms))
    return set()


def _encoded(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, sort_keys=True)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def value_at(data: Any, key: str) -> Any:
    """What a dumped config has at a dotted key; None where it has none."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data
