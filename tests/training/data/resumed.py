"""A run on any kind of data: killed in mid-epoch, resumed with other numbers of workers, and compared."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.training.data.parts import TESTS
from training.config import load_config
from training.run import run

ROOT = TESTS.parent
MODEL = ["model={name: caformer_n4, image_size: 16, depths: [1, 1], dims: [16, 32]}", "data.batch_size=4",
         "optim={epochs: 3, warmup_epochs: 0}", "augment={crop_scale: [0.5, 1.0], random_erasing: 0.5}",
         "drop_path.rate=0.3", "checkpoint={every_steps: 1, keep: 100}",
         "runtime={device: cpu, precision: float32, threads: 1}"]  # fmt: skip


def _sums(folder: Path) -> dict[str, str]:
    summary = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key.endswith("sha256")}


def assert_resumed_equals_uninterrupted(data: list[str], tmp_path: Path) -> None:
    """Killed with 2 workers by SIGKILL, resumed with 0 and with 2: weights equal those of a run that nothing stopped."""
    settings = [*data, *MODEL]
    run(load_config(None, [*settings, "data.workers=0"]), tmp_path / "whole")
    expected = _sums(tmp_path / "whole")
    assert "weights_sha256" in expected
    killed = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), *settings, "data.workers=2", "--output", str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not (steps := sorted((killed / "checkpoints").glob("step-*"))) or int(steps[-1].name[5:]) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (killed / "summary.json").exists(), "it was killed before its end"
    for workers in (0, 2):
        again = tmp_path / f"again{workers}"
        shutil.copytree(killed, again)
        run(load_config(None, [*settings, f"data.workers={workers}"]), again, resume="auto")
        assert _sums(again) == expected
    run(load_config(None, [*settings, "seed=1", "data.workers=0"]), tmp_path / "other")
    assert _sums(tmp_path / "other") != expected, "so that this can fail"
