"""What the report of a run shows of its data and predictions, measured once at its end: the content of evaluation.json.

One more pass over the validation data in evaluation mode, and the images of one training batch: nothing is learned, no
counter moves, and the global generators are left as they were.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.console import StopSignals
from training.data.draws import global_generators_kept
from training.data.skipping import PartialBatch, collate
from training.evaluating.per_sample import PerSample
from training.evaluation import evaluate
from training.metrics import evaluation_metrics
from training.setup import Setup
from training.sharding import gathered

MOST_MISTAKES = 24
MOST_OF_BATCH = 16
LARGEST_SIDE = 112
"""Of a picture, in pixels."""


def measure(setup: Setup, *, signals: StopSignals) -> dict[str, Any] | None:
    """Looks at the model whose accuracy counts as it is now; every process calls it.

    Args:
        setup: The run, after its last step.
        signals: May end it early.

    Returns:
        What evaluation.json holds, but for the epoch; None on all processes where a signal came, and on all but the main
        one. Pairs of classes are [label, prediction, samples]; bins of confidence [samples, hits, sum of confidences].

    Raises:
        ReadError: See `evaluate`.
    """
    world, data = setup.world, setup.data
    metrics, predictions = evaluation_metrics()
    predictions.with_confusion = False  # per sample is more, and smaller than K x K
    ece = next(metric for metric in metrics if metric.gathering is predictions)
    per_sample = PerSample(len(data.val))
    with global_generators_kept(), gathered(setup.evaluated):
        world.share(setup.evaluated.buffers())
        batches = per_sample.watch(signals.until_told(setup.val_batches()))
        evaluate(setup.evaluated, batches, [ece, per_sample], world=world, autocast=setup.autocast())
    if world.any(signals.received is not None) or not world.is_main:
        return None
    classes = len(data.class_names)
    names = [_text(name) for name in data.class_names]
    names += [f"unnamed {i}" for i in range(classes, setup.model.num_classes)]
    notes: list[str] = []
    return {
        "samples": int(per_sample.value()),
        "classes": names,
        "pairs": _pairs(per_sample, data.val.targets, len(names)),
        "bins": predictions.bins.T.tolist(),
        "mistakes": _attempt(lambda: _mistakes(setup, per_sample, names), "mistakes", notes),
        "batch": _attempt(lambda: _first_batch(setup, names), "the training batch", notes),
        "notes": notes,
    }


def _attempt(work: Callable[[], list[Any]], what: str, notes: list[str]) -> list[Any]:
    """What it gives; nothing, and a note, where it cannot be shown."""
    try:
        with global_generators_kept():
            return work()
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        notes.append(f"Pictures of {what} cannot be shown: {reason}")
        return []


def _pairs(per_sample: PerSample, targets: Sequence[int], classes: int) -> list[list[int]]:
    """[label, prediction, samples] of all pairs that occur."""
    seen, prediction = per_sample.table[:, :2].T.numpy()
    keys = (np.asarray(targets, dtype=np.int64) * classes + prediction.astype(np.int64))[(seen > 0) & (prediction >= 0)]
    keys, counts = np.unique(keys, return_counts=True)
    return [[key // classes, key % classes, count] for key, count in zip(keys.tolist(), counts.tolist(), strict=True)]


def _mistakes(setup: Setup, per_sample: PerSample, names: Sequence[str]) -> list[dict[str, Any]]:
    """The surest mistakes, as the model saw them."""
    val, told = setup.data.val, []
    for mistake in per_sample.mistakes(list(val.targets))[:MOST_MISTAKES]:
        image = setup.to_device(val[mistake.index][0][None])[0]
        told.append(
            {
                "image": _picture(setup, image),
                "name": _text(val.source.name(mistake.index)),
                "label": names[mistake.label],
                "prediction": names[mistake.prediction],
                "probability": round(mistake.probability, 6),
            }
        )
    return told


def _first_batch(setup: Setup, names: Sequence[str]) -> list[dict[str, Any]]:
    """Images of the first training batch of the main process after all that is done to them, with their targets.

    Of a large batch those at either end: mixing pairs the first image with the last, the second with the last but one,
    and draws once for the batch, so that these are mixed as they were in training.
    """
    order = setup.sampler.order(0)[: setup.sampler.batch_size].tolist()
    even, half = len(order) // 2 * 2, MOST_OF_BATCH // 2
    rows = order if len(order) <= MOST_OF_BATCH else order[:half] + order[even - half : even]
    batch = collate(setup.data.train.__getitems__([(0, *row) for row in rows]))
    images, targets, indices = batch.batch if isinstance(batch, PartialBatch) else batch
    images, targets = setup.to_device(images), targets.to(setup.world.device)
    images = setup.data.erase(images, indices, epoch=0, batch=0)
    images, targets = setup.mixer(images, targets, 0, epoch=0)
    return [
        {"image": _picture(setup, image), "labels": _labels(target, names, setup.mixer.smoothing)}
        for image, target in zip(images, targets, strict=True)
    ]


def _labels(target: Tensor, names: Sequence[str], smoothing: float) -> list[list[Any]]:
    """[name, share] of the classes that a target mixes, without the share of label smoothing."""
    if not target.ndim:
        return [[names[int(target)], 1.0]]
    excess = (target.float().cpu() - smoothing / len(target)).clamp(min=0)
    weights, classes = (excess / excess.sum()).topk(min(2, len(target)))
    pairs = zip(classes.tolist(), weights.tolist(), strict=True)
    return [[names[i], round(weight, 4)] for i, weight in pairs if weight > 0.005]


def _picture(setup: Setup, image: Tensor) -> str:
    """The model's input (C, H, W) as a picture in an address: PNG where it is tiny, else a JPEG of at most `LARGEST_SIDE`."""
    cfg = setup.model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    pixels = (image.detach().float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    pixels = pixels if len(pixels) in (1, 3) else pixels.float().mean(dim=0, keepdim=True).byte()
    array = pixels.permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    small = max(picture.size) <= 64
    if not small:
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file = io.BytesIO()
    if small:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=80)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def _text(name: str) -> str:
    """A name that any file can hold: those of files may be any bytes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
