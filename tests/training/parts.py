"""What tests of a run share: a tiny run, its batches and one step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.weights import weights_sha256
from training.config import load_config
from training.console import StopSignals
from training.distributed import World
from training.loop import train_step
from training.setup import Setup, build
from training.state import Progress

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))

# 1,437 digits in batches of 256 are 5 steps per epoch.
TINY = ["model={name: caformer_n4, in_chans: 1, image_size: 8, depths: [1, 1], dims: [16, 32]}",
        "data={dataset: digits, batch_size: 256, workers: 0}", "augment={hflip: 0, rotate: 10, label_smoothing: 0.1}",
        "optim={lr: 3e-3, epochs: 2, warmup_epochs: 1}", "drop_path={rate: 0.4, mode: skip}", "ema={enabled: false}",
        "runtime={device: cpu, precision: float32}", "checkpoint={every_epochs: 1}"]  # fmt: skip

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
Batch = tuple[Tensor, Tensor, Tensor]


def build_tiny(*overrides: str, world: World = WORLD) -> Setup:
    return build(load_config(None, [*TINY, *overrides]), world)


def first_batches(setup: Setup, count: int = 1) -> list[Batch]:
    setup.sampler.set_position(0, 0)
    batches = iter(setup.train_loader)
    return [next(batches) for _ in range(count)]


def step(setup: Setup, batches: list[Batch], number: int = 0) -> float:
    loss_fn = setup.loss_fn
    return train_step(
        setup, setup.model.train(), batches, Progress(step=number), loss_fn=loss_fn, signals=StopSignals()
    ).loss


def plain_ece(logits: Tensor, targets: Tensor) -> float:
    """Expected calibration error over 15 bins, sample by sample and bin by bin."""
    probabilities = logits.double().softmax(dim=1).tolist()
    error = 0.0
    told = [
        (max(row), row.index(max(row)) == target) for row, target in zip(probabilities, targets.tolist(), strict=True)
    ]
    for low in range(15):
        inside = [(sure, right) for sure, right in told if low / 15 < sure <= (low + 1) / 15]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(sure for sure, _ in inside) / len(inside)
            error += len(inside) / len(probabilities) * abs(accuracy - confidence)
    return error


def classifier(setup: Setup) -> nn.Linear:
    layer = setup.model.get_classifier()
    assert isinstance(layer, nn.Linear)
    return layer


def weights(setup: Setup) -> str:
    return weights_sha256(setup.model.state_dict())


def image_path(settings: list[str], name: str) -> Path:
    return Path(load_config(None, [*TINY, *settings]).data.root or "") / name
