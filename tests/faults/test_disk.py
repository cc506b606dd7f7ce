"""Disks that fill up, fail or lose power, and processes that end, at any operation of a save and of a whole run."""

import json
from pathlib import Path

import pytest

from tests.faults.parts import TINY, Zygote, content, same_result, steps, summary, tiny_disk

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent

INSTALL = """
import errno, os
from tests.faults import disk
def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
disk.install({at}, {act})
"""
COUNT = """
import sys, train
def main():
    code = train.main(sys.argv[1:])
    print("count", disk.count)
    return code
"""
EXIT, FULL = "lambda: os._exit(77)", "full"

# Saves a small state over an old one with a fault at each operation in turn, and looks at what is left.
EVERY_OPERATION = """
import errno, os, shutil
import torch
from pathlib import Path
from files.durable import CheckpointError
from tests.faults import disk
from training.checkpoint import latest_checkpoint, save_checkpoint

def save(step, mark):
    shared = {"model": {f"w{i}": torch.full((40, 40), float(mark)) for i in range(3)}, "mark": mark}
    save_checkpoint(Path("work"), step, shared=shared, rank_state={"mark": mark}, keep=1)

def found():
    loaded = latest_checkpoint(Path("work"), warn=lambda line: os._exit(90))
    marks = {loaded.shared["mark"], loaded.rank_state["mark"], int(loaded.shared["model"]["w2"][3, 3])}
    assert len(marks) == 1
    return marks.pop()

def act():
    if MODE == "exit":
        os._exit(77)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def main():
    seen = []
    while True:
        shutil.rmtree("work", ignore_errors=True)
        save(1, 1)
        pid = os.fork()
        if pid == 0:
            disk.install(len(seen) + 1, act)
            try:
                save(STEP, 9)
            except CheckpointError as error:
                os._exit(78 if "No space left on device" in str(error) else 91)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            assert found() == 9
            break
        assert code == (77 if MODE == "exit" else 78), (len(seen), code)
        seen.append(found())
        assert seen[-1] in (1, 9)
        save(STEP, 9)
        assert found() == 9 and not [p for p in os.listdir("work") if p.startswith(".")]
    assert seen == sorted(seen) and seen.count(1) >= 12, seen
    print(len(seen), "operations")
    return 0
"""


@pytest.mark.parametrize("mode", ["exit", "full"])
@pytest.mark.parametrize("step", [1, 2], ids=["same step", "next step"])
def test_a_save_at_every_operation(mode: str, step: int, zygote: Zygote, tmp_path: Path) -> None:
    hook = EVERY_OPERATION.replace("MODE", repr(mode)).replace("STEP", str(step))
    assert "operations" in zygote.run(cwd=tmp_path, hook=hook).fine().out


