"""What is measured is what is said to be measured."""

import itertools

import pytest
import torch
from torch import nn

from benchmarks import measure
from layers.drop_path import DropPath


class Work(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.drop_path = DropPath(drop_prob, mode="skip")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop_path.residual(x, self.fc)


def test_the_root_is_the_checkout() -> None:
    assert (measure.ROOT / "train.py").is_file() and (measure.ROOT / "benchmarks" / "results").is_dir()


def test_realised_rate() -> None:
    torch.manual_seed(0)
    assert measure.realised_rate(Work(0.25).train(), 8, draws=50) == 0.25  # mode skip's count is exact at 8 samples
    assert measure.realised_rate(Work(0.25).eval(), 8, draws=5) == 0.0


def test_sides_take_turns_and_ratios_are_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    models: dict[str, nn.Module] = {"mask": Work(0.0), "skip": Work(0.5)}
    names, order = {id(model): name for name, model in models.items()}, []
    clock = itertools.count(1)

    def step_time(model: nn.Module, images: torch.Tensor) -> float:
        order.append(names[id(model)])
        return next(clock) * (2.0 if names[id(model)] == "mask" else 1.0)

    monkeypatch.setattr(measure, "step_time", step_time)
    monkeypatch.setattr(measure, "peak_memory", lambda model, images: 1.0)
    found = measure.interleaved(models, torch.zeros(4, 8), 3)
    assert order == ["mask", "skip"] * 4, "one round of each to warm up, then three in turns"
    ratios = [2 * 3 / 4, 2 * 5 / 6, 2 * 7 / 8]
    assert found["skip"]["speedup_over_mask"] == pytest.approx(sorted(ratios)[1], abs=1e-4)
    assert found["mask"]["speedup_over_mask"] == 1.0


def test_peak_memory_counts_what_a_step_keeps() -> None:
    few, many = (measure.peak_memory(nn.Sequential(nn.Linear(256, 256)), torch.randn(n, 256)) for n in (64, 4096))
    assert many > 8 * few > 0


def test_machine_and_facts() -> None:
    assert ", 1 thread, " in measure.machine(1) and ", 2 threads, " in measure.machine(2)
    assert set(measure.facts()) == {"commit", "machine", "torch", "timm"}
