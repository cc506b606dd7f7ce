"""Names of models: every YAML of configs/models, and what users register."""

import fnmatch
from pathlib import Path

import timm
from timm.models import get_pretrained_cfg

from configs import CONFIGS
from files.errors import ConfigError, nearest
from models.config import MetaFormerConfig, load_model_config, override_config
from models.timm_facts import is_foreign, list_foreign, suggest_foreign

_registered: dict[str, MetaFormerConfig] = {}


def register_model(source: str | Path | MetaFormerConfig, name: str | None = None) -> str:
    """Gives a model of one's own a name that `create_model` and `list_models` know.

    Args:
        source: A YAML file of the form of configs/models/*.yaml, or a config.
        name: Default: the file's or the config's name.

    Returns:
        The name.

    Raises:
        ConfigError: The file is wrong, or the name is taken.
    """
    config = source if isinstance(source, MetaFormerConfig) else load_model_config(Path(source))
    name = name or config.name
    if not name:
        raise ConfigError("register_model: a config without a name needs name=...")
    if is_model(name):
        raise ConfigError(f"model name {name!r} is taken; choose another")
    if is_path(name):
        raise ConfigError(f"model name {name!r} looks like the path of a YAML; choose another")
    _registered[name] = override_config(config, {"name": name}, source=f"register_model {name!r}")
    return name


def unregister_model(name: str) -> None:
    """Forgets a model registered with `register_model`; unknown names are ignored."""
    _registered.pop(name, None)


def list_models(filter: str = "*") -> list[str]:
    """Names in order, those that match a pattern: of the zoo, or of another library, as in `timm/conv*`."""
    if is_foreign(filter):
        return list_foreign(filter)
    return sorted(fnmatch.filter({*_files(), *_registered}, filter))


def is_model(name: str) -> bool:
    """Whether `create_model` knows the name."""
    if is_foreign(name):
        return bool(list_foreign(name))
    return name in _registered or name in _files()


def is_path(name: str) -> bool:
    """Whether a model is given as a path to its YAML, not by a registered name."""
    return name.endswith((".yaml", ".yml"))


def model_config(name: str | Path | MetaFormerConfig) -> MetaFormerConfig:
    """The config of a registered name, of a name with a tag of published weights, or of a path to a YAML.

    A config is returned as it is.

    Raises:
        ConfigError: Unknown, with the nearest name; or the YAML is wrong.
    """
    if isinstance(name, MetaFormerConfig):
        return name
    name = str(name)
    if is_foreign(name):
        raise ConfigError(f"{name} is no model of the zoo, so that it has no config of ours")
    if is_path(name):
        return load_model_config(Path(name))
    base, _, tag = (name, "", "") if is_model(name) else name.partition(".")
    if base in _registered:
        config = _registered[base]
    elif base in (files := _files()):
        config = load_model_config(files[base])
    else:
        hint = suggest_foreign(name) or nearest(base, list_models()) or "; `python -m models` lists them"
        raise ConfigError(f"unknown model {name!r}{hint} (a model of your own is given as a path ending in .yaml)")
    return published_config(config, tag) if tag else config


def published_config(config: MetaFormerConfig, tag: str) -> MetaFormerConfig:
    """The config with the classes, image size and crop of one of its published weights, which become its default.

    Raises:
        ConfigError: The model has no weights with that tag.
    """
    if tag not in config.pretrained:
        known = ", ".join(config.pretrained) or "none"
        raise ConfigError(
            f"model {config.name!r} has no published weights {tag!r}{nearest(tag, config.pretrained)}; it has: {known}"
        )
    facts = get_pretrained_cfg(f"{config.name}.{tag}") if timm.is_model(config.name) else None
    if facts is None:
        raise ConfigError(f"model {config.name!r}: timm {timm.__version__} has no weights {config.name}.{tag}")
    height, width = facts.input_size[1:]
    return config.model_copy(
        update={
            "num_classes": facts.num_classes,
            "image_size": height if height == width else [height, width],
            "crop_pct": facts.crop_pct,
            "interpolation": facts.interpolation,
            "mean": list(facts.mean),
            "std": list(facts.std),
            "pretrained": [tag, *(t for t in config.pretrained if t != tag)],
            "published": config.published_for(tag),
        }
    )


def _files() -> dict[str, Path]:
    return {path.stem: path for path in (CONFIGS / "models").glob("*.yaml")}
