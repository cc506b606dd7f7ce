"""Checkpoints: every kind of damage is named, and no kill, lost write or full disk costs more than the save at hand."""

import hashlib
import json
import os
import pickle
import random
import shutil
import threading
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from files.durable import CheckpointError
from files.errors import ConfigError
from training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
)


def save(folder: Path, step: int, *, keep: int = 2, mark: int | None = None) -> Path:
    shared = {"model": {"w": torch.full((3, 5), float(step if mark is None else mark))}, "epoch": 1, "name": "x"}
    return save_checkpoint(folder, step, shared=shared, rank_state=random_states(), keep=keep)


def mark_of(loaded: Checkpoint | None) -> int:
    assert loaded is not None
    return int(loaded.shared["model"]["w"][2, 4])


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def run_ranks(folder: Path, step: int, *, states: list, world_size: int = 2) -> list:
    """Saves from one thread per rank, as processes would; returns each rank's path or error."""
    flags: list[bool] = [False] * world_size
    results: list = [None] * world_size
    meeting = threading.Barrier(world_size, timeout=20)

    def save_rank(rank: int) -> None:
        def barrier(failed: bool) -> bool:
            flags[rank] = failed
            meeting.wait()
            any_failed = any(flags)
            meeting.wait()  # nobody overwrites a flag that another has still to read
            return any_failed

        try:
            results[rank] = save_checkpoint(
                folder,
                step,
                shared={"step": step},
                rank_state=states[rank],
                keep=2,
                rank=rank,
                world_size=world_size,
                barrier=barrier,
            )
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=save_rank, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ---- saving and loading -----------------------------------------------------------------------------------------


def test_round_trip_of_every_kind_of_value(tmp_path):
    shared = {
        "bf16": torch.randn(4, 4).bfloat16(),
        "nested": [{"a": (1, 2.5, "s", None, True)}],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 3),
    }
    (tmp_path / "a").mkdir()
    path = save_checkpoint(tmp_path / "a" / "b", 1234, shared=shared, rank_state={"r": torch.arange(3)}, keep=1)
    assert path == tmp_path / "a" / "b" / "step-00001234"
    assert names(path) == ["manifest.json", "rank-00000.pt", "shared.pt"]
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.path, loaded.world_size) == (1234, path, 1)
    assert loaded.shared["nested"] == shared["nested"]
    for key in ("bf16", "scalar", "empty"):
        assert loaded.shared[key].dtype == shared[key].dtype
        assert torch.equal(loaded.shared[key], shared[key])
    assert torch.equal(loaded.rank_state["r"], torch.arange(3))


