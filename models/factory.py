"""create_model: a registered name or a YAML -> a model, with or without weights."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from files.errors import ConfigError, Failure, is_out_of_memory, wanted_memory
from files.words import counted
from layers.drop_path import MODES, Mode
from layers.rates import check_choice, check_drop_prob
from models.config import MetaFormerConfig, ModelFacts, make_pretrained_cfg, override_config
from models.loading import check_trained_as, known_section, load_into, published_facts
from models.metaformer import MetaFormer
from models.published import load_timm_pretrained
from models.registry import model_config
from models.timm_facts import foreign_facts, is_foreign
from models.timm_models import adapted_by_library, build_foreign, check_saved_as, load_foreign, saved_by_timm
from models.weights import load_weights
from stochastic_depth.blocks import NoBlocksError
from stochastic_depth.setting import set_drop_path

logger = logging.getLogger(__name__)


def create_model(
    name: str | Path | MetaFormerConfig,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    drop_path_rate: float | None = None,
    drop_path_mode: Mode = "mask",
    class_names: Sequence[str] | None = None,
    **overrides: Any,
) -> MetaFormer | Any:
    """Builds a model.

    Args:
        name: A registered name, a path to a YAML, or a config. A name may carry a tag of published weights, which sets
            classes and image size to theirs: `caformer_s18.sail_in22k_ft_in1k_384`. Any classifier of timm or torchvision
            is `timm/NAME[.TAG]` or `torchvision/NAME[.TAG]`.
        pretrained: Load the published weights through timm's or torchvision's hub code.
        checkpoint: Load weights from a file (safetensors, or of torch.save) or from a folder, such as a run's `best` or
            what timm saved; see `models.weights.load_weights`. Where these or published ones belong to a known config,
            all that their shapes do not tell must be as in it; only keys of `head` named here may differ, with a
            warning. A replaced classifier and the like are warnings as well.
        num_classes: Default: the config's. Where it is given and differs from the weights', the classifier is replaced.
        in_chans: Input channels. Default: the config's, 3 in all published models. Where it is given and differs from
            the weights', their first convolution is adapted as timm does.
        drop_path_rate: Rate of the last block, rising linearly from 0; `None` means 0.
        drop_path_mode: `mask`, `skip` or `batch`; see `layers.drop_path.DropPath`. It holds for rates set later too.
        class_names: Names of the classes in their order, see `set_class_names`; their number is the default of
            `num_classes`. Where the weights' classes are known by other names or in another order, the classifier is
            replaced, whatever their number. Default: the weights', where their classifier is kept.
        **overrides: Any key of the model's config. Of a model of timm or torchvision: the keys of
            `models.timm_facts.ImageFacts`, and the library's own arguments.

    Returns:
        The model, in training mode as torch builds it: a `MetaFormer`, or what timm or torchvision builds, with
        `pretrained_cfg`, `get_classifier`, `reset_classifier` and `num_classes`.

    Raises:
        ConfigError: An unknown name or key, a wrong value, or weights that do not fit; says what is allowed.
        Failure: The model's weights do not fit into memory.
    """
    if pretrained and checkpoint is not None:
        raise ConfigError("pretrained=True and checkpoint are two sources of weights; give one")
    if class_names is not None:
        _check_names(class_names)
        num_classes = len(class_names) if num_classes is None else num_classes
    chosen = {"num_classes": num_classes, "in_chans": in_chans}
    overrides |= {key: value for key, value in chosen.items() if value is not None}
    foreign = is_foreign(name)
    model: Any
    with _memory_in_words(name):
        if foreign:
            drop_path_rate = _checked_rate(name, drop_path_rate, drop_path_mode)
            model = build_foreign(str(name), overrides, pretrained=pretrained)
        else:
            config = _config(name, overrides)
            try:
                model = MetaFormer(config, 0.0 if drop_path_rate is None else drop_path_rate, drop_path_mode)
            except ValueError as error:
                raise ConfigError(f"model {name}: {error}") from None
    if class_names is not None:
        set_class_names(model, class_names)

    lines = adapted_by_library(model) if foreign and pretrained else []
    if checkpoint is not None or (pretrained and not foreign):
        replace = num_classes is not None or pretrained
        adapt = in_chans is not None or pretrained
        if foreign:
            lines = _load_foreign(model, Path(str(checkpoint)), class_names, replace, adapt)
        else:
            lines = _load(name, model, checkpoint, overrides, class_names, (replace, adapt))
    if foreign and (drop_path_rate or drop_path_mode != "mask"):  # at rate 0 the mode is for rates set later
        try:
            set_drop_path(model, drop_path_rate, mode=drop_path_mode)
        except ValueError as error:
            if drop_path_rate or not isinstance(error, NoBlocksError):
                raise ConfigError(f"model {name}: {error}") from None
    for i, line in enumerate(lines):
        # the first says what was loaded; others are seen in plain Python too, where nobody has asked for messages
        logger.log(logging.WARNING if i else logging.INFO, line)
    return model


@contextlib.contextmanager
def _memory_in_words(name: object) -> Iterator[None]:
    """A model that does not fit into memory as a line that names it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        overflows = "overflow" in str(error)  # sizes whose product is beyond all memory
        if isinstance(error, Failure) or not (overflows or is_out_of_memory(error)):
            raise
        wanted = "more than can be counted" if overflows else wanted_memory(error)
        raise Failure(f"model {name}: its weights do not fit into memory: {wanted}; use smaller sizes") from error


