"""Processes of one run: one raises, hangs or is killed, and the others leave in bounded time and name it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.parts import PATIENCE, ROOT, TINY, Zygote, free_port, same_result, steps, summary

pytestmark = pytest.mark.slow

TWO = [*TINY, "data.batch_size=128", "checkpoint.every_steps=2", "runtime.timeout_minutes=0.1"]
AT_STEP = """
import math, os, time
from training import lost_rank, loop
lost_rank.describe_lost.__kwdefaults__["patience"] = 3.0
_real = loop.train_step
def step(setup, trained, batches, progress, **options):
    if progress.step == 3 and setup.world.rank == FAULTY:
        ACT
    return _real(setup, trained, batches, progress, **options)
loop.train_step = step
"""

STOP = """
import signal
_inner = loop.train_step
def stop(*a, **k):
    if a[3].step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return _inner(*a, **k)
loop.train_step = stop
"""


def at_step(act: str, *, rank: int = 1, step: int = 3) -> str:
    return AT_STEP.replace("FAULTY", str(rank)).replace("ACT", act).replace("step == 3", f"step == {step}")


def test_a_rank_that_raises(zygote: Zygote, tmp_path: Path) -> None:
    hook = at_step("raise ValueError('boom')")
    first, second = (run.wait() for run in zygote.ranks(*TWO, "--output", tmp_path / "run", cwd=tmp_path, hook=hook))
    first.failed(1, "rank 0 waited for the others in vain: rank 1 stopped: ValueError: boom", "--resume")
    assert second.code == 1 and "ValueError: boom" in second.err, "a mistake of the code keeps its traceback"
    assert steps(tmp_path / "run") == [2]


def test_rank_0_that_fails(zygote: Zygote, tmp_path: Path) -> None:
    hook = at_step("from files.errors import Failure; raise Failure('the cable is cut')", rank=0)
    first, second = (run.wait() for run in zygote.ranks(*TWO, "--output", tmp_path / "run", cwd=tmp_path, hook=hook))
    first.failed(1, "error: the cable is cut")
    second.failed(1, "rank 1 waited for the others in vain: rank 0")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs(rank: int, zygote: Zygote, tmp_path: Path) -> None:
    hook = at_step("time.sleep(1000)", rank=rank)
    runs = zygote.ranks(*TWO, "--output", tmp_path / "run", cwd=tmp_path, hook=hook)
    try:
        runs[1 - rank].wait().failed(1, f"rank {rank} does not answer: hanging, or killed")
    finally:
        runs[rank].send(signal.SIGKILL)
        runs[rank].wait()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [1, 5])
def test_a_rank_that_is_killed(step: int, rank: int, zygote: Zygote, tmp_path: Path) -> None:
    """Before anything is saved, and when the first save is over, which the second has waited for."""
    hook = at_step("os.kill(os.getpid(), 9)", rank=rank, step=step)
    runs = [run.wait() for run in zygote.ranks(*TWO, "--output", tmp_path / "run", cwd=tmp_path, hook=hook)]
    assert runs[rank].code == -signal.SIGKILL
    left = runs[1 - rank].failed(1, f"rank {rank} does not answer: hanging, or killed")
    assert ("--resume" in left.err) == (step == 5)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(zygote: Zygote, tmp_path: Path) -> None:
    hook = at_step("batches[0][0][5] = math.nan")
    first, second = (run.wait() for run in zygote.ranks(*TWO, "--output", tmp_path / "run", cwd=tmp_path, hook=hook))
    for done in (first, second):
        done.failed(1, "step 3: loss or gradient is not finite on rank 1; stopped before the optimizer step")
    assert "in training samples" in second.err and "in training samples" not in first.err


def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_by_all(zygote: Zygote, tmp_path: Path) -> None:
    hook, skip = at_step("batches[0][0][5] = math.nan"), "optim.on_non_finite=skip"
    settings = [*TWO, skip, "checkpoint.keep=20"]
    for run in zygote.ranks(*settings, "--output", tmp_path / "whole", cwd=tmp_path, hook=hook):
        run.wait().fine()
    listed = (tmp_path / "whole" / "non_finite.csv").read_text().splitlines()
    assert len(listed) == 2 and listed[1].startswith("1,3,1,") and summary(tmp_path / "whole")["non_finite_steps"] == 1
    stop = hook + STOP
    for runs in (
        lambda: zygote.ranks(*settings, "--output", tmp_path / "run", cwd=tmp_path, hook=stop),
        lambda: zygote.ranks(*settings, "--output", tmp_path / "run", "--resume", "auto", cwd=tmp_path, hook=hook),
    ):
        for run in runs():
            run.wait().fine()
    same_result(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / "non_finite.csv").read_text().splitlines() == listed


def test_torchrun_ends_with_a_rank_that_hangs_and_leaves_no_process(tmp_path: Path) -> None:
    """Everything as users start it: the launcher, and a worker of each loader."""
    script = tmp_path / "hanging.py"
    hook = at_step("time.sleep(1000)")
    script.write_text(f"import sys\nimport train\n{hook}\nif __name__ == '__main__':\n    sys.exit(train.main())\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
              str(script), *TWO, "data.workers=1", "--output", str(tmp_path / "run")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
                   "MARK_OF_THIS_TEST": str(tmp_path)}  # fmt: skip
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 1
    assert "error: rank 0 waited for the others in vain: rank 1 does not answer: hanging, or killed" in done.stderr
    deadline = time.monotonic() + 15  # a loader's worker looks for its parent every few seconds
    while left := [p for p in Path("/proc").glob("[0-9]*") if marked(p, str(tmp_path))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def marked(process: Path, mark: str) -> bool:
    try:
        alive = (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return alive and f"MARK_OF_THIS_TEST={mark}".encode() in (process / "environ").read_bytes()
    except OSError:
        return False
