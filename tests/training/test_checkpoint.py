"""Checkpoints: every kind of damage is named, and no kill, lost write or full disk costs more than the save at hand."""

import errno
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from models.strict_yaml import ConfigError
from training import checkpoint
from training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    random_states,
    save_checkpoint,
    save_weights,
    set_random_states,
    weights_sha256,
)

ROOT = Path(__file__).parents[2]


def save(folder: Path, step: int, *, keep: int = 2, mark: int | None = None) -> Path:
    shared = {"model": {"w": torch.full((3, 5), float(step if mark is None else mark))}, "epoch": 1, "name": "x"}
    return save_checkpoint(folder, step, shared=shared, rank_state=random_states(), keep=keep)


def mark_of(loaded: checkpoint.Checkpoint | None) -> int:
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


def test_another_world_size_is_a_mistake_that_names_both(tmp_path):
    run_ranks(tmp_path, 1, states=[{}, {}])
    for call in (lambda: latest_checkpoint(tmp_path), lambda: load_checkpoint(tmp_path / "step-00000001")):
        with pytest.raises(ConfigError, match=r"saved by 2 processes, but this run has 1 process"):
            call()
    with pytest.raises(ConfigError, match=r"no rank 2 in it"):
        load_checkpoint(tmp_path / "step-00000001", rank=2, world_size=None)


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

