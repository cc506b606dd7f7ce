"""Early stopping: what counts as better, and how a run ends by it."""

import json
import math
from pathlib import Path

import pytest
import torch

from files.errors import ConfigError
from tests.training.parts import TINY, WORLD
from training import loop
from training.config import load_config
from training.early_stopping import note_epoch, stop_reason
from training.metrics import METRICS
from training.recipe import EarlyStoppingSection
from training.report import page
from training.run import run
from training.state import Progress


def bad_epochs(values: list[float], **settings) -> list[int]:
    """The count after each of some epochs."""
    section = EarlyStoppingSection.model_validate({"patience": 9, **settings})
    progress, counts = Progress(), []
    for value in values:
        note_epoch(section, progress, {section.metric: value}, WORLD)
        counts.append(progress.bad_epochs)
    return counts


def test_better_is_more_or_less_and_by_how_much() -> None:
    values = [1.0, 2.0, 2.0, 2.05, 1.0, 3.0]
    assert bad_epochs(values) == [0, 0, 1, 0, 1, 0], "equal is not better"
    assert bad_epochs(values, min_delta=0.1) == [0, 0, 1, 2, 3, 0]
    assert bad_epochs(values, metric="val_loss") == [0, 1, 2, 3, 4, 5], "1.0 again is not better"
    assert bad_epochs([3.0, 2.0, 2.5, 1.0], metric="val_loss") == [0, 0, 1, 0]
    assert bad_epochs([3.0, 2.0], mode="min") == [0, 0]
    assert bad_epochs([math.nan, 1.0, math.nan, math.inf]) == [1, 0, 1, 2]


def test_it_stops_after_patience_and_says_why() -> None:
    section = EarlyStoppingSection(patience=2)
    progress = Progress(epoch=7, best_metric=97.5, bad_epochs=1)
    assert stop_reason(section, progress) is None
    note_epoch(section, progress, {"val_top1": 97.5}, WORLD)
    assert stop_reason(section, progress) == (
        "stopped early after epoch 7: val_top1 has not been better than 97.5 for 2 epochs"
    )
    assert "has not been finite for 2 epochs" in str(stop_reason(section, Progress(bad_epochs=2)))


def test_off_it_remembers_nothing() -> None:
    progress = Progress()
    for _ in range(3):
        note_epoch(EarlyStoppingSection(), progress, {}, WORLD)
    assert progress == Progress() and stop_reason(EarlyStoppingSection(), progress) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("early_stopping.metric=val_top2", "got 'val_top2'; did you mean 'val_top5'?"),
        ("early_stopping.min_delta=0.1", "no effect without early_stopping.patience"),
        ("early_stopping.patience=0", "at least 1"),
        ("early_stopping.pacience=3", "did you mean 'early_stopping.patience'?"),
    ],
)
def test_mistakes(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [setting])
    assert message in str(caught.value)


def test_a_run_ends_early_says_so_and_may_be_given_more(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(page, "write_report", lambda _: None)
    values = iter([50.0, 60.0, 60.0, 55.0] + [70.0] * 9)
    monkeypatch.setattr(
        loop, "validate", lambda *_, **__: {m.column: 1.0 for m in METRICS} | {"val_top1": next(values)}
    )
    settings = [*TINY, "optim.epochs=6", "checkpoint.every_epochs=5", "early_stopping.patience=2"]
    folder = tmp_path / "run"
    summary = run(load_config(None, settings), folder)
    said = "stopped early after epoch 4: val_top1 has not been better than 60 for 2 epochs"
    assert summary["stopped_early"] == said and said in capsys.readouterr().out
    assert summary["epochs"] == 4 and summary["best_top1"] == 60.0 and "stopped_by" not in summary
    assert json.loads((folder / "summary.json").read_text())["stopped_early"] == said
    assert run(load_config(None, settings), folder, resume=folder)["steps"] == 20, "it is over, and saved so"
    with pytest.raises(ConfigError, match=r"early_stopping\.metric is 'val_loss'"):
        run(load_config(None, [*settings, "early_stopping.metric=val_loss"]), folder, resume=folder)
    more = run(load_config(None, [*settings, "early_stopping.patience=3"]), folder, resume=folder)
    assert more["epochs"] == 6 and more["stopped_early"] is None
    torch.set_num_threads(1)
