"""Metrics against a computation in other words; what a new entry of the list brings with it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from files.errors import ConfigError
from tests.training.parts import TINY
from training.distributed import ALONE, World
from training.metrics import METRICS, Mean, among_top, summed_loss
from training.run_folder import COLUMNS, RunFolder

ROOT = Path(__file__).resolve().parents[2]
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


NEW_METRIC = """
from training import metrics

def spread(logits, targets):
    return (logits.amax(dim=1) - logits.amin(dim=1)).sum()

metrics.METRICS = (*metrics.METRICS, metrics.Mean("val_spread", "logit spread", spread, form=".2f", in_bar=True))
import train

raise SystemExit(train.main())
"""


def test_a_new_metric_is_one_entry(tmp_path: Path) -> None:
    """Its column, its words in the line of an epoch and its places in the report come with it."""
    (tmp_path / "with_metric.py").write_text(NEW_METRIC)
    command = [sys.executable, str(tmp_path / "with_metric.py"), *TINY, "--output", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[3:8] == ["val_loss", "val_top1", "val_top5", "val_spread", "lr"]
    for row in rows:
        assert f"  logit spread {float(row['val_spread']):.2f}" in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Validation: logit spread" in page and "Final logit spread" in page
    assert f"<dd>{float(rows[-1]['val_spread']):.2f}</dd>" in page
    # and without the metric the run cannot go on
    with pytest.raises(ConfigError, match="unknown column 'val_spread'"):
        RunFolder(tmp_path / "run").check_metrics()
