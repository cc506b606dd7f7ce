"""Exact resume, widely: rows that pair everything with everything, real kills at random times, several processes."""

import functools
import inspect
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_train import ROOT, command, environment, read_metrics, run, summary
from tests.training.resumes import FACTORS, interrupted, result, rows_of_pairs, settings, train, write_images
from training import checkpoint
from training.run_folder import RunFolder

pytestmark = pytest.mark.slow
ROWS = rows_of_pairs(FACTORS)
LAST = {"in a step": 5, "in a save": 2, "before validation": 2, "in validation": 2, "behind its row": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "images"
    write_images(folder)
    return folder


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda n: "-".join(ROWS[n].values()).replace(" ", "_"))
def test_every_pair_is_exact(number: int, root: Path, tmp_path: Path) -> None:
    """Ended where the row says, again within the first two steps after that, and then on with other workers."""
    row, draw = ROWS[number], random.Random(number)
    where = row["killed"]
    stops = [(where, draw.randint(2 if where in ("in a step", "behind its row") else 1, LAST[where]))]
    stops.append(("in a step", draw.randint(1, 2)))
    chosen = settings(row, root)
    whole = result(tmp_path / "whole", train(tmp_path / "whole", [*chosen, "data.workers=0"]))
    workers = (int(row["workers"]) + draw.randint(1, 2)) % 3
    assert interrupted(tmp_path / "run", chosen, stops, [f"data.workers={workers}"]) == whole
    if row["data"] == "skipping":
        assert whole["skipped_images"] == {"train": 1, "val": 1}


# ---- real kills -------------------------------------------------------------------------------------------------

EVERYTHING = {"mode": "skip", "schedule": "cosine", "accumulate": "2", "ema": "warmup", "mixing": "both",
              "erasing": "erasing", "workers": "1", "data": "policy", "classes": "half",
              "saving": "thread", "killed": "in a step"}  # fmt: skip


def in_a_child(work: Callable[[], object]) -> int:
    """Runs it in a fork of this process, which need not load torch; the exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """The test in a pytest of its own: once autograd has had threads in a process, none of its forks can train."""

    @functools.wraps(test)
    def run_alone(request: pytest.FixtureRequest, **fixtures: Any) -> None:
        if "ALONE" in os.environ:
            return test(**fixtures)
        command = [sys.executable, "-m", "pytest", "-m", "slow", "-p", "no:cacheprovider", request.node.nodeid]
        done = subprocess.run(
            command, cwd=ROOT, env={**environment(), "ALONE": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]

    signature = inspect.signature(test)
    asked = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run_alone.__signature__ = signature.replace(parameters=[asked, *signature.parameters.values()])  # type: ignore[attr-defined]
    return run_alone


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", range(3))
@alone
def test_killed_at_random_times(seed: int, root: Path, tmp_path: Path) -> None:
    """SIGKILL after random times, sometimes before the first step, until a run comes through."""
    chosen = [*settings(EVERYTHING, root), "optim.epochs=8", "checkpoint.every_steps=1"]
    start = time.monotonic()
    whole = result(tmp_path / "whole", train(tmp_path / "whole", chosen))
    seconds = time.monotonic() - start
    folder, draw, kills = tmp_path / "run", random.Random(seed), 0
    for number in range(30):
        delay = draw.uniform(0.05, 0.5) * seconds if number < 7 else 60 * seconds

        def work(delay: float = delay) -> None:
            signal.signal(signal.SIGALRM, lambda *_: kill_oneself())
            signal.setitimer(signal.ITIMER_REAL, delay)
            resume = RunFolder(folder).holds_run()
            again = train(folder, [*chosen, f"data.workers={draw.randint(0, 2)}"], resume=resume)
            assert result(folder, again) == whole

        status = in_a_child(work)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        shutil.rmtree(folder / ".writable", ignore_errors=True)
        if not RunFolder(folder).holds_run():  # killed before there was one
            shutil.rmtree(folder, ignore_errors=True)
    else:
        raise AssertionError("no run came through")
    assert kills >= 1
    assert result(folder, train(folder, chosen, resume=True)) == whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["_write_state", "_write_manifest", "publish", "_prune"])
@alone
def test_killed_during_a_save_beside_training(name: str, root: Path, tmp_path: Path) -> None:
    """SIGKILL of the whole process while the thread writes: training has gone on meanwhile, and is done again."""
    chosen = settings(EVERYTHING, root)
    whole = result(tmp_path / "whole", train(tmp_path / "whole", chosen))
    folder = tmp_path / "run"
    for count in (1, 3, 2):

        def work(count: int = count) -> None:
            real, calls = getattr(checkpoint, name), iter(range(1, 1000))

            def dying(*arguments: Any, **options: Any) -> Any:
                if next(calls) == count:
                    time.sleep(0.05)
                    kill_oneself()
                return real(*arguments, **options)

            setattr(checkpoint, name, dying)
            train(folder, chosen, resume=RunFolder(folder).holds_run())

        assert in_a_child(work) == -signal.SIGKILL
    assert result(folder, train(folder, chosen, resume=True)) == whole
    assert not [entry for entry in RunFolder(folder).checkpoints.iterdir() if entry.name.startswith(".")]


# ---- several processes ------------------------------------------------------------------------------------------

KILLED_AT = """
import os, signal, sys
from training import loop
real = loop.train_step
def stepping(setup, trained, batches, progress, **options):
    if progress.step == {step} and setup.world.rank == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(setup, trained, batches, progress, **options)
