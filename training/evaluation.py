"""A model measured over batches; needs no optimizer and no run."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from training.data.dataset import ReadError
from training.distributed import ALONE, World, stop_together
from training.metrics import Metric


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    metrics: Sequence[Metric],
    *,
    world: World = ALONE,
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, float]:
    """Values of the metrics by column, over all batches of all processes.

    Args:
        model: Left in the mode it was in.
        batches: Of this process: images (B, ...) and targets (B,) on the model's device, and more that is not looked at.
        metrics: What to measure; whatever they held before is forgotten.
        world: The processes that share the images; each calls this.
        autocast: Precision of the forward pass; can be entered again and again.

    Raises:
        ReadError: On every process, where one could not read its data (see `SkipList.read`) or no image is left.
    """
    training = model.training
    model.eval()
    try:
        return evaluate_each([model], batches, [metrics], world=world, autocast=autocast)[0]
    finally:
        model.train(training)


@torch.no_grad()
def evaluate_each(
    models: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[tuple[Any, ...]],
    metrics: Sequence[Sequence[Metric]],
    *,
    world: World = ALONE,
    autocast: AbstractContextManager[Any] | None = None,
) -> list[dict[str, float]]:
    """Values of metrics for each of several models, or forms of one, in one pass over the data.

    Args:
        models: From images (B, ...) to logits; in evaluation already.
        batches: See `evaluate`.
        metrics: For each model its own.
        world: See `evaluate`.
        autocast: See `evaluate`.

    Raises:
        ReadError: See `evaluate`.
    """
    gathered = [list(dict.fromkeys(metric.gathering for metric in own)) for own in metrics]  # each once, though shared
    for gathering in (gathering for own in gathered for gathering in own):
        gathering.reset()
    images_seen, problem = 0, None
    try:
        for images, targets, *_ in batches:
            for model, own in zip(models, gathered, strict=True):
                with autocast or contextlib.nullcontext():
                    logits = model(images)
                logits = logits.float()
                for gathering in own:
                    gathering.update(logits, targets)
            images_seen += len(targets)
    except ReadError as error:
        problem = error
    stop_together(world, problem)
    if not world.any(images_seen > 0):
        raise ReadError("no image of the validation data could be read, so there is nothing to evaluate on")
    for gathering in (gathering for own in gathered for gathering in own):
        gathering.merge(world)
    return [{metric.column: metric.value() for metric in own} for own in metrics]