# Forks a child per n that dies at its n-th operation on the disk, for every n. With `lose`, what had not been fsynced
# is lost as well, as when the power fails: files are cut in half, folders lose what was put into them.
KILL = '''
import os, shutil, signal, sys
from pathlib import Path
import torch
from training.checkpoint import latest_checkpoint, load_weights, save_checkpoint, save_weights

lose, root = sys.argv[1] == "lose", Path(sys.argv[2])
work = root / "work"
os.fsync = lambda descriptor: None  # only recorded, in child(); the disk itself is not under test
WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def save(folder, step, mark, keep):
    save_checkpoint(folder, step, shared={"mark": torch.tensor(mark)}, rank_state={"r": torch.ones(100)}, keep=keep)


def prepare(folder):
    folder.mkdir()
    if scenario == "weights":
        save_weights(folder / "best", {"mark": torch.tensor(1)}, {"mark": 1})
    elif scenario != "first":
        for step in (1, 2):
            save(folder, step, step, 2)
    if scenario == "stray":  # the leftovers of two kills
        os.rename(folder / "step-00000002", folder / ".old-step-00000002")
        shutil.copytree(folder / "step-00000001", folder / ".tmp-step-00000003")


def act(folder):
    if scenario == "weights":
        save_weights(folder / "best", {"mark": torch.tensor(9)}, {"mark": 9})
    else:
        save(folder, {"same": 2, "rewind": 1}.get(scenario, 3), 9, 1)


def read(folder):
    if scenario == "weights":
        state, config = load_weights(folder / "best")
        assert config == {"mark": int(state["mark"])}, config
        return int(state["mark"])
    def damaged(line):
        raise SystemExit(line)
    loaded = latest_checkpoint(folder, warn=damaged)
    return None if loaded is None else int(loaded.shared["mark"])


def child(n):
    """Runs act(), dying just before operation n; returns only when there are fewer."""
    state = {"count": 0, "on": True}
    unsynced = []  # paths that were made
    moved = []  # folders that something was renamed into

    def operation(kind, path):
        if not state["on"]:
            return
        state["count"] += 1
        if state["count"] == n:
            state["on"] = False
            for lost in unsynced if lose else ():
                if lost.is_file():
                    os.truncate(lost, lost.stat().st_size // 2)
                elif lost.is_dir():
                    for entry in lost.iterdir():
                        entry.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in WATCHED and state["on"]:
            if event in ("os.remove", "os.rmdir", "shutil.rmtree"):
                assert not (lose and moved), f"removing before the rename in {moved} is durable"
            if event in ("os.remove", "os.rmdir") and args[-1] >= 0:  # rmtree names files relative to a descriptor
                operation(event, None)
                return
            path = Path(os.fsdecode(args[0])) if isinstance(args[0], (str, bytes, os.PathLike)) else root
            if work not in path.parents:
                return
            writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wxa"
            if event == "open" and not writes:
                return
            operation(event, path)
            if event == "os.mkdir" or writes:
                unsynced.append(path)
            if event == "os.rename":
                early = [lost for lost in unsynced if lost == path or path in lost.parents]
                assert not (lose and early), f"renaming {path} before {early} is durable"
                target = Path(os.fsdecode(args[1]))
                if not target.name.startswith("."):
                    moved.append(target.parent)

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}")) if os.path.exists("/proc/self/fd") else None
        operation("fsync", path)
        for pending in (unsynced, moved):
            if path in pending:
                pending.remove(path)

    os.fsync = fsync
    sys.addaudithook(hook)
    act(work)


for scenario in ("first", "next", "same", "rewind", "stray", "weights"):
    base = root / scenario
    prepare(base)
    old = read(base)
    kills, seen = 0, []
    while True:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(base, work)
        pid = os.fork()
        if pid == 0:
            try:
                child(kills + 1)
                os._exit(0)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(3)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = read(work)
        seen.append(found)
        if status == 0:
            assert found == 9, found
            break
        assert status == -signal.SIGKILL, (scenario, kills, status)
        kills += 1
        assert found in (old, 9), (scenario, kills, found)
        act(work)  # and the next save works, and leaves no rubbish
        assert read(work) == 9
        hidden = [entry.name for entry in work.iterdir() if entry.name.startswith(".")]
        assert not hidden, (scenario, kills, hidden)
    # Enough operations were seen, those before the rename left the old one, and those after it the new one.
    assert seen.count(old) >= 8 and seen == sorted(seen, key=lambda mark: mark == 9), (scenario, seen)
    print(scenario, kills)
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("lose", [pytest.param("kill", marks=pytest.mark.slow), "lose"])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(tmp_path, lose):
    if lose == "lose" and not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to know what was fsynced")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILL, lose, str(tmp_path.resolve())],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 6, done.stdout  # one per scenario


class FullDisk(io.FileIO):
    """A file on a disk with room for `room` more bytes."""

    room = 0

    def write(self, data) -> int | None:
        if len(data) > FullDisk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= len(data)
        return super().write(data)


@pytest.mark.parametrize("what", ["checkpoint", "weights"])
def test_a_full_disk_leaves_the_old_and_says_so(tmp_path, monkeypatch, what):
    def act(mark):
        if what == "checkpoint":
            save(tmp_path, mark, keep=1)
        else:
            save_weights(tmp_path / "best", {"w": torch.full((300,), float(mark))}, {"mark": mark})

    act(1)
    before = names(tmp_path)

    def fake_open(path, mode):
        return io.BufferedWriter(FullDisk(path, mode), buffer_size=64) if mode == "xb" else open(path, mode)

    monkeypatch.setattr(checkpoint, "open", fake_open, raising=False)
    failures = 0
    for room in range(0, 100_000, 97):
        FullDisk.room = room
        try:
            act(2)
            break
        except CheckpointError as error:
            assert "No space left on device" in str(error) and "untouched" in str(error)
            assert names(tmp_path) == before
            failures += 1
    assert failures > 10
    if what == "checkpoint":
        assert mark_of(latest_checkpoint(tmp_path)) == 2
    else:
        assert load_weights(tmp_path / "best")[1] == {"mark": 2}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="was not saved"):
        save(tmp_path / "file" / "checkpoints", 1)


# ---- random states ----------------------------------------------------------------------------------------------


def draws() -> list:
    cuda = [torch.rand(3, device="cuda").tolist()] if torch.cuda.is_available() else []
    python = [random.random(), random.gauss(0, 1), random.randrange(10**9)]
    return [*python, np.random.rand(), np.random.standard_normal(), torch.randn(5).tolist(), torch.rand(2), *cuda][:-1]


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


# ---- hashes of weights ------------------------------------------------------------------------------------------


def test_weights_sha256_changes_with_name_dtype_shape_and_every_bit():
    base = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.tensor(1.0)}
    flipped = base["a"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    different = [
        base,
        {"c": base["a"], "b": base["b"]},
        {"a": base["b"], "b": base["a"]},
        {**base, "a": base["a"].view(torch.int32)},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": flipped},
        {**base, "b": torch.tensor([1.0])},
        {**base, "b": torch.tensor(-0.0)},
        {**base, "b": torch.tensor(0.0)},
        {"a": base["a"]},
        {**base, "e": torch.empty(0)},
        {**base, "e": torch.empty(0, 1)},
        {},
    ]
    assert len({weights_sha256(state) for state in different}) == len(different)


def test_weights_sha256_ignores_order_layout_and_gradients():
    image = torch.randn(2, 3, 4, 5)
    square = torch.randn(4, 4)
    plain = {"image": image, "square": square, "half": torch.ones(3, dtype=torch.bfloat16)}
    other = {
        "half": torch.ones(6, dtype=torch.bfloat16)[::2],
        "square": torch.nn.Parameter(square.t().contiguous().t()),
        "image": image.contiguous(memory_format=torch.channels_last),
    }
    assert not other["square"].is_contiguous() and not other["image"].is_contiguous()
    assert weights_sha256(plain) == weights_sha256(other)


def test_weights_sha256_is_what_the_description_says():
    expected = hashlib.sha256(b'["w", "torch.bfloat16", [2]]' + bytes([0x80, 0x3F, 0, 0x40])).hexdigest()
    assert weights_sha256({"w": torch.tensor([1.0, 2.0]).bfloat16()}) == expected


def test_weights_sha256_refuses_what_is_not_a_dense_tensor():
    with pytest.raises(ValueError, match="extra"):
        weights_sha256({"extra": 1})  # pyright: ignore[reportArgumentType]


# ---- weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(7).bfloat16(),
        "count": torch.tensor(3),
    }


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)


def test_weights_round_trip_and_replace(tmp_path, weights):
    folder, config = tmp_path / "best", {"name": "tiny", "depths": [2, 2], "rate": 0.1}
    save_weights(folder, {"old": torch.ones(2)}, {})
    save_weights(folder, weights, config)
    assert names(tmp_path) == ["best"] and names(folder) == ["config.json", "model.safetensors"]
    state, loaded = load_weights(folder)
    assert_same(state, weights)
    assert loaded == config
    assert json.loads((folder / "config.json").read_text())["weights_sha256"] == weights_sha256(weights)
    state, none = load_weights(folder / "model.safetensors")
    assert_same(state, weights)
    assert none is None


def test_weights_into_a_linked_folder_keep_the_link(tmp_path, weights):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_weights(tmp_path / "link", weights, {})
    assert (tmp_path / "link").is_symlink()
    assert_same(load_weights(tmp_path / "real")[0], weights)


def test_weights_never_delete_foreign_files(tmp_path, weights):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"other files \(notes\.txt\)"):
        save_weights(tmp_path, weights, {})
    with pytest.raises(ConfigError, match="not a folder"):
        save_weights(tmp_path / "notes.txt", weights, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_tied_weights_are_saved_under_every_name(tmp_path):
    tied = torch.randn(6)
    state = {"a": tied, "b": tied, "part": tied[2:4]}
    save_weights(tmp_path / "best", state, {})
    assert_same(load_weights(tmp_path / "best")[0], state)


def test_every_damage_to_weights_is_refused(tmp_path, weights):
    file = tmp_path / "best" / "model.safetensors"
    save_weights(file.parent, weights, {})
    good = file.read_bytes()
    for position in range(len(good)):
        flip(file, position)
        try:
            # A flip in the metadata or in white space changes no weight.
            assert_same(load_weights(file.parent)[0], weights)
            assert position < good.index(b"conv.weight")
        except ConfigError as error:
            assert "model.safetensors" in str(error)
        file.write_bytes(good)
    for size in range(0, len(good), 7):
        file.write_bytes(good[:size])
        with pytest.raises(ConfigError, match=r"model\.safetensors"):
            load_weights(file.parent)


@pytest.mark.parametrize("text", ["", "[1]", "{", "nope", "[" * 100_000])
def test_a_damaged_config_beside_weights(tmp_path, weights, text):
    save_weights(tmp_path / "best", weights, {})
    (tmp_path / "best" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_weights(tmp_path / "best")


def test_weights_without_config_or_without_hash(tmp_path, weights):
    state = {name: tensor.contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(state, str(tmp_path / "model.safetensors"))
    assert load_weights(tmp_path)[1] is None
    (tmp_path / "config.json").write_text('{"architecture": "x"}')
    loaded, config = load_weights(tmp_path)
    assert_same(loaded, weights)
    assert config == {"architecture": "x"}


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_state_dict_files(tmp_path, weights, key, suffix):
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / f"w{suffix}")
    state, config = load_weights(tmp_path / f"w{suffix}")
    assert_same(state, weights)
    assert config is None


def test_state_dict_files_that_are_refused(tmp_path):
    target = tmp_path / "made-by-the-pickle"
    torch.save({"x": Evil(target)}, tmp_path / "evil.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "w.onnx").write_text("x")
    for name, message in {
        "evil.pt": "refused",
        "other.pt": "'epoch' is not a tensor",
        "list.pt": "must hold a dict",
        "text.pth": "refused",
        "w.onnx": r"allowed: \.safetensors, \.pt, \.pth",
        "othr.pt": r"no such file or folder; did you mean 'other\.pt'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_weights(tmp_path / name)
    assert not target.exists()


def test_a_run_folder_is_pointed_to_its_best(tmp_path, weights):
    save_weights(tmp_path / "best", weights, {})
    with pytest.raises(ConfigError, match=r"no model\.safetensors in this folder; did you mean '.*best'"):
        load_weights(tmp_path)
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(ConfigError, match=r"no model\.safetensors in this folder$"):
        load_weights(tmp_path)