loop.train_step = stepping
import train
raise SystemExit(train.main())
"""
SMALL = ["model={name: caformer_n4, in_chans: 1, image_size: 8, depths: [1, 1], dims: [16, 32]}", "drop_path.rate=0.4"]
NORMED = ["model={name: timm/test_byobnet, in_chans: 1, image_size: 32}", "data.image_size=32", "drop_path.rate=0"]
PROCESSES = {
    # BatchNorm keeps statistics of each process's own batches
    "2, raw": (2, [*NORMED, "ema.enabled=false", "optim.accumulate=2"], 4),
    "2, average": (2, [*SMALL, "ema={enabled: true, decay: 0.8}", "augment.mixup=0.4", "data.workers=1"], 3),
    "3": (3, [*SMALL, "drop_path.mode=batch", "checkpoint.background=false"], 4),  # rounding depends on DDP's buckets
}


@pytest.mark.parametrize("name", PROCESSES)
def test_several_processes_of_which_one_is_killed(name: str, tmp_path: Path) -> None:
    processes, more, step = PROCESSES[name]
    chosen = [*more, "data.batch_size=96", "optim.epochs=2", "optim.warmup_epochs=0", "checkpoint.every_steps=1",
              "checkpoint.every_epochs=1", "drop_path.schedule={kind: ramp, start: 0.2}"]  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "run"
    done = run(*chosen, "--output", whole, cwd=tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr
    (tmp_path / "dying.py").write_text(KILLED_AT.format(step=step, rank=processes - 1))
    launch = [str(a) for a in command(*chosen, "--output", folder, processes=processes)]
    launch[launch.index(str(ROOT / "train.py"))] = str(tmp_path / "dying.py")
    dead = subprocess.run(launch, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert dead.returncode != 0 and not (folder / "summary.json").exists()
    again = run("--resume", folder, cwd=tmp_path, processes=processes)
    assert again.returncode == 0 and "going on from step" in again.stdout, again.stderr
    for key in ("weights_sha256", "ema_sha256", "best_top1", "final_top1", "steps"):
        assert summary(folder)[key] == summary(whole)[key]
    assert read_metrics(folder) == read_metrics(whole) and len(read_metrics(whole)) == 2


FAILING_SAVE = """
import train
from training import checkpoint, saving
from training.distributed import World
real = checkpoint._write_state
def failing(path, state):
    if path.name == "rank-00001.pt":
        raise OSError(28, "No space left on device")
    return real(path, state)
checkpoint._write_state = failing
raise SystemExit(train.main())
"""


def test_a_save_that_fails_on_one_process_stops_all(tmp_path: Path) -> None:
    """At the end of a step, with a message of one line each; nobody waits for another."""
    (tmp_path / "failing.py").write_text(FAILING_SAVE)
    chosen = [*SMALL, "data.batch_size=64", "optim.epochs=400", "checkpoint.every_steps=2"]
    launch = [str(a) for a in command(*chosen, "--output", tmp_path / "run", processes=2)]
    launch[launch.index(str(ROOT / "train.py"))] = str(tmp_path / "failing.py")
    done = subprocess.run(launch, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.count("was not saved, what was there before is untouched: No space left on device") == 1
    assert done.stderr.count("was not saved, what was there before is untouched: another rank failed") == 1
    assert "saving.py" not in done.stderr, "no traceback of ours"


def test_a_signal_to_the_whole_group_saves(tmp_path: Path) -> None:
    """As `timeout`, SLURM and a terminal send it: workers get it too, and neither die of it nor save."""
    chosen = [*SMALL, "data.batch_size=64", "data.workers=2", "optim.epochs=60", "checkpoint.every_steps=5"]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(*chosen, "--output", folder), cwd=tmp_path, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("SIGTERM: saved") == 1 and "Traceback" not in err
    steps = summary(folder)["steps"]
    assert [p.name for p in (folder / "checkpoints").iterdir()][-1:] and checkpoint.load_checkpoint(
        folder / "checkpoints" / f"step-{steps:08d}"
    )


def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    """Two, then three, then one: with a warning each, through the epochs that are left, every one of them noted."""
    folder = tmp_path / "run"
    chosen = [*SMALL, "data.batch_size=64", "optim.epochs=3", "checkpoint.every_steps=4", "checkpoint.every_epochs=1",
              "checkpoint.background=false"]  # fmt: skip
    (tmp_path / "dying.py").write_text(KILLED_AT.format(step=6, rank=0))
    launch = [str(a) for a in command(*chosen, "--output", folder, processes=2)]
    launch[launch.index(str(ROOT / "train.py"))] = str(tmp_path / "dying.py")
    subprocess.run(launch, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    again = run("--resume", folder, "optim.epochs=4", cwd=tmp_path, processes=3)
    assert again.returncode == 0 and again.stderr.count("saved by 2 processes, goes on with 3") == 1, again.stderr
    assert "behind its first 576 samples, of which 64 are left out" in again.stderr
    assert "step 4 is step 3 of 28" in again.stderr and "the total batch was 128, is now 192" in again.stderr
    assert [row["epoch"] for row in read_metrics(folder)] == ["1", "2", "3", "4"]
    assert summary(folder)["steps"] == 28
    one = run("--resume", folder, "optim.epochs=5", "optim.accumulate=3", cwd=tmp_path)
    assert one.returncode == 0 and "saved by 3 processes, goes on with 1" in one.stderr, one.stderr
    assert "the total batch stays 192" in one.stderr and summary(folder)["epochs"] == 5
