"""Saving beside training: what is written is what was copied, one save at a time, and no failure stays unheard."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from files.durable import CheckpointError
from tests.training.parts import build_tiny, first_batches, step
from training import loop
from training.checkpoint import latest_checkpoint, load_checkpoint
from training.distributed import World
from training.report import page
from training.run_folder import RunFolder
from training.saving import Saver, copied
from training.state import RunState, Snapshot


class Gate:
    """Stands before each write: counts those that came, lets them pass when it is open, and can make them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.fail = threading.Event(), False
        self.arrived: list[int] = []
        self.threads: list[str] = []
        real = Snapshot.write

        def write(snapshot: Snapshot, folder: RunFolder, world: World) -> Path:
            self.arrived.append(snapshot.step)
            self.threads.append(threading.current_thread().name)
            assert self.open.wait(20)
            if self.fail:
                raise CheckpointError("the disk is gone")
            return real(snapshot, folder, world)

        monkeypatch.setattr(Snapshot, "write", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def tiny_state(*overrides: str) -> RunState:
    return RunState(build_tiny("data.batch_size=32", *overrides))


def test_what_is_written_is_the_state_of_its_step(tmp_path: Path, gate: Gate) -> None:
    """A training step and a draw while the thread writes change nothing of it: as if it had been written at once."""
    state = tiny_state("ema.enabled=true")
    batches = first_batches(state.setup, 2)
    step(state.setup, batches[:1])
    state.progress.step = 1
    expected = copied(state.snapshot())
    with Saver(state, RunFolder(tmp_path), on_failure=pytest.fail) as saver:
        saver.save()
        step(state.setup, batches[1:], 1)
        state.progress.step = 2
        torch.rand(3)
        gate.open.set()
        saver.wait()
    loaded = load_checkpoint(tmp_path / "checkpoints" / "step-00000001")
    assert same(loaded.shared, expected.shared) and same(loaded.rank_state, expected.own)
    now = state.snapshot()
    assert not same(now.own["random"], expected.own["random"]), "so that the test can fail"
    for name in ("model", "ema", "optimizer"):
        assert not same(now.shared[name], expected.shared[name]), name


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_copy_shares_nothing() -> None:
    weight = torch.zeros(4, 4)
    shared: dict[str, Any] = OrderedDict(w=weight[:2], groups=[{"lr": 1.0, "betas": (torch.zeros(()), 0.9)}])
    shared._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    copy = copied(Snapshot(3, shared, {}, 2))
    weight.fill_(1)
    shared["groups"][0]["lr"] = 2.0
    shared["groups"][0]["betas"][0].fill_(1)
    assert copy.shared["w"].sum() == 0 and copy.shared["w"].untyped_storage().nbytes() == 32
    assert copy.shared["groups"] == [{"lr": 1.0, "betas": (torch.zeros(()), 0.9)}]
    assert copy.shared._metadata == {"": {"version": 2}} and (copy.step, copy.keep) == (3, 2)  # type: ignore[attr-defined]


def test_one_save_at_a_time(tmp_path: Path, gate: Gate) -> None:
    state = tiny_state()
    with Saver(state, RunFolder(tmp_path), on_failure=pytest.fail) as saver:
        saver.save()
        state.progress.step = 1
        second = threading.Thread(target=saver.save)  # as the main thread would, so that this one can look on
        second.start()
        second.join(0.2)
        assert second.is_alive() and gate.arrived == [0], "it waits for the first"
        gate.open.set()
        second.join(20)
        state.progress.step = 2
        assert saver.save_and_wait() == tmp_path / "checkpoints" / "step-00000002"
    assert gate.arrived == [0, 1, 2] and gate.threads == ["saving", "saving", "MainThread"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_in_the_foreground_nothing_is_begun_that_is_not_done(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    with Saver(tiny_state("checkpoint.background=false"), RunFolder(tmp_path), on_failure=pytest.fail) as saver:
        saver.save()
        assert gate.threads == ["MainThread"] and latest_checkpoint(tmp_path / "checkpoints") is not None


@pytest.mark.parametrize("how", ["save", "save_and_wait", "wait", "end"])
def test_a_failure_is_told_by_the_next_call(how: str, tmp_path: Path, gate: Gate) -> None:
    reasons: list[str] = []
    gate.fail = True
    gate.open.set()
    with (
        pytest.raises(CheckpointError, match="the disk is gone"),
        Saver(tiny_state(), RunFolder(tmp_path), on_failure=reasons.append) as saver,
    ):
        saver.save()
        saver.join()
        assert reasons == ["a failed save"]
        gate.fail = False
        if how != "end":
            getattr(saver, how)()


def test_another_error_is_not_hidden_by_a_failed_save(tmp_path: Path, gate: Gate, capsys) -> None:
    gate.fail = True
    gate.open.set()
    with pytest.raises(ZeroDivisionError), Saver(tiny_state(), RunFolder(tmp_path), on_failure=id) as saver:
        saver.save()
        raise ZeroDivisionError
    assert "warning: the disk is gone" in capsys.readouterr().err


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, gate: Gate) -> None:
    with pytest.raises(KeyboardInterrupt), Saver(tiny_state(), RunFolder(tmp_path), on_failure=id) as saver:
        saver.save()
        raise KeyboardInterrupt
    assert not gate.open.is_set() and not (tmp_path / "checkpoints").exists()


def test_a_failed_save_stops_the_run_at_the_end_of_its_step(tmp_path: Path, monkeypatch, gate: Gate) -> None:
    """And not only at the next save, which may be an epoch away."""
    monkeypatch.setattr(page, "write_report", lambda _: None)
    real, steps = loop.train_step, []

    def stepping(*arguments: Any, **options: Any) -> Any:
        steps.append(arguments[3].step)
        if len(steps) == 3:  # the save after step 2 fails during the third, of 2 x 5
            gate.fail = True
            gate.open.set()
            (thread,) = [t for t in threading.enumerate() if t.name == "saving"]
            thread.join(20)
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", stepping)
    setup = build_tiny("checkpoint.every_steps=2")
    RunFolder(tmp_path).make(fresh=True)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        loop.train(setup, RunFolder(tmp_path))
    assert steps == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_waits_for_the_write(tmp_path: Path, gate: Gate) -> None:
    """A worker forked while the thread holds a lock would wait for that lock for ever."""
    opener = threading.Timer(0.3, gate.open.set)
    with Saver(tiny_state(), RunFolder(tmp_path), on_failure=pytest.fail) as saver:
        saver.save()
        opener.start()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if latest_checkpoint(tmp_path / "checkpoints") is not None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
