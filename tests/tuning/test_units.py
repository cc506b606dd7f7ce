"""What has become of a unit is read from its folder; a real run is stopped, gone on with and scored."""

import json
from pathlib import Path

import pytest

from files.errors import ConfigError, Failure
from files.lock import locked
from tests.training.parts import TINY
from tests.tuning.parts import Trained, stand_in
from training import loop
from training.config import load_config
from training.non_finite import NonFiniteError
from training.run import run
from tuning import units
from tuning.units import FAILED, Unit, forget_failures, note_failure, read_failure, train_unit


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    return stand_in(monkeypatch)


def unit(tmp_path: Path, *overrides: str) -> Unit:
    return Unit(load_config(None, [*TINY, *overrides]), 3, tmp_path / "units" / "abc" / "seed-3")


def train(one: Unit) -> str | None:
    one.folder.mkdir(parents=True, exist_ok=True)
    with locked(one.folder):
        return train_unit(one)


def test_a_real_run_is_validated_once_and_scored(tmp_path: Path, capsys) -> None:
    one = unit(tmp_path)
    assert one.state == "missing"
    assert train(one) is None
    assert one.state == "done" and capsys.readouterr().out == ""
    score = one.score("val_top1")
    summary = json.loads((one.folder / "summary.json").read_text())
    assert score.value == pytest.approx(summary["final_top1"]) and score.steps == 10 == summary["steps"]
    rows = (one.folder / "metrics.csv").read_text().splitlines()
    assert ",nan," in rows[1] and "nan" not in rows[2], "the first epoch was not validated"
    assert not (one.folder / "report.html").exists() and (one.folder / "best").is_dir()
    assert (
        "final" not in (one.folder / "config.yaml").read_text()
        and "seed: 3" in (one.folder / "config.yaml").read_text()
    )
    assert "epoch   2/2" in (one.folder / "train.log").read_text()


def test_a_unit_ends_as_a_run_by_hand_does(tmp_path: Path) -> None:
    """Interrupted in the middle by a signal, and gone on with."""
    one = unit(tmp_path, "checkpoint.every_steps=3", "optim.epochs=3")
    one.folder.mkdir(parents=True)
    half = load_config(None, [*TINY, "checkpoint.every_steps=3", "seed=3", "optim.epochs=3", "log.validate_every=3"])
    stop_after = iter([None, None, None, "SIGTERM"])

    original = loop.train_step

    def step(setup, trained, batches, progress, *, loss_fn, signals):
        if next(stop_after, None):
            signals.ask("SIGTERM")
        return original(setup, trained, batches, progress, loss_fn=loss_fn, signals=signals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        assert train(one) == "SIGTERM"
    assert one.state == "interrupted"
    assert train(one) is None and one.state == "done"
    assert "going on from step 4" in (one.folder / "train.log").read_text()
    whole = run(half.model_copy(update={"log": half.log.model_copy(update={"report": False})}), tmp_path / "whole")
    summary = json.loads((one.folder / "summary.json").read_text())
    assert summary["weights_sha256"] == whole["weights_sha256"]


def test_early_stopping_keeps_its_validations(tmp_path: Path) -> None:
    assert unit(tmp_path).run_config.log.validate_every == 2
    early = unit(tmp_path, "early_stopping.patience=1").run_config
    assert early.log.validate_every == 1 and early.seed == 3


def test_states(tmp_path: Path, trained: Trained) -> None:
    one = unit(tmp_path)
    one.folder.mkdir(parents=True)
    assert one.state == "interrupted", "claimed, and then its process died"
    with locked(one.folder):
        assert one.state == "running"
    trained.stops = lambda config: "SIGINT"
    assert train(one) == "SIGINT" and one.state == "interrupted"
    trained.stops = lambda config: None
    train(one)
    assert one.state == "done"
    (one.folder / "summary.json").write_text('{"epochs": 2')
    assert one.state == "interrupted"
    (one.folder / "summary.json").write_text('{"epochs": 1, "final_top1": 3.0, "stopped_early": "no better"}')
    assert one.state == "done"


@pytest.mark.parametrize(
    ("error", "final"), [(Failure, False), (ConfigError, False), (NonFiniteError, True), (ZeroDivisionError, False)]
)
def test_a_failed_run_leaves_its_reason(tmp_path: Path, trained: Trained, error: type[Exception], final: bool) -> None:
    one = unit(tmp_path)
    trained.error, trained.fails = error, lambda config: "it is broken"
    assert train(one) is None
    assert one.state == "failed" and "it is broken" in str(read_failure(one.folder))
    assert "it is broken" in (one.folder / "train.log").read_text()
    assert forget_failures(tmp_path / "units") == (not final)
    assert one.state == ("failed" if final else "interrupted")


def test_a_failure_is_read_whatever_it_says(tmp_path: Path) -> None:
    assert read_failure(tmp_path) is None
    note_failure(tmp_path, "a\x00b", final=True)
    assert read_failure(tmp_path) == "a\\x00b"
    (tmp_path / FAILED).write_text("{")
    assert read_failure(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "does not report 'val_top1'"),
        ("epoch,val_loss\n1,2\n", "does not report 'val_top1'"),
        ("epoch,val_top1\n1,90\n2,nan\n", "val_top1 of the last epoch is nan"),
        ("epoch,val_top1\n1,90\n2,many\n", "does not report"),
        ("epoch,val_top1\n", "does not report"),
    ],
)
def test_a_metric_that_was_not_reported(tmp_path: Path, text: str, told: str) -> None:
    one = unit(tmp_path)
    one.folder.mkdir(parents=True)
    (one.folder / "metrics.csv").write_text(text)
    with pytest.raises(Failure, match=told):
        one.score("val_top1")


@pytest.mark.parametrize("none", ["null", "NaN", "Infinity"])
def test_costs_that_are_not_finite_count_as_none(tmp_path: Path, none: str) -> None:
    one = unit(tmp_path)
    one.folder.mkdir(parents=True)
    (one.folder / "metrics.csv").write_text("epoch,val_top1\n1,90\n")
    (one.folder / "summary.json").write_text(f'{{"steps": {none}, "seconds": {none}}}')
    assert one.score("val_top1") == (90.0, 0, 0.0)


def test_threads_are_the_config_s_where_it_says(tmp_path: Path, trained: Trained) -> None:
    for words, expected in (([], 2), (["runtime.threads=3"], 3)):
        one = unit(tmp_path, *words)
        one.folder.mkdir(parents=True, exist_ok=True)
        with locked(one.folder):
            train_unit(one, threads=2)
        assert trained.configs[-1].runtime.threads == expected


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match=r"cannot write to .*the study is intact"):
        units.make_unit_folder(tmp_path / "file" / "a")
