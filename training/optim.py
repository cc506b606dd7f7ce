"""Optimizer and weight average: timm's and torch's, built from a training config."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.utils import ModelEmaV3
from torch import nn

from files.errors import ConfigError
from training.config import EmaSection, OptimSection


def build_optimizer(
    model: nn.Module, optim: OptimSection, device: torch.device, *, thaws: bool = False
) -> torch.optim.Optimizer:
    """timm's optimizer of that name; no weight decay on biases, norms and scales; torch's fused form of it if there is one.

    Args:
        model: What it trains.
        optim: The config's section.
        device: Where the model is.
        thaws: Whether some parameters get their first gradient later than others. torch's fused SGD (2.14) raises at that
            step, since some have a momentum then and some have none.

    Raises:
        ConfigError: The optimizer does not take one of the settings given, or does not run here.
    """
    _check_settings(optim)
    options: dict[str, Any] = {}
    if optim.betas is not None:
        options["betas"] = tuple(optim.betas)
    if optim.eps is not None:
        options["eps"] = optim.eps
    if device.type in ("cuda", "cpu") and optim.name in ("adam", "adamw", "sgd"):
        options["fused"] = not (thaws and optim.name == "sgd")
    try:
        return create_optimizer_v2(
            model,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim: {optim.name} does not take a setting given: {error}") from None
    except (AssertionError, ImportError) as error:  # timm's way to say that APEX, bitsandbytes or a GPU is missing
        raise ConfigError(f"optim.name: {optim.name} cannot be used here: {error}") from None


def _check_settings(optim: OptimSection) -> None:
    """Refuses what timm would drop in silence, and what fails only at the first step."""
    info = get_optimizer_info(optim.name)
    if info.second_order:
        raise ConfigError(
            f"optim.name: {optim.name} needs second derivatives, which the training loop does not compute"
        )
    if optim.betas is not None and not (info.has_betas and info.num_betas == 2):
        takes = f"{info.num_betas} of them, not settable here" if info.has_betas else "none"
        raise ConfigError(f"optim.betas: a pair has no effect with {optim.name}, which takes {takes}; leave it out")
    if optim.eps is not None and not info.has_eps:
        raise ConfigError(f"optim.eps: has no effect with {optim.name}; leave it out")


def build_ema(model: nn.Module, ema: EmaSection) -> ModelEmaV3 | None:
    """timm's moving average of the weights, or `None` where it is off."""
    return ModelEmaV3(model, decay=ema.decay, use_warmup=ema.warmup) if ema.enabled else None
