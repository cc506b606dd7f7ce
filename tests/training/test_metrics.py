"""Metrics against a computation in other words; what a new entry of the list brings with it."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from training import console, metrics, run_folder
from training.distributed import ALONE, World
from training.metrics import METRICS, Mean, among_top, summed_loss
from training.run_folder import COLUMNS, RunFolder

LOGITS = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
TARGETS = torch.tensor([0, 1, 2, 2])


def test_values_over_batches_of_different_sizes() -> None:
    wanted = {"loss": cross_entropy(LOGITS, TARGETS).item(), "top1": 50.0, "top2": 75.0, "top9": 100.0}
    found = {"loss": Mean("loss", "loss", summed_loss)}
    found |= {f"top{k}": Mean(f"top{k}", "", among_top(k), percent=True) for k in (1, 2, 9)}
    for rows in (slice(0, 3), slice(3, 4)):
        for metric in found.values():
            metric.update(LOGITS[rows], TARGETS[rows])
    for metric in found.values():
        metric.merge(ALONE)
    assert {name: metric.value() for name, metric in found.items()} == pytest.approx(wanted)


class Other(World):
    """The first of two processes; the other one has what it is told."""

    theirs = (0.0, 0.0)

    def sum(self, values: Tensor) -> Tensor:
        return values + torch.tensor(self.theirs, dtype=torch.float64)


def test_processes_are_merged_by_samples_not_by_means() -> None:
    world = Other(rank=0, local_rank=0, size=2, device=torch.device("cpu"))
    metric = Mean("top1", "top-1", among_top(1), percent=True)
    metric.update(LOGITS, TARGETS)
    world.theirs = (1.0, 1.0)
    metric.merge(world)
    assert metric.value() == pytest.approx(60.0)
    metric.reset()
    metric.merge(world)
    assert metric.value() == 100.0, "what it held is forgotten, and no batch of one's own is needed"


def test_columns_are_distinct_and_stand_between_the_runs_own() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert [m.column for m in METRICS] == ["val_loss", "val_top1", "val_top5"] == list(COLUMNS[3:6])


def test_a_new_metric_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its column, its words in the line of an epoch and in the bar come with it."""
    margin = Mean("val_margin", "margin", lambda logits, _: (logits.amax(1) - logits.amin(1)).sum(), in_bar=True)
    monkeypatch.setattr(run_folder, "COLUMNS", ("epoch", margin.column))
    monkeypatch.setattr(console, "METRICS", [margin])
    margin.update(LOGITS, TARGETS)
    margin.merge(ALONE)
    folder = RunFolder(tmp_path)
    row: dict[str, Any] = {"epoch": 1, margin.column: margin.value()}
    folder.append_metrics(row)
    with folder.metrics.open() as file:
        assert next(csv.DictReader(file)) == {"epoch": "1", "val_margin": "3.75"}
    assert margin.text(3.75) == "margin 3.7500"
    assert all(isinstance(metric, metrics.Metric) for metric in (*METRICS, margin))
