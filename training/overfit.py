"""Whether a model can learn one batch by heart, for --dry-run: model, data, loss and learning rate fit, or they do not."""

import copy
import math
import time

import torch
from torch import nn

from files.words import counted
from layers.drop_path import DropPath
from training.data.dataset import ValDataset
from training.data.skipping import collate
from training.optim import build_optimizer
from training.setup import Setup

IMAGES, STEPS, SECONDS = 64, 40, 30.0
"""At most so many images and steps; no step begins after so many seconds."""

_WARM_UP = 5  # steps
_FALLS = 0.9  # a loss that falls is at most this much of what it was


def overfit(setup: Setup, *, seconds: float = SECONDS) -> str:
    """Trains a copy of the model on one batch without augmentation, drop path and dropout; the run is left as it is.

    The optimizer is the run's, at its peak learning rate after a few steps; what is frozen in the first epoch stays so.

    Args:
        setup: The run, in training mode.
        seconds: See `SECONDS`.

    Returns:
        What became of the loss, with a warning where it does not fall.

    Raises:
        ReadError: An image of the batch cannot be read.
    """
    setup.sampler.set_position(0, 0)
    indices = [index for _, index, *_ in next(iter(setup.sampler))][:IMAGES]
    train = setup.data.train
    samples = ValDataset(train.source, train.pipeline).__getitems__(indices)
    images, targets, _ = next(setup.skips.read([collate(samples)]))
    try:
        losses = _train(setup, setup.to_device(images), targets.to(setup.world.device), seconds)
    except torch.OutOfMemoryError:
        return "one batch: not learned by heart, because the memory does not hold a copy of the model beside it"
    said = f"one batch of {len(images)}: loss {losses[0]:.4f} to {losses[-1]:.4f} in {counted(len(losses) - 1, 'step')}"
    if len(losses) <= _WARM_UP and math.isfinite(losses[-1]):
        return f"{said}; too few to tell anything, a step takes too long here"
    if not losses[-1] <= _FALLS * losses[0]:
        return (
            f"{said}\nwarning: the loss of a single batch does not fall; look at optim.lr, at the labels, and at what is "
            "frozen"
        )
    return f"{said}: it can be learned"


def _train(setup: Setup, images: torch.Tensor, targets: torch.Tensor, seconds: float) -> list[float]:
    """The loss before each step, and after the last."""
    optim, start = setup.config.optim, time.perf_counter()
    model = copy.deepcopy(setup.model)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    optimizer = build_optimizer(model, optim, setup.world.device)
    scaler = torch.amp.GradScaler(setup.world.device.type, enabled=setup.scaler.is_enabled())
    losses: list[float] = []
    for step in range(STEPS + 1):
        with setup.autocast():
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), targets)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or step == STEPS or time.perf_counter() - start > seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * group.get("lr_scale", 1.0) * min(1.0, (step + 1) / _WARM_UP)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        parameters = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, optim.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
    return losses
