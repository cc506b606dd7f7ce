"""Published weights, through timm's own hub code."""

from collections.abc import Callable

import timm
from huggingface_hub import constants as hub
from safetensors import SafetensorError
from torch import nn

from files.errors import ConfigError
from models.config import MetaFormerConfig
from models.layouts import StateDict


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
    source = through_hub(name, lambda: timm.create_model(name, pretrained=True))
    return dict(source.state_dict()), f"timm {name}"


def through_hub(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """A model that its library builds with published weights; its cache and its offline behaviour hold.

    Raises:
        ConfigError: The weights could not be had, with the reason.
    """
    try:
        return build()
    except Exception as error:  # the hub raises what its transport raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = f"looked in {hub.HF_HUB_CACHE}; on a machine without a network set HF_HUB_OFFLINE=1"
        if isinstance(error, SafetensorError):
            hint = f"delete the damaged models--timm--{name} in {hub.HF_HUB_CACHE}"
        raise ConfigError(f"published weights {name} could not be loaded: {reason} ({hint})") from error
