"""Names of models: every YAML of configs/models, and what users register."""

import fnmatch
from pathlib import Path

from configs import CONFIGS
from models.config import MetaFormerConfig, load_model_config
from models.strict_yaml import ConfigError, nearest

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
    _registered[name] = config.model_copy(update={"name": name})
    return name


def unregister_model(name: str) -> None:
    """Forgets a model registered with `register_model`; unknown names are ignored."""
    _registered.pop(name, None)


def list_models(filter: str = "*") -> list[str]:
    """Registered names in order, those that match a pattern such as `pool*`."""
    return sorted(fnmatch.filter({*_files(), *_registered}, filter))


def is_model(name: str) -> bool:
    """Whether `create_model` knows the name."""
    return name in _registered or name in _files()


def is_path(name: str) -> bool:
    """Whether a model is given as a path to its YAML, not by a registered name."""
    return name.endswith((".yaml", ".yml"))


def model_config(name: str) -> MetaFormerConfig:
    """The config of a registered name, or of a path to a YAML.

    Raises:
        ConfigError: Unknown, with the nearest name; or the YAML is wrong.
    """
    if is_path(name):
        return load_model_config(Path(name))
    if name in _registered:
        return _registered[name]
    files = _files()
    if name in files:
        return load_model_config(files[name])
    hint = nearest(name, list_models()) or "; `python -m models` lists them"
    raise ConfigError(f"unknown model {name!r}{hint} (a model of your own is given as a path ending in .yaml)")


def _files() -> dict[str, Path]:
    return {path.stem: path for path in (CONFIGS / "models").glob("*.yaml")}
