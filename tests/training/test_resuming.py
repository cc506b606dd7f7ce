"""What may be different when a run goes on, and that it is said."""

import csv
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from files.errors import ConfigError
from tests.training.parts import TINY, build_tiny
from training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from training.config import dump_config, load_config
from training.distributed import World
from training.report import page
from training.resuming import changes, check_epochs, refuse_lost_checkpoints, same_total_batch
from training.run import dry_run, run
from training.run_folder import RunFolder
from training.setup import Setup
from training.state import RunState, Snapshot


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "write_report", lambda _: None)  # its pictures take longer than all the rest


def train(folder: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    config = load_config(RunFolder(folder).config if resume else None, [*(() if resume else TINY), *overrides])
    return run(config, folder, resume="auto" if resume else None)


def epochs_of(folder: Path) -> list[dict[str, str]]:
    with RunFolder(folder).metrics.open() as file:
        return list(csv.DictReader(file))


# ---- epochs -----------------------------------------------------------------------------------------------------

SCHEDULES = {
    "both": (
        ["drop_path.schedule={kind: ramp}"],
        "lr and drop-path schedules now run to epoch 4; the run is no longer",
    ),
    "lr": ([], "lr schedule now runs to epoch 4; the run is no longer that of the first config"),
    "drop path": (
        ["drop_path.schedule={kind: cosine}", "optim.schedule=constant"],
        "4: drop-path schedule now runs to",
    ),
    "none": (
        ["drop_path.schedule={kind: early, cutoff_epochs: 1}", "optim.schedule=constant"],
        "no schedule depends on",
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_change_of_schedules_is_said(name: str, tmp_path: Path) -> None:
    overrides, words = SCHEDULES[name]
    folder = RunFolder(tmp_path)
    folder.config.write_text(dump_config(build_tiny(*overrides).config))
    checkpoint = saved_by(1, tmp_path, epoch=0, batch=0)
    checkpoint = replace(checkpoint, rank_states=())
    (told,) = changes(folder, checkpoint, build_tiny(*overrides, "optim.epochs=4"))
    assert told.startswith("optim.epochs was 2, is now 4") and words in told
    assert changes(folder, checkpoint, build_tiny(*overrides)) == []


def test_epochs_may_be_raised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path)
    capsys.readouterr()
    summary = train(tmp_path, "optim.epochs=4", resume=True)
    assert capsys.readouterr().err.count("warning: optim.epochs was 2, is now 4: lr schedule now runs to epoch 4") == 1
    assert summary["epochs"] == 4 and summary["steps"] == 20
    assert load_config(RunFolder(tmp_path).config).optim.epochs == 4
    rows = epochs_of(tmp_path)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[2]["lr"]) > float(rows[3]["lr"])
    RunFolder(tmp_path).metrics.unlink()
    train(tmp_path, resume=True)
    told = capsys.readouterr().err
    assert "optim.epochs was" not in told, "it is the run's config now"
    assert "metrics.csv tells of 0 of the 3 epochs done; the others are lost" in told
    assert len(epochs_of(tmp_path)) == 1


@pytest.mark.slow
def test_without_a_schedule_more_epochs_are_what_a_longer_run_is(tmp_path: Path) -> None:
    plain = ["optim.schedule=constant"]
    whole = train(tmp_path / "whole", *plain, "optim.epochs=3")
    train(tmp_path / "run", *plain)
    assert train(tmp_path / "run", "optim.epochs=3", resume=True)["weights_sha256"] == whole["weights_sha256"]


def test_fewer_epochs_than_begun_are_refused(tmp_path: Path) -> None:
    train(tmp_path, "optim.epochs=3", "checkpoint.every_steps=2", "checkpoint.keep=9")
    config = load_config(RunFolder(tmp_path).config)
    checkpoints = RunFolder(tmp_path).checkpoints
    for step, begun in ((4, 1), (5, 1), (6, 2), (15, 3)):
        checkpoint = load_checkpoint(checkpoints / f"step-{step:08d}")
        for epochs in range(1, 4):
            other = config.model_copy(update={"optim": config.optim.model_copy(update={"epochs": epochs})})
            if epochs < begun:
                with pytest.raises(
                    ConfigError, match=rf"optim\.epochs is {epochs}, but .* is in epoch {begun}; give at"
                ):
                    check_epochs(checkpoint, other)
            else:
                check_epochs(checkpoint, other)
    before = RunFolder(tmp_path).config.read_text()
    with pytest.raises(ConfigError, match=r"optim\.epochs is 2"):
        train(tmp_path, "optim.epochs=2", resume=True)
    assert RunFolder(tmp_path).config.read_text() == before


# ---- precision --------------------------------------------------------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_a_run_keeps_its_precision_on_another_machine(
    bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, bfloat16=bfloat16)
    whole = train(tmp_path, "runtime.precision=auto")
    own, other = ("bfloat16", "float32")[:: 1 if bfloat16 else -1]
    assert load_config(RunFolder(tmp_path).config).runtime.precision == own
    machine(monkeypatch, bfloat16=not bfloat16)
    assert build_tiny("runtime.precision=auto").config.runtime.precision == other, "of a new run there"
    middle = RunFolder(tmp_path).checkpoints / "step-00000005"
    for config in (load_config(RunFolder(tmp_path).config), load_config(None, [*TINY, "runtime.precision=auto"])):
        assert run(config, tmp_path, resume=middle)["weights_sha256"] == whole["weights_sha256"]
        assert load_config(RunFolder(tmp_path).config).runtime.precision == own
    with pytest.raises(ConfigError, match=rf"--resume: runtime\.precision is '{other}', but the run in .* has '{own}'"):
        run(load_config(None, [*TINY, f"runtime.precision={other}"]), tmp_path, resume=middle)