def test_latest_of_a_missing_and_of_an_empty_folder_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def test_keep_removes_the_oldest(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert mark_of(latest_checkpoint(tmp_path)) == 10


def test_keep_does_not_count_a_checkpoint_that_cannot_be_read(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-00000003" / "shared.pt").write_bytes(b"short")
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_later_checkpoints_are_superseded_by_a_resume_from_an_earlier_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    save(tmp_path, 2, keep=3, mark=99)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert mark_of(latest_checkpoint(tmp_path)) == 99


def test_the_same_step_again_replaces_a_damaged_one(tmp_path):
    path = save(tmp_path, 5)
    (path / "manifest.json").unlink()
    save(tmp_path, 5, mark=6)
    assert names(tmp_path) == ["step-00000005"]
    assert mark_of(load_checkpoint(path)) == 6


def test_strays_of_killed_saves_are_ignored_then_cleaned(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-00000009").mkdir()
    (tmp_path / ".tmp-step-00000009" / "shared.pt").write_bytes(b"half")
    assert mark_of(latest_checkpoint(tmp_path)) == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_cannot_be_read_back_is_refused_when_it_is_saved(tmp_path):
    save(tmp_path, 1)
    for value in (np.float64(0.5), lambda: 0):  # one that only reading refuses, and one that pickle refuses
        with pytest.raises(CheckpointError, match=r"step-00000002 was not saved"):
            save_checkpoint(tmp_path, 2, shared={"top1": value}, rank_state={}, keep=1)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("step, keep", [(-1, 1), (0, 0)])
def test_impossible_arguments(tmp_path, step, keep):
    with pytest.raises(ValueError, match="step must be >= 0 and keep >= 1"):
        save_checkpoint(tmp_path, step, shared={}, rank_state={}, keep=keep)


# ---- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared.pt", "rank-00000.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["first", "middle", "last", "short", "empty", "longer", "missing", "folder"])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    size = file.stat().st_size
    if damage in ("missing", "folder"):
        file.unlink()
        if damage == "folder":
            file.mkdir()
    elif damage in ("short", "empty"):
        os.truncate(file, size - 1 if damage == "short" else 0)
    elif damage == "longer":
        file.write_bytes(file.read_bytes() + b"x")
    else:
        flip(file, {"first": 0, "middle": size // 2, "last": size - 1}[damage])
    if name == "manifest.json" and damage == "short":  # the last byte is a newline that says nothing
        os.truncate(file, size - 2)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(tmp_path / "step-00000002")
    warned: list[str] = []
    assert mark_of(latest_checkpoint(tmp_path, warn=warned.append)) == 1
    assert len(warned) == 1 and f"step-00000002/{name}" in warned[0]


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    for position in range(path.stat().st_size):
        flip(path, position)
        with pytest.raises(CheckpointError):
            load_checkpoint(path.parent)
        flip(path, position)
    assert mark_of(load_checkpoint(path.parent)) == 1


GARBAGE = [b"", b"[]", b"null", b"3", b'"x"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"sha256": 1}', b"\0" * 50]


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_for_a_manifest(tmp_path, text):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(path)


def forge(path: Path, **changes) -> None:
    """Writes a manifest with the right hash of itself and of the files, as somebody could by hand."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["sha256"]
    for name, facts in manifest["files"].items():
        data = (path / name).read_bytes()
        facts.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest.update(changes)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"step": "1"},
        {"step": True},
        {"world_size": 2},
        {"world_size": 10**12},
        {"world_size": -1, "files": {}},
        {"files": {"shared.pt": 1, "rank-00000.pt": 2}},
        {"files": {"shared.pt": {}, "../rank-00000.pt": {}}},
        {"files": {"shared.pt": {}, "rank-00000.pt": {}}},
    ],
)
def test_a_forged_manifest_is_refused(tmp_path, changes):
    path = save(tmp_path, 1)
    forge(path)
    assert mark_of(load_checkpoint(path)) == 1
    forge(path, **changes)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


class Evil:
    """Pickles to a call that makes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("name", ["shared.pt", "rank-00000.pt"])
@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, name, container):
    path, target = save(tmp_path, 1), tmp_path / "made-by-the-pickle"
    with open(path / name, "wb") as file:
        if container == "torch":
            torch.save({"x": Evil(target)}, file)
        else:
            pickle.dump({"x": Evil(target)}, file, protocol=2)
    forge(path)
    with pytest.raises(CheckpointError, match=f"{name}: refused"):
        load_checkpoint(path)
    assert not target.exists()
    torch.load(path / name, weights_only=False) if container == "torch" else pickle.loads((path / name).read_bytes())
    assert target.exists()  # the test would have noticed


def test_all_damaged_gives_none_and_a_warning_each_on_rank_0_alone(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "shared.pt").unlink()
    warned: list[str] = []
    assert latest_checkpoint(tmp_path, warn=warned.append) is None
    assert len(warned) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(tmp_path, rank=1) is None


def test_missing_checkpoint_names_the_nearest(tmp_path):
    save(tmp_path, 120)
    with pytest.raises(ConfigError, match=r"did you mean 'step-00000120'"):
        load_checkpoint(tmp_path / "step-0000120")


# ---- several ranks ----------------------------------------------------------------------------------------------


def test_two_ranks_share_one_checkpoint(tmp_path):
    states = [{"r": torch.tensor(0)}, {"r": torch.tensor(1)}]
    path = tmp_path / "step-00000007"
    assert run_ranks(tmp_path, 7, states=states) == [path, path]
    assert names(path) == ["manifest.json", "rank-00000.pt", "rank-00001.pt", "shared.pt"]
    for rank in (0, 1):
        loaded = latest_checkpoint(tmp_path, rank=rank, world_size=2)
        assert loaded is not None and loaded.world_size == 2
        assert loaded.rank_state["r"] == rank and loaded.shared["step"] == 7
    assert load_checkpoint(path, world_size=None).step == 7


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_every_rank_passes_over_what_is_damaged_for_one(tmp_path, damage):
    for step in (1, 2):
        run_ranks(tmp_path, step, states=[{}, {}])
    file = tmp_path / "step-00000002" / "rank-00001.pt"
    file.unlink() if damage == "missing" else flip(file, 40)
    for rank in (0, 1):
        warned: list[str] = []
        loaded = latest_checkpoint(tmp_path, rank=rank, world_size=2, warn=warned.append)
        assert loaded is not None and loaded.step == 1
        assert len(warned) == (rank == 0) and all("rank-00001.pt" in line for line in warned)


def test_another_number_of_processes_gets_the_states_of_all(tmp_path):
    run_ranks(tmp_path, 1, states=[{"r": 0}, {"r": 1}])
    for rank, world_size in ((0, 1), (0, 3), (2, 3)):
        for loaded in (
            latest_checkpoint(tmp_path, rank=rank, world_size=world_size),
            load_checkpoint(tmp_path / "step-00000001", rank=rank, world_size=world_size),
        ):
            assert loaded is not None and loaded.world_size == 2 and loaded.shared == {"step": 1}
            assert loaded.rank_states == ({"r": 0}, {"r": 1}) and loaded.rank_state == {"r": 0}
    for rank in (0, 1):
        loaded = load_checkpoint(tmp_path / "step-00000001", rank=rank, world_size=2)
        assert loaded.rank_states == () and loaded.rank_state == {"r": rank}
    for world_size in (2, None):
        with pytest.raises(ConfigError, match=r"saved by 2 processes, so there is no rank 2 in it"):
            load_checkpoint(tmp_path / "step-00000001", rank=2, world_size=world_size)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_rank_that_cannot_write_fails_all_and_leaves_the_old(tmp_path, bad):
    run_ranks(tmp_path, 1, states=[{}, {}])
    states = [{}, {}]
    states[bad] = {"value": np.float64(1)}
    results = run_ranks(tmp_path, 2, states=states)
    assert all(isinstance(result, CheckpointError) for result in results)
    assert "numpy" in str(results[bad]) and "another rank failed" in str(results[1 - bad])
    assert names(tmp_path) == ["step-00000001"]


# ---- kills, lost writes, full disks -----------------------------------------------------------------------------


class Killed:
    """For kill_script.py: saves that are killed at any of their operations."""

    scenarios: ClassVar = {"first": 8, "next": 8, "same": 8, "rewind": 8, "stray": 8}

    def prepare(self, scenario: str, folder: Path) -> None:
        folder.mkdir()
        for step in (1, 2) if scenario != "first" else ():
            save(folder, step)
        if scenario == "stray":  # the leftovers of two kills
            os.rename(folder / "step-00000002", folder / ".old-step-00000002")
            shutil.copytree(folder / "step-00000001", folder / ".tmp-step-00000003")

    def act(self, scenario: str, folder: Path) -> None:
        save(folder, {"same": 2, "rewind": 1}.get(scenario, 3), keep=1, mark=9)

    def read(self, scenario: str, folder: Path) -> int | None:
        loaded = latest_checkpoint(folder, warn=pytest.fail)
        return None if loaded is None else mark_of(loaded)


@pytest.mark.parametrize("lose", [pytest.param("kill", marks=pytest.mark.slow), "lose"])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(kill_anywhere, lose):
    assert kill_anywhere(lose) == list(Killed.scenarios)


def test_a_full_disk_leaves_the_old_and_says_so(tmp_path, fill_disk):
    save(tmp_path, 1, keep=1)
    assert fill_disk(lambda: save(tmp_path, 2, keep=1), tmp_path) > 10
    assert mark_of(latest_checkpoint(tmp_path)) == 2


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="was not saved"):
        save(tmp_path / "file" / "checkpoints", 1)
    with pytest.raises(CheckpointError, match="No such file"):
        save(tmp_path / "deleted" / "checkpoints", 1)
    assert names(tmp_path) == ["file"]


# ---- random states ----------------------------------------------------------------------------------------------


def draws() -> list:
    cuda = [torch.rand(3, device="cuda").tolist()] if torch.cuda.is_available() else []
    python = [random.random(), random.gauss(0, 1), random.randrange(10**9)]
    return [*python, np.random.rand(), np.random.standard_normal(), torch.randn(5).tolist(), *cuda]


def test_random_states_survive_a_checkpoint(tmp_path):
    before = random_states()
    try:
        random.gauss(0, 1)  # leaves a second value waiting in the generator's state, as does NumPy's
        np.random.standard_normal()
        path = save_checkpoint(tmp_path, 1, shared={}, rank_state={"random": random_states()}, keep=1)
        expected = draws()
        assert draws() != expected
        set_random_states(load_checkpoint(path).rank_state["random"])
        assert draws() == expected
    finally:
        set_random_states(before)
