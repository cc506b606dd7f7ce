"""Whether a model takes the image sizes that training goes through (`data.image_size_schedule`)."""

from collections.abc import Sequence
from typing import Any

import torch

from files.errors import ConfigError


@torch.no_grad()
def check_sizes(model: Any, schedule: Sequence[Sequence[int]] | None) -> None:
    """Shows a model one black image of each size.

    Args:
        model: On the CPU; left in the mode it was in.
        schedule: [epoch, size] pairs.

    Raises:
        ConfigError: For the first size that it refuses, with its reason.
    """
    channels, *own = model.pretrained_cfg["input_size"]
    training = model.training
    model.eval()
    try:
        for size in dict.fromkeys(size for _, size in schedule or ()):
            if [size, size] == own:
                continue
            try:
                model(torch.zeros(1, channels, size, size))
            except Exception as error:  # somebody's model may raise anything
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ConfigError(
                    f"data.image_size_schedule: the model does not take images of {size} x {size} ({reason}); use sizes that "
                    "it takes, or a model of any size (of many transformers of timm: model.dynamic_img_size=true)"
                ) from None
    finally:
        model.train(training)
