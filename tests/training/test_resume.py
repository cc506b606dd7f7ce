"""A run that was interrupted ends as one that was not: a sample of test_resume_matrix.py, controls, known faults."""

from pathlib import Path

import pytest
import torch

from tests.training.parts import build_tiny
from tests.training.resumes import (
    FACTORS,
    interrupted,
    killed,
    pairs_in,
    result,
    rows_of_pairs,
    settings,
    train,
    without_state,
    write_images,
)
from training.data.loading import EpochSampler
from training.run_folder import RunFolder
from training.state import RunState

ROW = {"mode": "skip", "schedule": "ramp", "accumulate": "2", "ema": "ema", "mixing": "mixup", "erasing": "erasing",
       "workers": "0", "data": "folder", "saving": "thread", "killed": "in a step"}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "images"
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return result(folder, train(folder, settings(ROW, root)))


def test_the_rows_have_every_pair() -> None:
    rows = rows_of_pairs(FACTORS)
    covered = set().union(*(pairs_in(row, FACTORS) for row in rows))
    sizes = [len(values) for values in FACTORS.values()]
    assert len(covered) == (sum(sizes) ** 2 - sum(size**2 for size in sizes)) / 2
    assert all(row.keys() == FACTORS.keys() for row in rows) and len(rows) < 60, len(rows)


# 5 batches of 2 accumulated are 3 steps per epoch, of 3 epochs; checkpoints at steps 2, 3, 4, 6, 8, 9
@pytest.mark.parametrize(
    "stops",
    [
        [("in a step", 2)],  # before any checkpoint
        [("in a step", 6), ("in a step", 1), ("in a step", 2)],  # right after a resume, and twice within an epoch
        [("in validation", 2), ("behind its row", 2)],
        [("before validation", 1), ("before validation", 3)],  # at the end of each epoch
    ],
    ids=lambda stops: f"{len(stops)} {stops[0][0]}",
)
def test_interrupted_and_resumed(stops: list, whole: dict, root: Path, tmp_path: Path) -> None:
    assert interrupted(tmp_path / "run", settings(ROW, root), stops, []) == whole


def test_a_checkpoint_before_every_worker_has_stepped(whole: dict, root: Path, tmp_path: Path) -> None:
    """One batch of two workers, each of which has more in the making, is all that was trained on."""
    row = {**ROW, "accumulate": "1", "workers": "2"}
    often = "checkpoint.every_steps=1"
    straight = train(tmp_path / "whole", settings({**row, "workers": "0"}, root))
    found = interrupted(tmp_path / "run", [*settings(row, root), often], [("in a step", 2)], ["data.workers=1"])
    assert found == result(tmp_path / "whole", straight)


@pytest.mark.parametrize("name", ["model", "optimizer", "ema", "random", "progress", "drop_path"])
def test_without_a_state_the_result_differs(name: str, whole: dict, root: Path, tmp_path: Path) -> None:
    """The controls: each state is needed, and the tests above would find it missing. The scaler is off on a CPU."""
    folder = tmp_path / "run"
    with without_state(name):
        with killed("in a step", 6), pytest.raises(Exception, match="in a step"):
            train(folder, settings(ROW, root))
        summary = train(folder, settings(ROW, root), resume=True)
    found = result(folder, summary)
    key = {"ema": "ema_sha256", "drop_path": "drop_path"}.get(name, "weights_sha256")
    assert found[key] != whole[key]
    assert (found["weights_sha256"] == whole["weights_sha256"]) == (name in ("ema", "drop_path"))


@pytest.mark.parametrize("workers", [0, 2])
def test_later_epochs_are_whole_after_a_resume_in_mid_epoch(workers: int, root: Path) -> None:
    """Persistent workers are told anew where an epoch begins and how long it is."""
    row = {**ROW, "workers": str(workers), "erasing": "none"}
    setup, straight = build_tiny(*settings(row, root)), build_tiny(*settings({**row, "workers": "0"}, root))
    assert setup.train_loader.persistent_workers == (workers > 0)
    for epoch, batch in ((0, 3), (1, 0), (2, 4), (3, 5), (4, 0)):
        expected = []
        for each in (setup, straight):
            each.sampler.set_position(epoch, batch)
            expected.append([indices.tolist() for _, _, indices in each.train_loader])
        assert expected[0] == expected[1] and len(expected[0]) == 5 - batch


def test_no_batch_is_asked_for_before_the_state_is_loaded(root: Path, tmp_path: Path, monkeypatch) -> None:
    """An iterator made before has the first samples of the first epoch in the making."""
    order: list[str] = []
    with killed("in a step", 6), pytest.raises(Exception, match="in a step"):
        train(tmp_path / "run", settings(ROW, root))
    restore, iterate = RunState.restore, EpochSampler.__iter__
    monkeypatch.setattr(RunState, "restore", lambda *a: (order.append("state"), restore(*a))[1])
    monkeypatch.setattr(
        EpochSampler, "__iter__", lambda s: (order.append(f"{s.epoch}, {s.start_batch}"), iterate(s))[1]
    )
    train(tmp_path / "run", settings(ROW, root), resume=True)
    assert order == ["state", "1, 2", "2, 0"]


def test_the_generators_are_put_back_last(whole: dict, root: Path, tmp_path: Path, monkeypatch) -> None:
    """What is built after the state was loaded, and may draw, changes nothing."""
    with killed("in a step", 6), pytest.raises(Exception, match="in a step"):
        train(tmp_path / "run", settings(ROW, root))
    cut = RunFolder.cut_metrics
    monkeypatch.setattr(RunFolder, "cut_metrics", lambda *a: (torch.rand(9), cut(*a))[1])
    assert train(tmp_path / "run", settings(ROW, root), resume=True)["weights_sha256"] == whole["weights_sha256"]
