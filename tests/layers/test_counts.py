"""Counts of samples: eager and compiled draws add up, and none is lost on the way."""

import copy
from typing import Any

import pytest
import torch

from layers.counts import SampleCounts
from layers.drop_path import DropPath


def test_counts_and_masks_add_up() -> None:
    counts = SampleCounts()
    counts.add(8, 5, 6)
    counts.add(4, torch.tensor([True, False, True, True]), 4)
    counts.add(3, torch.tensor(2), torch.tensor(3))
    assert (counts.samples_seen(), counts.samples_dropped(), counts.samples_computed()) == (15, 5, 13)
    twin = copy.deepcopy(counts)
    twin.add(1, 0, 1)
    assert (twin.samples_dropped(), counts.samples_dropped()) == (6, 5)
    counts.set(7, 3, 6)
    assert (counts.samples_seen(), counts.samples_dropped(), counts.samples_computed()) == (7, 3, 6)


@pytest.mark.parametrize("mode", ["mask", "skip", "batch"])
def test_eager_and_compiled_draws_add_up(mode: str) -> None:
    torch.manual_seed(0)
    module = DropPath(0.4, mode=mode)  # type: ignore[arg-type]
    compiled = torch.compile(module, backend="eager")
    dropped = 0
    for step in range(10):
        x = torch.ones(8, 2)
        out = (compiled if step % 2 else module)(x)
        dropped += int((out[:, 0] == 0).sum())
        assert module.samples_seen == 8 * (step + 1) and module.samples_dropped == dropped
        assert module.samples_computed == 8 * (step + 1), "the branch was computed already"
    assert dropped > 0
    numbers, tensors = module._counts.numbers[0], int(module._counts.seen)
    assert numbers == tensors == 40, "each form adds to its own"


def test_transforms_of_torch_func_count_nothing() -> None:
    module = DropPath(0.4)
    torch.func.grad(lambda x: module(x).sum())(torch.ones(8, 2))
    assert module.samples_seen == 0


@pytest.mark.parametrize("mode", ["skip", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_numbers_of_eager_code_are_those_of_compiled_code(mode: str, dtype: torch.dtype) -> None:
    """Python's floats are float64, as the tensor that holds the rate is."""
    for rate in (0.0, 0.1, 0.3, 1 / 3, 0.7, 1 - 1e-12, 1.0):
        module = DropPath(rate, mode=mode)  # type: ignore[arg-type]
        twins = []
        for compiled in (False, True):
            torch._dynamo.reset()
            torch.manual_seed(3)
            count: Any = module._draw_count
            scale: Any = module._scale
            if compiled:
                count, scale = (torch.compile(f, backend="eager", fullgraph=True) for f in (count, scale))
            twins.append([scale(dtype), *(torch.as_tensor(count(batch)) for batch in (1, 7, 8, 10_001))])
        for got, want in zip(*twins, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
