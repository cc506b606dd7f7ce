"""Kernels beside torch's forms: what is timed computes the same, and without a GPU both sides are torch's."""

import pytest
import torch

from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import measure_kernels
from layers.fast import plain_paths
from tests.training.parts import CUDA

DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


@pytest.mark.parametrize("device", DEVICES)
def test_both_sides_compute_the_same(device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8, 8, 16, device=device)
    for name, form in gpu_kernels._forms(16, 6, torch.device(device)).items():
        with plain_paths():
            expected = form(x)
        torch.testing.assert_close(form(x), expected, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_every_kernel_is_timed_in_both_precisions(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "SHAPES", ((4, 4, 8),))
    rows = measure_kernels(torch.device(device), 2, 1)
    assert len({(row["what"], row["dtype"]) for row in rows}) == len(rows) == 12
    assert all(row["plain_ms"] > 0 and row["kernels_ms"] > 0 and row["plain_over_kernels"] > 0 for row in rows)
