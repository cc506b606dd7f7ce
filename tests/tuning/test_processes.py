"""Real processes on one study: each unit is trained once, a dead process's is gone on with, and a signal loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from files import lock
from tests.tuning.parts import STUDY
from tuning.study import StudyFolder

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(lock.fcntl is None, reason="no flock")]

# 8 epochs of 23 steps, saved every 5 steps, so that there is something to go on from
LONGER = STUDY.replace("batch_size: 256", "batch_size: 64").replace("epochs: 2", "epochs: 8").replace(
    "runtime: {device: cpu, precision: float32}", "runtime: {device: cpu, precision: float32}\n  checkpoint: {every_steps: 5}"
)  # fmt: skip


def start(config: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tune.py"), "--config", str(config), "--output", str(out), "--worker",
               "search.trials=3", "race={seeds: [1, 2], keep: [2]}"]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def wait_for(what: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def holders(folder: StudyFolder) -> dict[int, Path]:
    """Processes that train at present and have saved a checkpoint, and their units."""
    found = {}
    for path in folder.units.glob(f"*/seed-*/{lock.LOCK}"):
        if lock.is_locked(path.parent) and list(path.parent.glob("checkpoints/step-*")):
            try:
                found[json.loads(path.read_text())["pid"]] = path.parent
            except (OSError, ValueError):  # it has just ended
                continue
    return found


def test_processes_share_the_units_and_survive_each_other(tmp_path: Path) -> None:
    config, folder = tmp_path / "long.yaml", StudyFolder(tmp_path / "out")
    config.write_text(LONGER)

    alone = start(config, folder.path)
    wait_for(lambda: holders(folder))
    alone.send_signal(signal.SIGINT)
    told, _ = alone.communicate(timeout=120)
    assert alone.returncode == 0, told
    (stopped,) = folder.units.glob("*/seed-*")
    assert not lock.is_locked(stopped)

    one, two = start(config, folder.path), start(config, folder.path)
    wait_for(lambda: {one.pid, two.pid} <= holders(folder).keys())
    killed = holders(folder)[one.pid]
    os.kill(one.pid, signal.SIGKILL)
    one.communicate()
    told, _ = two.communicate(timeout=400)
    assert two.returncode == 0, told

    trials = folder.read_trials()
    assert sorted((trial.state, len(trial.scores)) for trial in trials) == [
        ("dropped", 1),
        ("dropped", 2),
        ("winner", 2),
    ]
    logs = {path.parent: path.read_text() for path in folder.units.glob("*/seed-*/train.log")}
    assert len(logs) == 5
    for unit, log in logs.items():
        begun = [line for line in log.splitlines() if line.startswith("run  ")]
        again = {stopped, killed} & {unit}
        assert "going on" not in begun[0] and all("going on from step" in line for line in begun[1:]), log
        assert len(begun) >= 2 if again else len(begun) == 1, f"{unit} was trained {len(begun)} times:\n{log}"
    decided = [decision["what"] for decision in folder.read_decisions()]
    assert len(decided) == len(set(decided)), "each is noted once, whoever decides"