def model_facts(name: str | Path | MetaFormerConfig, **arguments: Any) -> ModelFacts:
    """What `create_model` would build from a name and arguments, without building it.

    Raises:
        ConfigError: As `create_model`, but for what only shows in building.
    """
    if is_foreign(name):
        return foreign_facts(str(name), arguments)
    left_open = {key for key in ("num_classes", "in_chans", "image_size") if arguments.get(key) is None}
    config = _config(name, {key: value for key, value in arguments.items() if key not in left_open})
    keys = config.model_dump(exclude={"name", "published", "pretrained", "num_classes"})
    published = config.published
    tuned = published.finetune_384 if published else None
    return ModelFacts(
        make_pretrained_cfg(config),
        keys,
        drop_path_rate=published.drop_path_rate if published else None,
        finetune_rate=tuned.drop_path_rate if tuned else None,
    )


def saved_config(model: MetaFormer | Any) -> dict[str, Any]:
    """What stands beside a model's weights in config.json, so that `create_model(checkpoint=...)` knows them.

    Of a timm model in timm's own form, with what is needed to build it here under `model`.
    """
    names = class_names_of(model)
    if isinstance(model, MetaFormer):
        return {"model": model.config.model_dump(), "class_names": names}
    about: dict[str, Any] = {**model.zoo_config, "num_classes": model.num_classes}
    if about["name"].startswith("timm/"):
        return {**saved_by_timm(model, names), "model": about}
    return {"architecture": about["name"].partition(".")[0], "model": about, "class_names": names}


def _checked_rate(name: object, rate: float | None, mode: str) -> float:
    """The rate of a foreign model, which is given its rate and mode only after it was built.

    Raises:
        ConfigError: One of them is wrong.
    """
    try:
        check_choice(mode, MODES, "mode")
        return check_drop_prob(rate, "rate")
    except ValueError as error:
        raise ConfigError(f"model {name}: {error}") from None


def _config(name: str | Path | MetaFormerConfig, overrides: Mapping[str, Any]) -> MetaFormerConfig:
    config = model_config(name)
    return override_config(config, overrides, source=f"model {name}") if overrides else config


