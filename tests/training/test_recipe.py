"""What is not in every run: its sections, and that runs with it go on bit by bit as if nobody had interrupted them."""

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.training.parts import TINY
from training import loop
from training.config import load_config
from training.loop import Stepped
from training.recipe import EarlyStoppingSection
from training.report import page
from training.run import run
from training.state import Progress


def test_less_is_better_of_losses_and_errors() -> None:
    assert EarlyStoppingSection(metric="val_loss").sign == -1 and EarlyStoppingSection().sign == 1
    assert EarlyStoppingSection(metric="val_loss", mode="max").sign == 1


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends SIGUSR1 during that step, counted from 1, so that the run saves and stops behind it."""
    real = loop.train_step

    def sending(setup: Any, trained: Any, batches: list[Any], progress: Progress, **options: Any) -> Stepped:
        if progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(setup, trained, batches, progress, **options)

    monkeypatch.setattr(loop, "train_step", sending)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in csv.DictReader(file)
        ]


# 4 epochs of 5 steps. What is given here is added to a run with an average, mixup and a ramp of drop-path rates.
FULL = [*TINY, "optim.epochs=4", "ema.enabled=true", "ema.decay=0.9", "augment.mixup=0.2",
        "drop_path.schedule={kind: ramp, start: 0.5}"]  # fmt: skip
FEATURES: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "step": (["optim.schedule=step", "optim.decay_epochs=1.5"], (7, 8)),
    "cycles": (["optim.cycle_limit=2", "optim.cycle_mul=2", "optim.cooldown_epochs=1"], (12,)),
    "early_stopping": (["early_stopping={patience: 1, metric: val_loss, min_delta: 0.5}"], (3, 5, 8)),
    "soft": (["distill={teacher: TEACHER, alpha: 0.7, temperature: 2.0}"], (3, 5)),
    "hard": (["distill={teacher: TEACHER, kind: hard}"], (8,)),
    "sizes": (["data.image_size_schedule=[[0, 6], [2, 8]]", "data.workers=1"], (3, 10, 13)),
    "probe": (["freeze.epochs=2", "model.drop_rate=0.1"], (3, 10, 13)),
    "first_stage": (["freeze={epochs: all, stages: 1}"], (7,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_interrupted_and_resumed_equals_uninterrupted(feature: str, tmp_path: Path, monkeypatch) -> None:
    """At steps in mid-epoch and at the boundaries where the feature changes something."""
    monkeypatch.setattr(page, "write_report", lambda _: None)
    settings, steps = FEATURES[feature]
    plain = run(load_config(None, FULL), tmp_path / "plain")
    config = load_config(None, [*FULL, *(s.replace("TEACHER", str(tmp_path / "plain")) for s in settings)])
    whole = run(config, tmp_path / "whole")
    assert whole["weights_sha256"] != plain["weights_sha256"], "the feature does something"
    for step in steps:
        folder = tmp_path / f"stopped-{step}"
        with monkeypatch.context() as patch:
            interrupt(patch, step)
            assert run(config, folder)["stopped_by"] == "SIGUSR1"
        resumed = run(config, folder, resume=folder)
        for key in ("weights_sha256", "ema_sha256", "best_top1", "final_top1", "steps", "stopped_early"):
            assert resumed[key] == whole[key], f"{key}, stopped at step {step}"
        assert rows(folder) == rows(tmp_path / "whole")
