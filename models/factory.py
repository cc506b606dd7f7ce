"""create_model: a registered name or a YAML -> a model, with or without weights."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from layers.drop_path import Mode
from models.config import override_config
from models.metaformer import MetaFormer
from models.pretrained import load_into, load_timm_pretrained
from models.registry import model_config
from models.strict_yaml import ConfigError
from models.weights import load_weights

logger = logging.getLogger(__name__)


def create_model(
    name: str,
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
        name: A registered name, also with a tag of published weights (`caformer_s18.sail_in22k`), or a path to a YAML.
        pretrained: Load the published weights through timm's hub code.
        checkpoint: Load weights from a file (safetensors or torch state dict) or from a folder with
            `model.safetensors`, such as a run's `best`.
        num_classes: Default: the config's. Where it differs from the weights', the classifier is replaced.
        in_chans: Input channels. Default: the config's, 3 in all published models.
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
    name, _, tag = name.partition(".") if not name.endswith((".yaml", ".yml")) else (name, "", "")
    config = model_config(name)
    if tag and tag not in config.pretrained:
        known = ", ".join(config.pretrained) or "none"
        raise ConfigError(f"model {name!r} has no published weights with the tag {tag!r}; it has: {known}")
    chosen = {"num_classes": num_classes, "in_chans": in_chans}
    overrides |= {key: value for key, value in chosen.items() if value is not None}
    if overrides:
        config = override_config(config, overrides, source=f"model {name}")
    try:
        model = MetaFormer(config, drop_path_rate or 0.0, drop_path_mode)
    except ValueError as error:
        raise ConfigError(f"model {name}: {error}") from None

    if pretrained:
        state, origin = load_timm_pretrained(config, tag)
    elif checkpoint is not None:
        state, origin = load_weights(Path(checkpoint))[0], str(checkpoint)
    else:
        return model
    for line in load_into(model, state, origin, replace_classifier=num_classes is not None or pretrained):
        logger.info(line)
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of frozen parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) - trainable
