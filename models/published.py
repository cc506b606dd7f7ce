"""Published weights, through timm's own hub code."""

import timm
from huggingface_hub import constants as hub
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg

from files.errors import ConfigError, nearest
from models.config import MetaFormerConfig
from models.layouts import StateDict


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


def load_timm_pretrained(config: MetaFormerConfig) -> tuple[StateDict, str]:
    """The first of a model's published weights, through timm's hub code: its cache, its offline behaviour.

    Args:
        config: A published model's config.

    Returns:
        The weights in timm's layout, with the classes and input channels they were published with, and their origin.

    Raises:
        ConfigError: There are none, or they could not be had, with the reason.
    """
    if not config.pretrained:
        raise ConfigError(f"model {config.name!r} has no published weights in timm; give checkpoint=...")
    name = f"{config.name}.{config.pretrained[0]}"
    try:
        source = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub raises what its transport raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = f"looked in {hub.HF_HUB_CACHE}; on a machine without a network set HF_HUB_OFFLINE=1"
        if isinstance(error, SafetensorError):
            hint = f"delete the damaged models--timm--{name} in {hub.HF_HUB_CACHE}"
        raise ConfigError(f"published weights {name} could not be loaded: {reason} ({hint})") from error
    return dict(source.state_dict()), f"timm {name}"
