"""create_model: a registered name or a YAML -> a model, with or without weights."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from layers.drop_path import Mode
from models.config import MetaFormerConfig, override_config
from models.metaformer import MetaFormer
from models.pretrained import load_into, load_timm_pretrained
from models.registry import is_model, model_config
from models.strict_yaml import ConfigError, nearest
from models.weights import load_weights

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
    **overrides: Any,
) -> MetaFormer:
    """Builds a model.

    Args:
        name: A registered name, a path to a YAML, or a config. A name may carry a tag of published weights, which sets
            classes and image size to theirs: `caformer_s18.sail_in22k_ft_in1k_384`.
        pretrained: Load the published weights through timm's hub code.
        checkpoint: Load weights from a file (safetensors or torch state dict) or from a folder with
            `model.safetensors`, such as a run's `best` or what timm saved.
        num_classes: Default: the config's. Where it is given and differs from the weights', the classifier is replaced.
        in_chans: Input channels. Default: the config's, 3 in all published models. Where it is given and differs from
            the weights', their first convolution is adapted as timm does.
        drop_path_rate: Rate of the last block, rising linearly from 0; `None` means 0.
        drop_path_mode: `mask`, `skip` or `batch`; see `layers.drop_path.DropPath`.
        **overrides: Any key of the model's config.

    Returns:
        The model, in training mode as torch builds it.

    Raises:
        ConfigError: An unknown name or key, a wrong value, or weights that do not fit; says what is allowed.
    """
    if pretrained and checkpoint is not None:
        raise ConfigError("pretrained=True and checkpoint are two sources of weights; give one")
    config = model_config(name)
    chosen = {"num_classes": num_classes, "in_chans": in_chans}
    overrides |= {key: value for key, value in chosen.items() if value is not None}
    if overrides:
        config = override_config(config, overrides, source=f"model {name}")
    try:
        model = MetaFormer(config, drop_path_rate or 0.0, drop_path_mode)
    except ValueError as error:
        raise ConfigError(f"model {name}: {error}") from None

    lines: list[str] = []
    if pretrained:
        state, origin = load_timm_pretrained(config)
    elif checkpoint is not None:
        origin = str(checkpoint)
        state, saved = load_weights(Path(checkpoint))
        lines = _check_trained_as(config, saved or {}, origin)
    else:
        return model
    lines = [
        *load_into(
            model,
            state,
            origin,
            replace_classifier=num_classes is not None or pretrained,
            adapt_input=in_chans is not None or pretrained,
        ),
        *lines,
    ]
    for line in lines:
        logger.info(line)
    return model


def _check_trained_as(config: MetaFormerConfig, saved: dict[str, Any], origin: str) -> list[str]:
    """Compares a model with the config.json beside its weights in what their shapes do not tell.

    Args:
        config: The model to load into.
        saved: Ours (key `model`), timm's (key `architecture`) or anything else.
        origin: Where the weights come from, for messages.

    Returns:
        Settings that differ from those the weights were trained with, a line each.

    Raises:
        ConfigError: They are of another architecture.
    """
    trained, architecture = saved.get("model"), saved.get("architecture")
    if isinstance(architecture, str):
        if not is_model(architecture):
            raise ConfigError(
                f"{origin}: weights of {architecture!r}, which is not in the zoo{nearest(architecture, [config.name])}"
            )
        trained = model_config(architecture).model_dump()
    if not isinstance(trained, dict):
        return []
    own, lines = config.model_dump(), []
    for key in ("token_mixer", "norm", "act", "pool_size", "head_dim"):
        before, now = (config.per_stage(value) for value in (trained.get(key, own[key]), own[key]))
        if before != now and key == "token_mixer":
            raise ConfigError(
                f"{origin}: weights of {trained.get('name') or 'a model'!r}, another architecture than {config.name!r}: "
                f"token_mixer was {trained[key]}, is {own[key]}"
            )
        if before != now:
            lines.append(f"{key} is {own[key]}, the weights were trained with {trained[key]}")
    return lines


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of frozen parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) - trainable
