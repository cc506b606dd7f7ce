"""Weights & Biases: what it is told, under which id, and what happens without it."""

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from files.errors import ConfigError, Failure
from tests.training.parts import TINY, WORLD
from training.config import load_config
from training.non_finite import NonFiniteError
from training.report import page
from training.run import run
from training.run_folder import RunFolder
from training.tracking import NoTracker, open_tracker

SETTINGS = [*TINY, "log.wandb=digits"]


class FakeWandb(types.ModuleType):
    """Stands for the package: keeps what it is told, and draws a number as it may."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished: list[int] = []

    def init(self, **options: Any) -> Any:
        random.random()
        self.inits.append(options)
        return types.SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, scalars: dict[str, float], *, step: int) -> None:
        self.logged.append((scalars, step))

    def _finish(self, *, exit_code: int) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(page, "write_report", lambda _: None)
    return fake


def test_a_run_tells_its_config_and_each_epoch_and_goes_on_under_its_id(wandb: FakeWandb, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    run(load_config(None, SETTINGS), folder)
    (told,) = wandb.inits
    assert told["project"] == "digits" and told["name"] == "first" and told["resume"] == "allow"
    assert told["config"]["optim"]["lr"] == 3e-3 and told["config"]["model"]["num_classes"] == 10, "resolved"
    assert told["dir"] == str(folder) and told["id"] == json.loads((folder / "wandb.json").read_text())["id"]
    assert [step for _, step in wandb.logged] == [5, 10] and wandb.finished == [0]
    assert {"train_loss", "val_top1", "lr", "drop_path_rate"} <= wandb.logged[0][0].keys()
    assert not {"epoch", "step"} & wandb.logged[0][0].keys()
    run(load_config(None, SETTINGS), folder, resume=folder)
    assert wandb.inits[1]["id"] == told["id"] and wandb.finished == [0, 0]
    run(load_config(None, [*TINY, "optim.epochs=1", "optim.warmup_epochs=0", "log.wandb=other"]), tmp_path / "second")
    assert wandb.inits[2]["id"] != told["id"]


def test_what_wandb_draws_the_run_does_not(wandb: FakeWandb, tmp_path: Path) -> None:
    random.seed(3)
    expected = random.Random(3).random()
    (tmp_path / "run").mkdir()
    open_tracker(load_config(None, SETTINGS), RunFolder(tmp_path / "run"), WORLD)
    assert random.random() == expected


def test_a_run_that_fails_is_told_as_failed(wandb: FakeWandb, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        run(
            load_config(None, [*SETTINGS, "optim.lr=1e30", "optim.warmup_epochs=0", "optim.name=sgd"]), tmp_path / "run"
        )
    assert wandb.finished == [1]


def test_without_the_package_a_run_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log\.wandb: needs the package wandb .*pip install -e '\.\[wandb\]'"):
        run(load_config(None, SETTINGS), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_wandb_says_costs_two_lines(wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("api_key not configured\n(no-tty). call wandb.login")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(Failure, match=r"cannot start \(RuntimeError: api_key not configured \(no-tty\)") as caught:
        run(load_config(None, SETTINGS), tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 2


def test_off_it_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = open_tracker(load_config(None, TINY), RunFolder(tmp_path), WORLD)
    assert isinstance(tracker, NoTracker)
    tracker.write({}, 0)
    tracker.finish(False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", '{"id": 3}', "{"])
def test_a_damaged_id_is_replaced(content: str, wandb: FakeWandb, tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text(content)
    open_tracker(load_config(None, SETTINGS), RunFolder(tmp_path), WORLD)
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": wandb.inits[0]["id"]}
