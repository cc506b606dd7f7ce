"""Threads: how many, and that those that wait sleep, as the OpenMP that torch loads says itself."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import joblib
import pytest

from training.threads import number_of_threads, wait_passively

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"train.py": "--print-config", "validate.py": "--help", "predict.py": "--help", "export.py": "--help",
           "benchmark.py": "--help", "tune.py": "--print-config"}  # fmt: skip
CORES = joblib.cpu_count(only_physical_cores=True)


def openmp(script: str, **settings: str) -> dict[str, str]:
    """What GNU OpenMP says of itself when a script loads torch; every copy of it that is loaded says the same."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, script, SCRIPTS[script]], cwd=ROOT, env=clean | settings | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True, text=True, check=True)  # fmt: skip
    said = set(re.findall(r"(OMP_WAIT_POLICY|GOMP_SPINCOUNT) = '(\w+)'", done.stderr))
    if "GOMP_SPINCOUNT" not in dict(said):
        pytest.skip("torch has another OpenMP here")
    assert len(said) == 2, said
    return dict(said)


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=[pytest.mark.slow] * (name != "train.py")) for name in SCRIPTS]
)
def test_waiting_threads_do_not_spin(script: str) -> None:
    assert openmp(script) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


@pytest.mark.parametrize("settings", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_user_set_wins(settings: dict[str, str]) -> None:
    assert openmp("train.py", **settings).items() >= settings.items()


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_one_setting_of_the_user_is_all_there_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "7")
    before = dict(os.environ)
    wait_passively()
    assert dict(os.environ) == before


def test_nothing_heavy_is_loaded_before_it() -> None:
    code = "import sys, training.threads; print(*{'torch', 'numpy', 'timm', 'sklearn', 'joblib'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == ""
    for script in SCRIPTS:
        body = ast.parse((ROOT / script).read_text()).body
        assert [ast.unparse(node) for node in body[1:3]] == [
            "from training.threads import wait_passively",
            "wait_passively()",
        ], f"{script}: stands first, behind the docstring"


@pytest.mark.parametrize(
    ("wished", "setting", "processes", "threads"),
    [
        (None, 5, 1, 5), ("2", 5, 1, 5), (None, 3, 2, 3),
        (None, "auto", 1, CORES), (None, "auto", 2, max(1, CORES // 2)), (None, "auto", 10**6, 1),
        ("3", "auto", 1, 3), (" 3, 2", "auto", 1, 3), ("1", "auto", 1, 1), ("3", "auto", 2, 3),
        ("1", "auto", 2, max(1, CORES // 2)),  # torchrun's
        ("", "auto", 1, CORES), ("0", "auto", 1, CORES), ("-1", "auto", 1, CORES), ("many", "auto", 1, CORES),
    ],
)  # fmt: skip
def test_number(wished: str | None, setting, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if wished is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", wished)
    assert number_of_threads(setting, processes=processes) == threads


def test_a_limit_on_this_process_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert number_of_threads("auto") == 1
