"""What train.py writes where there is no terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_train import ROOT, TINY
from train import main
from training.config import json_schema


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


@pytest.mark.slow
def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "optim.epochs=2", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=True)
    for text in (done.stdout, done.stderr):
        assert not {*text} & {*range(32)} - {*b"\n"}, "no control character"
    lines = done.stdout.decode().splitlines()
    assert [line[:11] for line in lines if line.startswith("epoch")] == ["epoch   1/2", "epoch   2/2"]
    assert "it/s" not in done.stderr.decode() and "%|" not in done.stderr.decode()