@pytest.fixture(scope="module")
def operations(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many operations a whole run has."""
    folder = tmp_path_factory.mktemp("counted")
    hook = INSTALL.format(at=0, act="full") + COUNT
    done = zygote.run(*TINY, "--output", folder / "run", cwd=folder, hook=hook).fine()
    count = int(done.out.rpartition("count ")[2])
    assert count > 60
    return count


@pytest.mark.parametrize("share", [0.02, 0.2, 0.45, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("fault", ["exit", "full"])
def test_a_whole_run_at_an_operation(
    fault: str, share: float, operations: int, zygote: Zygote, whole: Path, tmp_path: Path
) -> None:
    """Ended, or out of room, anywhere: gone on with, it ends as the run that nothing happened to."""
    folder = tmp_path / "run"
    hook = INSTALL.format(at=max(1, round(share * operations)), act=EXIT if fault == "exit" else FULL)
    done = zygote.run(*TINY, "--output", folder, cwd=tmp_path, hook=hook)
    done.check()
    if fault == "exit":
        assert done.code == 77
    elif share == 1.0:  # what only the page shows comes last, and is not the run's failure
        assert done.code == 0 and "No space left on device" in done.err
    elif done.code == 0:  # which operation it is differs from run to run: nor is an old checkpoint that stays a failure
        assert "cannot be removed: No space left on device" in done.err
    else:
        done.failed(1, "No space left on device")
    zygote.run(*TINY, "--output", folder, "--resume", "auto", cwd=tmp_path).fine()
    same_result(folder, whole)


def test_a_disk_that_fills_up(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """A real one, too small for a second checkpoint: the first stays, and the run goes on where there is room."""
    size = sum(len(data) for data in content(whole / "checkpoints" / f"step-{steps(whole)[0]:08d}").values())
    with tiny_disk(tmp_path / "disk", f"{round(1.6 * size / 1024)}k"):
        folder = tmp_path / "disk" / "run"
        done = zygote.run(*TINY, "--output", folder, cwd=tmp_path)
        done.failed(1, "No space left on device")
        before = steps(folder)
        assert before == [5]
        done = zygote.run("--resume", folder, cwd=tmp_path)
        done.failed(1, "No space left on device")
        assert steps(folder) == before
        (tmp_path / "run").mkdir()
        for name, data in content(folder).items():
            path = tmp_path / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    zygote.run("--resume", tmp_path / "run", cwd=tmp_path).fine()
    same_result(tmp_path / "run", whole)


def test_a_limit_on_the_size_of_files(zygote: Zygote, tmp_path: Path) -> None:
    """`ulimit -f`, as some clusters set it: too small for any checkpoint."""
    done = zygote.run(*TINY, "--output", tmp_path / "run", cwd=tmp_path, limits={"RLIMIT_FSIZE": 6000})
    done.failed(1, "step-00000005 was not saved", "File too large")
    assert not steps(tmp_path / "run")


def test_curves_that_cannot_be_written(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    hook = """
import errno, os
from tensorboard.summary.writer import record_writer
def full(self, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
record_writer.RecordWriter.write = full
"""
    done = zygote.run(*TINY, "--output", tmp_path / "run", cwd=tmp_path, hook=hook).fine()
    assert done.err.count("warning: no curves for TensorBoard from here on: No space left on device") == 1
    same_result(tmp_path / "run", whole)


def test_a_report_that_cannot_be_made(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    hook = "from training.report import page\ndef fail(run): raise ValueError('no fonts')\npage.write_report = fail"
    done = zygote.run(*TINY, "--output", tmp_path / "run", cwd=tmp_path, hook=hook, report=True).fine()
    assert f"warning: no report: no fonts; to make it: python -m training.report {tmp_path / 'run'}" in done.err
    same_result(tmp_path / "run", whole)


def test_a_folder_that_may_not_be_written(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    zygote.run(*TINY, "--output", tmp_path / "closed" / "run", cwd=tmp_path, obeys=True).failed(2, "Permission denied")
    zygote.run(*TINY, "--output", tmp_path / "closed", cwd=tmp_path, obeys=True).failed(2, "Permission denied")
    assert not list((tmp_path / "closed").iterdir())


def test_a_folder_that_may_no_longer_be_written(zygote: Zygote, tmp_path: Path) -> None:
    """While the run goes on."""
    folder = tmp_path / "run"
    hook = f"""
import os
from training import loop
real = loop.train_step
def step(*a, **k):
    if a[3].step == 7:
        os.chmod({str(folder / "checkpoints")!r}, 0o555)
    return real(*a, **k)
loop.train_step = step
"""
    zygote.run(*TINY, "--output", folder, cwd=tmp_path, hook=hook, obeys=True).failed(
        1, "was not saved", "Permission denied"
    )
    assert steps(folder) == [5]
    (folder / "checkpoints").chmod(0o777)
    zygote.run("--resume", folder, cwd=tmp_path, obeys=True).fine()
    assert summary(folder)["steps"] == 15


def test_best_weights_that_may_not_be_removed(zygote: Zygote, tmp_path: Path) -> None:
    """Better ones take their place; what cannot be removed is rubbish, and warned about."""
    folder = tmp_path / "run"
    hook = f"""
import os
from training import loop
real = loop.train_step
def step(*a, **k):
    if a[3].step == 7:
        os.chmod({str(folder / "best")!r}, 0o555)
    return real(*a, **k)
loop.train_step = step
"""
    done = zygote.run(*TINY, "--output", folder, cwd=tmp_path, hook=hook, obeys=True).fine()
    assert "cannot be removed: Permission denied" in done.err
    assert (folder / "best" / "model.safetensors").exists() and summary(folder)["steps"] == 15


def test_umask(zygote: Zygote, tmp_path: Path) -> None:
    """A user's umask is obeyed: nothing of a run can be read by others where it says so."""
    zygote.run(*TINY, "--output", tmp_path / "run", cwd=tmp_path, hook="import os\nos.umask(0o077)").fine()
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 15
