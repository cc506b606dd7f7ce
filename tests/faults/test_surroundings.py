"""What surrounds a run: readers that leave, clocks that jump, no home, other encodings, few files, no terminal."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.parts import ROOT, TINY, Zygote, read_metrics, same_result, steps, summary, write_images

pytestmark = pytest.mark.slow


def test_a_reader_that_leaves(tmp_path: Path, whole: Path) -> None:
    """`train.py | head -1`, and the same for the errors: the run goes on without a word, to its end."""
    train = [sys.executable, str(ROOT / "train.py"), *TINY, "--output", str(tmp_path / "run")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(train, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith(b"model ")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(120) == 0
    same_result(tmp_path / "run", whole)


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_standard_files_that_are_closed(closed: list[int], zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """`>&-`: what would be printed must not get into the next file that is opened."""
    hook = "import os, sys\n" + "".join(f"os.close({n})\n" for n in closed)
    hook += "".join(f"sys.{name} = None\n" for n, name in ((1, "stdout"), (2, "stderr")) if n in closed)
    done = zygote.start(*TINY, "--output", tmp_path / "run", cwd=tmp_path, hook=hook)
    assert done.wait().code == 0
    same_result(tmp_path / "run", whole)


def test_a_clock_that_jumps(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """An hour back and forth with every look at it: durations are of another clock, and names still differ."""
    hook = """
import itertools, time
_real, _jumps = time.time, itertools.cycle([0.0, -3600.0, 3600.0, -86400.0])
time.time = lambda: _real() + next(_jumps)
"""
    zygote.run(*TINY, "--output", tmp_path / "run", cwd=tmp_path, hook=hook).fine()
    same_result(tmp_path / "run", whole)
    seconds = [float(line.split(",")[-1]) for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < 600


def test_a_clock_that_stands_still(zygote: Zygote, tmp_path: Path) -> None:
    """Two runs of one name in one second have two folders."""
    hook = "import time\ntime.time = lambda: 1_000_000_000.0"
    for _ in range(2):
        zygote.run(*TINY, "optim.epochs=1", "optim.warmup_epochs=0", cwd=tmp_path, hook=hook).fine()
    first, second = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert second == f"{first}-2" and first.startswith("digits-200109")


def test_no_home(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """No home, no cache that could be written, no name of the user: matplotlib and torch find another place."""
    missing: dict[str, str | None] = dict.fromkeys(("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "MPLCONFIGDIR"))
    env = {**missing, "HOME": "/nonexistent", "XDG_CACHE_HOME": "/proc/nothing", "TORCH_HOME": "/proc/nothing"}
    done = zygote.run(*TINY, "--output", tmp_path / "run", cwd=tmp_path, env=env, report=True).fine()
    assert "no report" not in done.err and (tmp_path / "run" / "report.html").exists()
    same_result(tmp_path / "run", whole)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_another_encoding(encoding: str, zygote: Zygote, tmp_path: Path) -> None:
    """A terminal that cannot show a name gets it escaped; files are UTF-8 whatever the locale."""
    settings = write_images(tmp_path / "b\u00efld \u82b1")
    hook = f"import sys\nfor s in (sys.stdout, sys.stderr): s.reconfigure(encoding={encoding!r}, errors='strict')"
    env = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}
    folder = tmp_path / "l\u00e4uft \u8d70"
    zygote.run(*TINY, *settings, "--output", folder, cwd=tmp_path, hook=hook, env=env).fine()
    (tmp_path / "b\u00efld \u82b1" / "train" / "cat" / "0.png").unlink()
    done = zygote.run("--resume", folder, cwd=tmp_path, hook=hook, env=env)
    done.failed(2, "\\u82b1")


def test_a_locale_that_is_not_there(tmp_path: Path) -> None:
    """The whole interpreter under LC_ALL=C, as in a container without locales."""
    settings = write_images(tmp_path / "b\u00efld \u82b1")
    train = [sys.executable, str(ROOT / "train.py"), *TINY, *settings, "optim.epochs=1", "optim.warmup_epochs=0"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "LC_ALL": "C",
                   "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    folder = tmp_path / "l\u00e4uft \u8d70"
    for more in (["--output", str(folder)], ["--output", str(folder), "--resume", "auto"]):
        done = subprocess.run([*train, *more], cwd=tmp_path, env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert "\u82b1" in (folder / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("workers", [0, 2])
def test_few_open_files(workers: int, zygote: Zygote, tmp_path: Path) -> None:
    """`ulimit -n 64`: enough for a run; what is not enough is said."""
    settings = [*TINY, f"data.workers={workers}"]
    zygote.run(*settings, "--output", tmp_path / "run", cwd=tmp_path, limits={"RLIMIT_NOFILE": 64}).fine()
    done = zygote.run(*settings, "--output", tmp_path / "few", cwd=tmp_path, limits={"RLIMIT_NOFILE": 9})
    if workers:
        done.failed(done.code, "Too many open files")
    else:
        done.fine()


def test_little_memory(zygote: Zygote, tmp_path: Path) -> None:
    hook = """
import torch
from training import loop
real = loop.train_step
def step(*a, **k):
    if a[3].step == 7:
        torch.empty(10**15)
    return real(*a, **k)
loop.train_step = step
"""
    done = zygote.run(*TINY, "--output", tmp_path / "run", cwd=tmp_path, hook=hook)
    done.failed(1, "out of memory on cpu", "data.batch_size", "--resume")
    assert steps(tmp_path / "run") == [5]


def test_a_run_that_may_only_be_read(zygote: Zygote, tmp_path: Path) -> None:
    """As somebody else's: said before anything begins."""
    folder = tmp_path / "run"
    zygote.run(*TINY, "--output", folder, cwd=tmp_path).fine()
    folder.chmod(0o555)
    done = zygote.run("--resume", folder, cwd=tmp_path, obeys=True)
    folder.chmod(0o755)
    done.failed(2, f"cannot write to {folder}", "Permission denied")


def test_no_terminal_and_no_input(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """As under a scheduler: lines, no bars that fill the log, and no question."""
    done = zygote.run(*TINY, "--output", tmp_path / "run", cwd=tmp_path, env={"TERM": None, "COLUMNS": None}).fine()
    assert len(done.out.splitlines()) < 20 and len(done.err) < 1000, done.err
    assert summary(tmp_path / "run")["steps"] == 15 and len(read_metrics(tmp_path / "run")) == 3