def _load(
    name: object,
    model: MetaFormer,
    checkpoint: str | Path | None,
    overrides: Mapping[str, Any],
    class_names: Sequence[str] | None,
    allowed: tuple[bool, bool],
) -> list[str]:
    """Loads a model of ours, published weights where there is no checkpoint; returns what was done."""
    if checkpoint is None:
        saved = published_facts(model.config)
        # before fetching them
        checks = check_trained_as(model.config, saved, f"published weights of {name}", overrides)
        state, origin = load_timm_pretrained(model.config)
        trained = None  # published weights do not name their classes
    else:
        origin = str(checkpoint)
        state, saved = load_weights(Path(checkpoint))
        checks = check_trained_as(model.config, saved or {}, origin, overrides)
        trained = trained_class_names(saved or {})
    renamed = class_difference(trained, class_names) if trained and class_names is not None else None
    replace, adapt = allowed
    lines = load_into(model, state, origin, replace_classifier=replace, adapt_input=adapt, renamed=renamed)
    _take_names(model, saved, trained, class_names)
    return lines + checks


def _load_foreign(
    model: nn.Module, checkpoint: Path, class_names: Sequence[str] | None, replace: bool, adapt: bool
) -> list[str]:
    """Loads a model of timm or torchvision; returns what was done."""
    state, saved = load_weights(checkpoint)
    origin, trained = str(checkpoint), trained_class_names(saved or {})
    checks = check_saved_as(model, saved or {}, origin)
    renamed = class_difference(trained, class_names) if trained and class_names is not None else None
    lines = load_foreign(model, state, origin, replace_classifier=replace, adapt_input=adapt, renamed=renamed)
    _take_names(model, saved, trained, class_names)
    return lines + checks


def _take_names(
    model: nn.Module, saved: Mapping[str, Any] | None, trained: list[str] | None, given: Sequence[str] | None
) -> None:
    """Gives a model the names of its weights' classes, where it has their classifier and no names were given."""
    if trained and given is None and model.num_classes == _trained_classes(saved or {}):
        set_class_names(model, trained)


def class_names_of(model: nn.Module) -> list[str] | None:
    """Names of a model's classes in the order of its logits, as timm has them (`pretrained_cfg["label_names"]`), or None.

    There may be fewer than logits: those behind the last name stand for no class.
    """
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    return list(names) if names else None


def set_class_names(model: MetaFormer | Any, names: Sequence[str]) -> None:
    """Names a model's classes. The names go with its weights: into folders, and into what is exported.

    Args:
        model: Receives the names; its classifier stays as it is.
        names: In the order of the logits, at most as many.

    Raises:
        ConfigError: There are more names than logits, or a name is empty, given twice, or no text.
    """
    _check_names(names)
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ConfigError(f"class_names: {twice!r} is given twice")
    if len(names) > model.num_classes:
        raise ConfigError(
            f"class_names: {counted(len(names), 'name')} for a model of {counted(model.num_classes, 'class')}"
        )
    model.pretrained_cfg["label_names"] = list(names)


def _check_names(names: Any) -> None:
    listed = isinstance(names, Sequence) and not isinstance(names, (str, bytes))
    bad = [name for name in names if not isinstance(name, str) or not name] if listed else [names]
    if bad or not names:
        raise ConfigError(f"class_names: must be a list of names, got {bad[0] if bad else names!r}")


def class_difference(before: Sequence[str], now: Sequence[str]) -> str | None:
    """How two lists of class names differ, in words; None where they are equal."""
    if list(before) == list(now):
        return None
    old, new = set(before), set(now)
    parts = {"gone": [n for n in before if n not in new], "new": [n for n in now if n not in old]}
    said = [f"{what}: {_some(names)}" for what, names in parts.items() if names]
    if said:
        return f"classes {', '.join(said)}"
    index = next(i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)
    return f"the same classes in another order: class {index} was {before[index]!r}, is {now[index]!r}"


def trained_class_names(saved: Mapping[str, Any]) -> list[str] | None:
    """Names of the classes of weights, as their config.json has them: ours (`class_names`) or timm's (`label_names`)."""
    names = saved.get("class_names", saved.get("label_names"))
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


def _trained_classes(saved: Mapping[str, Any]) -> Any:
    return known_section(saved, "model").get("num_classes", saved.get("num_classes"))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