def test_a_run_that_did_not_write_down_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In older versions `auto` was float32 on every CPU, and config.yaml said auto."""
    machine(monkeypatch, bfloat16=True)
    whole = train(tmp_path, "runtime.precision=float32")
    folder = RunFolder(tmp_path)
    folder.config.write_text(folder.config.read_text().replace("precision: float32", "precision: auto"))
    assert load_config(folder.config).runtime.precision == "auto"
    again = run(load_config(folder.config), tmp_path, resume=folder.checkpoints / "step-00000005")
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert load_config(folder.config).runtime.precision == "float32"
    assert train(tmp_path / "other", "runtime.precision=auto")["weights_sha256"] != whole["weights_sha256"]


# ---- processes --------------------------------------------------------------------------------------------------


def saved_by(size: int, folder: Path, *, epoch: int, batch: int, overrides: tuple[str, ...] = ()) -> Checkpoint:
    """A checkpoint as that many processes would have saved it, each with sums of its own."""
    setup = build_tiny(*overrides, world=rank(0, size))
    state = RunState(setup)
    state.progress.epoch, state.progress.batch = epoch, batch
    state.progress.step = epoch * setup.steps_per_epoch + -(-batch // setup.config.optim.accumulate)
    snapshot = state.snapshot()
    own = [
        {**snapshot.own, "progress": {**snapshot.own["progress"], "loss_sum": 10.0 * (r + 1), "samples": r + 1}}
        for r in range(size)
    ]
    return Checkpoint(snapshot.step, folder, size, snapshot.shared, own[0], tuple(own))


class Pretended(World):
    """One of several processes, of which the others are not there."""

    def any(self, flag: bool) -> bool:
        return flag


def rank(number: int, size: int) -> World:
    return Pretended(rank=number, local_rank=number, size=size, device=torch.device("cpu"))


def go_on(checkpoint: Checkpoint, size: int, *overrides: str, number: int = 0) -> tuple[Setup, RunState]:
    setup = build_tiny(*overrides, world=rank(number, size))
    state = RunState(setup)
    state.restore(checkpoint)
    return setup, state


# 1,437 digits; batches per epoch of 64: 22 by one process, 11 by two, 5 by four, 7 by three
@pytest.mark.parametrize(
    ("before", "after", "accumulate", "batch", "expected", "step"),
    [
        (2, 1, 1, 3, 6, 28),  # 384 samples seen; 22 steps per epoch
        (2, 1, 2, 3, 6, 14),  # as many per step as before: the same steps
        (1, 2, 1, 3, 2, 13),  # 192 seen, goes on behind 256
        (1, 4, 1, 5, 2, 7),
        (4, 3, 1, 1, 2, 9),  # 256 seen, goes on behind 384
        (2, 1, 4, 3, 8, 8),  # a step of 4 x 64: behind 512; 6 steps per epoch
        (2, 1, 1, 11, 22, 44),  # at the end of the epoch, its validation is still to come
        (1, 4, 1, 22, 5, 10),
        (1, 4, 1, 21, 5, 10),  # no whole step is left
        (2, 1, 1, 0, 0, 22),
    ],
)
def test_another_number_of_processes_goes_on_behind_the_samples_seen(
    tmp_path: Path, before: int, after: int, accumulate: int, batch: int, expected: int, step: int
) -> None:
    small = "data.batch_size=64"
    checkpoint = saved_by(before, tmp_path, epoch=1, batch=batch, overrides=(small,))
    again = f"optim.accumulate={accumulate}"
    states = [go_on(checkpoint, after, small, again, number=r)[1] for r in range(after)]
    for state in states:
        assert (state.progress.epoch, state.progress.batch, state.progress.step) == (1, expected, step)
    assert sum(state.progress.samples for state in states) == before * (before + 1) / 2, "as many as were seen"
    assert sum(state.progress.loss_sum for state in states) == 10 * before * (before + 1) / 2


def test_a_sampler_deals_the_rest_without_duplicates(tmp_path: Path) -> None:
    small = "data.batch_size=64"

    def indices(size: int, first: int, last: int | None) -> set[int]:
        found = []
        for r in range(size):
            sampler = build_tiny(small, world=rank(r, size)).sampler
            sampler.set_position(1, first)
            found += [index for batch in list(sampler)[: None if last is None else last - first] for _, index in batch]
        assert len(found) == len(set(found))
        return set(found)

    seen = indices(2, 0, 3)
    _, state = go_on(saved_by(2, tmp_path, epoch=1, batch=3, overrides=(small,)), 3, small)
    rest = indices(3, state.progress.batch, None)
    assert not seen & rest and len(seen) == 384 and len(seen | rest) == 3 * 7 * 64


def test_each_process_draws_for_itself_and_by_the_step(tmp_path: Path) -> None:
    draws = set()
    for epoch, number, seed in ((0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (0, 0, 1)):
        checkpoint = saved_by(2, tmp_path, epoch=epoch, batch=2)
        for _ in range(2):
            _, state = go_on(checkpoint, 3, f"seed={seed}", number=number)
            state.random.put_back()
            first = torch.rand(()).item()
            draws.add(first)
            torch.rand(7)
    assert len(draws) == 5, "equal where all is equal, else different"
    _, state = go_on(replace(checkpoint, rank_states=()), 1)
    before = torch.get_rng_state()
    state.random.put_back()
    assert torch.equal(torch.get_rng_state(), checkpoint.rank_state["random"]["torch"])
    torch.set_rng_state(before)


def test_what_is_no_longer_exact_is_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    small = ("data.batch_size=64", "augment.mixup=0.2")
    checkpoint = saved_by(1, tmp_path, epoch=1, batch=3, overrides=small)
    (told,) = changes(folder, checkpoint, go_on(checkpoint, 2, *small)[0])[:1]
    for words in ("saved by 1 process, goes on with 2", "not be bit-equal", "seeded by (seed, step, rank)", "mixup and",
                  "epoch 2 goes on behind its first 256 samples, of which 64 are left out",
                  "step 25 is step 13 of 22", "the total batch was 64, is now 128"):  # fmt: skip
        assert words in told, words
    assert "keeps it" not in told, "no whole number does"
    checkpoint = saved_by(2, tmp_path, epoch=0, batch=3, overrides=small[:1])
    told = changes(folder, checkpoint, go_on(checkpoint, 1, *small[:1])[0])[0]
    assert "optim.accumulate=2 keeps it" in told and "left out" not in told and "mixup" not in told
    setup, _ = go_on(checkpoint, 1, *small[:1], "optim.accumulate=2")
    told = changes(folder, checkpoint, setup)[0]
    assert "the total batch stays 128" in told and "counted anew" not in told
    assert same_total_batch(checkpoint, setup)


def test_accumulation_may_change_to_keep_the_total_batch_and_else_not(tmp_path: Path) -> None:
    train(tmp_path, "checkpoint.every_steps=2")
    for accumulate in (2, 3):
        with pytest.raises(ConfigError, match=f"optim.accumulate is {accumulate}, but the run"):
            train(tmp_path, f"optim.accumulate={accumulate}", resume=True)
    # a run that went on with other processes was killed before its next checkpoint: its config is ahead of that
    config = RunFolder(tmp_path).config
    config.write_text(config.read_text().replace("accumulate: 1", "accumulate: 2"))
    assert train(tmp_path, "optim.accumulate=1", resume=True)["steps"] == 10
    assert latest_checkpoint(RunFolder(tmp_path).checkpoints) is not None


# ---- checkpoints that are lost --------------------------------------------------------------------------------------


def damage_all(folder: Path) -> None:
    for file in (folder / "checkpoints").rglob("shared.pt"):
        os.truncate(file, 100)


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def leave(folder: Path, *names: str) -> None:
    """Removes all of a run but these."""
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(load_config(None, [*TINY, "log.report=false"]), folder)
    return folder


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("lose", "words"), [(damage_all, "no checkpoint in .*checkpoints is whole"), (remove_all, "has no checkpoint")]
)
def test_a_run_without_its_checkpoints_is_not_begun_anew(
    lose: Callable[[Path], None], words: str, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    lose(folder)
    before = content(folder)
    config = load_config(RunFolder(folder).config)
    for resume in ("auto", folder):
        for start in (run, dry_run):
            with pytest.raises(ConfigError, match=words) as caught:
                start(config, folder, resume=resume)
            assert "summary.json, metrics.csv, best" in str(caught.value) and "another --output" in str(caught.value)
            assert len(str(caught.value).splitlines()) == 2
    assert content(folder) == before


@pytest.mark.parametrize("left", ["summary.json", "metrics.csv", "best", "checkpoints"])
def test_each_sign_of_a_checkpoint_is_enough(left: str, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damage_all(folder)
    leave(folder, "config.yaml", left)
    with pytest.raises(ConfigError, match="cannot go on"):
        refuse_lost_checkpoints(RunFolder(folder))


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    leave(folder, "config.yaml", "data.json", "environment.json", "tensorboard")
    assert train(folder, resume=True)["epochs"] == 2


@pytest.mark.parametrize(
    ("checkpoint", "refused"),
    [("{every_epochs: 1}", True), ("{every_epochs: 2}", False), ("{every_epochs: null, every_steps: 3}", True),
     ("{every_epochs: null, every_steps: 5}", False), ("{every_epochs: null}", False)],
)  # fmt: skip
def test_epochs_before_the_first_checkpoint_are_run_again(
    checkpoint: str, refused: bool, finished: Path, tmp_path: Path
) -> None:
    """As those behind the last one are: whether there was one, the config and the last row say."""
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished, folder.path)
    leave(folder.path, "config.yaml", "metrics.csv", "best")
    folder.cut_metrics(1)
    folder.config.write_text(dump_config(load_config(folder.config, [f"checkpoint={checkpoint}"])))
    if refused:
        with pytest.raises(ConfigError, match="cannot go on"):
            refuse_lost_checkpoints(folder)
    else:
        refuse_lost_checkpoints(folder)


def test_a_run_begun_anew_keeps_no_weights_of_the_one_before(finished: Path, tmp_path: Path) -> None:
    """Without rows they would be taken for those of a run that lost its checkpoints, were it killed once more."""
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished, folder.path)
    leave(folder.path, "config.yaml", "metrics.csv", "best")
    folder.cut_metrics(1)
    config = load_config(folder.config, ["checkpoint.every_epochs=2"])
    folder.config.write_text(dump_config(config))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.loop.train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, folder.path, resume="auto")
    assert not folder.best.exists()
    assert train(folder.path, resume=True)["epochs"] == 2


def test_the_first_checkpoint_is_on_disk_before_its_epoch_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the disk is: or a kill between would leave rows without a checkpoint."""
    seen: list[list[str]] = []
    append, write = RunFolder.append_metrics, Snapshot.write

    def slow(*args: Any) -> Path:
        time.sleep(0.3)
        return write(*args)

    def noted(folder: RunFolder, row: dict[str, float]) -> None:
        seen.append(sorted(path.name for path in folder.checkpoints.glob("step-*")))
        append(folder, row)

    monkeypatch.setattr(Snapshot, "write", slow)
    monkeypatch.setattr(RunFolder, "append_metrics", noted)
    train(tmp_path / "run", "optim.epochs=1", "optim.warmup_epochs=0")
    assert seen == [["step-00000005"]]
