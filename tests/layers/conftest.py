"""Kernels: those for CPUs on small tensors too, or not at all, and those for GPUs where there is no GPU."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch

import layers
from layers import fast_cpu, fast_cuda
from tests.layers.parts import DEVICE


@pytest.fixture(params=["kernels", "torch's forms"])
def cpu_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there are kernels for this CPU, which then take small tensors too: once so, and once not."""
    if request.param == "kernels":
        if fast_cpu.library() is None:
            pytest.skip("no kernels for this CPU, or no C compiler")
        monkeypatch.setattr(fast_cpu, "FEWEST", 1)
        return True
    monkeypatch.setattr(fast_cpu, "library", lambda: None)
    return False


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those for GPUs, to be called on small tensors, which are many tiles, programs and parts here.

    Without a GPU Triton's interpreter computes them on the CPU (see the conftest above).
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    if DEVICE == "cuda":
        yield
        return
    for name, value in {"TILE": 64, "PROGRAMS": 3, "PARTS": 4}.items():
        monkeypatch.setattr(fast_cuda, name, value)
    before = sys.modules.pop("layers.gpu_kernels", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.import_module("layers.gpu_kernels")
    try:
        _try_a_loop()
        yield
    finally:
        del sys.modules["layers.gpu_kernels"]
        if before is None:
            del layers.gpu_kernels  # type: ignore[attr-defined]
        else:
            sys.modules["layers.gpu_kernels"] = layers.gpu_kernels = before  # type: ignore[attr-defined]


def _try_a_loop() -> None:
    """Skips the test where an older Triton's interpreter meets a newer NumPy, as 3.6 does 2.4."""
    try:
        fast_cuda.group_norm_moments(torch.zeros(1, 1))
    except Exception as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        pytest.skip("this Triton's interpreter does not know loops with this NumPy")
