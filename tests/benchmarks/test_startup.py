"""Start-up: what is not loaded early, and how the benchmark compares."""

import subprocess
import sys

import pytest

from benchmarks.measure import ROOT
from benchmarks.startup import STARTS, compare, environment, seconds_of
from files.errors import Failure

LATER = {
    "matplotlib", "jinja2", "tensorboard", "sklearn", "onnx", "onnxruntime", "scipy", "optuna", "pandas", "datasets", "wandb",
    "mlxtend", "joblib", "torchcodec",
}  # fmt: skip

HELP = """
import runpy, sys
import models
for script in ("train", "validate", "predict", "export", "tune"):
    sys.argv = [f"{script}.py", "--help"]
    try:
        runpy.run_path(f"{script}.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code
print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_what_few_need_is_not_loaded_by_import_models_nor_by_help() -> None:
    """In one process, which would hold what any of them loads."""
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, env=environment(), capture_output=True, text=True)
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    assert {"torch", "models", "training", "tuning"} <= loaded, done.stderr
    assert not loaded & LATER


def test_starts_are_compared_with_the_first_of_the_same_round() -> None:
    rows = compare({"base": [1.0, 2.0, 4.0], "other": [1.1, 2.2, 8.0]})
    assert rows["base"]["ratio"] == 1.0 and rows["other"]["seconds"] == 2.2
    assert rows["other"]["ratio"] == 1.1 and rows["other"]["quartiles"] == [1.1, 1.55]
    assert next(iter(STARTS)) == "import torch, timm", "what the others are compared with"


def test_a_start_that_fails_says_why() -> None:
    assert 0 < seconds_of(["-c", "pass"]) < 60
    with pytest.raises(Failure, match="No module named 'nothing_of_ours'"):
        seconds_of(["-c", "import nothing_of_ours"])
