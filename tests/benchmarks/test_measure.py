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
    turns = ["mask", "skip"] * 2 + ["skip", "mask"] + ["mask", "skip"]
    assert order == turns, "one round to warm up, then three, each beginning with another"
    ratios = [2 * 3 / 4, 2 * 6 / 5, 2 * 7 / 8]
    assert found["skip"]["speedup_over_mask"] == pytest.approx(sorted(ratios)[1], abs=1e-4)
    assert found["mask"]["speedup_over_mask"] == 1.0


def test_turns_begin_one_further_each_round() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: float(order.append(name) or len(order)) for name in "abc"}
    assert measure.take_turns(runs, 3, warmup=2) == {
        "a": [7.0, 12.0, 14.0],
        "b": [8.0, 10.0, 15.0],
        "c": [9.0, 11.0, 13.0],
    }
    assert "".join(order) == "abcabc" + "abc" + "bca" + "cab"


def test_ratios_are_of_pairs() -> None:
    assert measure.paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == (2.0, [1.5, 2.5])
    assert measure.paired_ratio([3.0], [2.0]) == (1.5, [1.5, 1.5])
    assert measure.paired_ratio([1.0], [3.0], digits=2) == (0.33, [0.33, 0.33])


def test_peak_allocated_is_above_the_level_before() -> None:
    kept = [torch.zeros(2**20)]  # 4 MiB
    assert (
        measure.peak_allocated(lambda: kept.append(torch.zeros(2**19) + torch.zeros(2**19)), torch.device("cpu")) == 6.0
    )


def test_peak_memory_counts_what_a_step_keeps() -> None:
    few, many = (measure.peak_memory(nn.Sequential(nn.Linear(256, 256)), torch.randn(n, 256)) for n in (64, 4096))
    assert many > 8 * few > 0


def test_machine_and_facts() -> None:
    assert ", 1 thread, " in measure.machine(1) and ", 2 threads, " in measure.machine(2)
    assert set(measure.facts()) == {"commit", "machine", "torch", "timm"}
