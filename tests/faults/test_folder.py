"""The run folder damaged, deleted or taken by a second run, while a run goes on or before one goes on."""

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from files.lock import is_locked
from tests.faults.parts import TINY, Zygote, at_step, content, read_metrics, same_result, steps

pytestmark = pytest.mark.slow


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The whole run as it was after its second epoch."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000015")
    return folder


# ---- two runs -------------------------------------------------------------------------------------------------------


def test_two_runs_on_one_folder(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """New or to go on, the second is refused and changes nothing; killed, the first keeps nobody out."""
    folder = tmp_path / "run"
    gate = tmp_path / "gate"
    wait = at_step(7, f"\n        while not Path({str(gate)!r}).exists(): time.sleep(0.02)")
    first = zygote.start(*TINY, "--output", folder, cwd=tmp_path, hook=wait)

    def at_the_gate() -> bool:
        """The first epoch is noted, and nothing more is written."""
        if not (folder / "metrics.csv").exists() or len(read_metrics(folder)) != 1:
            return False
        with contextlib.suppress(FileNotFoundError):
            seen = content(folder)
            time.sleep(0.5)
            return seen == content(folder)
        return False

    first.until(at_the_gate)
    before = content(folder)
    words = (f"{folder}: a run goes on here, process {first.pid} on {socket.gethostname()}, since ", "--output")
    for more in ([], ["--resume", "auto"], ["--dry-run"], ["--resume", "auto", "--dry-run"]):
        zygote.run(*TINY, "--output", folder, *more, cwd=tmp_path).failed(2, *words)
    for name, data in before.items():
        if "tensorboard" not in name:
            assert (folder / name).read_bytes() == data, name
    assert is_locked(folder)
    first.send(signal.SIGKILL)
    first.wait()
    assert not is_locked(folder) and (folder / ".lock").exists()
    gate.touch()
    zygote.run("--resume", folder, cwd=tmp_path).fine()
    same_result(folder, whole)
    assert not (folder / ".lock").exists()


def test_two_runs_that_start_at_once(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """One of them goes on."""
    done = [zygote.start(*TINY, "--output", tmp_path / "run", cwd=tmp_path) for _ in range(2)]
    ended = sorted((run.wait() for run in done), key=lambda d: d.code)
    ended[0].fine()
    ended[1].failed(2)
    assert "a run goes on here" in ended[1].err or "already holds a run" in ended[1].err
    same_result(tmp_path / "run", whole)


def test_a_worker_that_outlives_a_killed_run_keeps_nobody_out(zygote: Zygote, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hook = at_step(2, "os.kill(os.getpid(), 9)")
    zygote.run(*TINY, "data.workers=1", "--output", folder, cwd=tmp_path, hook=hook)
    zygote.run(*TINY, "data.workers=1", "--output", folder, "--resume", "auto", cwd=tmp_path).fine()


# ---- deleted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", ["1", "null"])
def test_a_folder_deleted_in_mid_run(every: str, zygote: Zygote, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hook = at_step(7, f"shutil.rmtree({str(folder)!r})")
    done = zygote.run(*TINY, f"checkpoint.every_epochs={every}", "--output", folder, cwd=tmp_path, hook=hook)
    done.failed(1, f"the run folder {folder} is gone: deleted or moved while the run went on")
    assert not folder.exists(), "it is not made again"


def test_checkpoints_deleted_in_mid_run(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hook = at_step(7, f"shutil.rmtree({str(folder / 'checkpoints')!r})")
    zygote.run(*TINY, "--output", folder, cwd=tmp_path, hook=hook).fine()
    same_result(folder, whole)
    assert steps(folder) == [10, 15]


# ---- damaged --------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


CHECKPOINT: dict[str, Callable[[Path], object]] = {
    "shared flipped": lambda c: flip(c / "shared.pt"),
    "rank flipped": lambda c: flip(c / "rank-00000.pt"),
    "manifest flipped": lambda c: flip(c / "manifest.json"),
    "shared truncated": lambda c: os.truncate(c / "shared.pt", 1000),
    "rank empty": lambda c: os.truncate(c / "rank-00000.pt", 0),
    "manifest missing": lambda c: (c / "manifest.json").unlink(),
    "shared missing": lambda c: (c / "shared.pt").unlink(),
    "an empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
    "a file instead": lambda c: (shutil.rmtree(c), c.write_text("x")),
}


@pytest.mark.parametrize("damage", CHECKPOINT)
def test_a_damaged_checkpoint(damage: str, zygote: Zygote, whole: Path, stopped: Path) -> None:
    """It is named, and the one before it used; the run ends as if nothing had happened."""
    CHECKPOINT[damage](stopped / "checkpoints" / "step-00000010")
    done = zygote.run("--resume", stopped, cwd=stopped.parent).fine()
    assert "damaged checkpoint passed over" in done.err and "step-00000010" in done.err
    assert "going on from step 5" in done.out
    same_result(stopped, whole)


OTHERS: dict[str, Callable[[Path], object]] = {
    "metrics cut": lambda f: os.truncate(f / "metrics.csv", (f / "metrics.csv").stat().st_size - 9),
    "metrics missing": lambda f: (f / "metrics.csv").unlink(),
    "metrics garbage behind": lambda f: (f / "metrics.csv").open("ab").write(b"\x00\xff\xfe,,,\n" * 3 + b"9"),
    "data.json": lambda f: (f / "data.json").write_bytes(b"{" * 5000),
    "summary.json": lambda f: (f / "summary.json").write_bytes(b"\xff\x00"),
    "environment.json": lambda f: (f / "environment.json").write_text("3"),
    "environment.json deep": lambda f: (f / "environment.json").write_text("[" * 100_000),
    "drop_path.csv": lambda f: (f / "drop_path.csv").write_bytes(b"\x00" * 99),
    "best": lambda f: (f / "best" / "model.safetensors").write_bytes(b"no weights"),
    "tensorboard": lambda f: [p.write_bytes(b"x") for p in (f / "tensorboard").iterdir()],
    "leftovers": lambda f: (
        (f / "checkpoints" / ".tmp-step-00000015").mkdir(),
        (f / ".tmp-summary.json").write_text("{"),
    ),
}


@pytest.mark.parametrize("damage", OTHERS)
def test_another_file_damaged(damage: str, zygote: Zygote, whole: Path, stopped: Path) -> None:
    """What is not in the checkpoint is written again, and no other file is needed to go on."""
    OTHERS[damage](stopped)
    zygote.run("--resume", stopped, cwd=stopped.parent, report=damage == "environment.json").fine()
    if damage == "metrics missing":  # rows of epochs that are not run again are lost with the file
        assert read_metrics(stopped) == read_metrics(whole)[-2:], "its validation comes behind the checkpoint"
    elif damage != "metrics cut":
        same_result(stopped, whole)
    json.loads((stopped / "summary.json").read_text())


CONFIGS = {
    "cut": b"model: {name: conv",
    "garbage": b"\xff\xfe\x00",
    "empty": b"",
    "other": b"a: 1\n",
    "deep": b"[" * 5000,
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_damaged_config(damage: str, zygote: Zygote, whole: Path, stopped: Path) -> None:
    """It is named with its line; with the settings given again, or the file mended, the run goes on."""
    good = (stopped / "config.yaml").read_bytes()
    (stopped / "config.yaml").write_bytes(CONFIGS[damage])
    zygote.run("--resume", stopped, cwd=stopped.parent).failed(2, str(stopped / "config.yaml"))
    (stopped / "config.yaml").write_bytes(good)
    zygote.run("--resume", stopped, cwd=stopped.parent).fine()
    same_result(stopped, whole)
