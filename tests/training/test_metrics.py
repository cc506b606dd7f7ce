"""Metrics against a computation in other words; what a new entry of the list brings with it."""

import csv
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, recall_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from files.errors import ConfigError
from tests.training.parts import TINY, plain_ece
from training.distributed import ALONE, World
from training.evaluation import evaluate
from training.metrics import METRICS, Mean, Predictions, among_top, evaluation_metrics, sign_of, summed_loss
from training.run_folder import COLUMNS, RunFolder

ROOT = Path(__file__).resolve().parents[2]
LOGITS = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
TARGETS = torch.tensor([0, 1, 2, 2])
MACRO: dict[str, Any] = {"average": "macro", "zero_division": 0}  # of scikit-learn, whose stubs know strings only
EACH: dict[str, Any] = {"average": None, "zero_division": float("nan")}
CLASSWISE = ["val_balanced", "val_macro_f1", "val_ece"]


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
    assert [m.column for m in METRICS] == ["val_loss", "val_top1", "val_top5", *CLASSWISE] == list(COLUMNS[3:9])


def test_less_is_better_of_losses_and_errors() -> None:
    assert {metric.column for metric in METRICS if sign_of(metric.column) < 0} == {"val_loss", "val_ece"}
    assert all(metric.sign == sign_of(f"val_{metric.column}") for metric in evaluation_metrics()[0][1:])


def measured(logits: Tensor, targets: Tensor, sizes: list[int]) -> tuple[dict[str, float], Predictions]:
    """What `evaluate` says of logits in batches of some sizes."""
    metrics, predictions = evaluation_metrics()
    batches = zip(logits.split(sizes), targets.split(sizes), strict=True)
    return evaluate(nn.Identity(), batches, metrics), predictions


@pytest.mark.parametrize(
    ("classes", "present", "predictable"), [(10, 10, 10), (10, 4, 10), (7, 7, 3), (6, 3, 2), (3, 1, 3), (1, 1, 1)]
)
def test_what_is_counted_per_class_equals_scikit_learn_s(classes: int, present: int, predictable: int) -> None:
    """Also where classes have no samples, are never predicted, or both."""
    random = torch.Generator().manual_seed(classes + present)
    logits, targets = torch.randn(211, classes, generator=random), torch.randint(present, (211,), generator=random)
    logits[:, predictable:] -= 99
    found, predictions = measured(logits, targets, [100, 1, 110])
    predicted, every = logits.argmax(dim=1), list(range(classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of classes that are predicted and have no samples
        matrix = confusion_matrix(targets, predicted, labels=every).tolist()
        wanted = {
            "balanced": 100 * balanced_accuracy_score(targets, predicted),
            "macro_f1": 100 * f1_score(targets, predicted, **MACRO),
            "ece": 100 * plain_ece(logits, targets),
            "nll": cross_entropy(logits, targets).item(),
        }
        recalls = recall_score(targets, predicted, labels=every, **EACH)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert list(found) == ["nll", "top1", "top5", "balanced", "macro_f1", "ece"]
    assert predictions.recall().numpy() == pytest.approx(np.asarray(recalls), nan_ok=True)
    assert predictions.confusion is not None
    assert predictions.confusion.tolist() == matrix
    assert predictions.samples.tolist() == predictions.confusion.sum(1).tolist()


@pytest.mark.parametrize(("sure", "wanted"), [(0.5, 50.0), (1.0, 50.0), (8 / 15, 3.3333333)])
def test_calibration_of_known_confidences(sure: float, wanted: float) -> None:
    """All right at 0.5: 50 off. Half right at 1: 50 off; half right at 8/15: 1/30 off."""
    logits = torch.tensor([[sure, 1 - sure]] * 4).log()
    targets = torch.tensor([0, 0, 0, 0] if sure == 0.5 else [0, 1, 0, 1])
    assert measured(logits, targets, [4])[0]["ece"] == pytest.approx(wanted, abs=1e-4)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    predictions = Predictions()
    predictions.parts = [(torch.linspace(0, 1, 16)[1:], torch.zeros(15), torch.zeros(15))]
    predictions.classes = 1
    predictions.merge(ALONE)
    assert predictions.bins[0].tolist() == [1.0] * 15


class Meeting(World):
    """One of two processes that are threads: sums are those of both."""

    barrier_of_two = threading.Barrier(2, timeout=30)
    sent: ClassVar[dict[int, Tensor]] = {}

    def sum(self, values: Tensor) -> Tensor:
        self.barrier_of_two.wait()
        self.sent[self.rank] = values.double()
        self.barrier_of_two.wait()
        return self.sent[0] + self.sent[1]


@pytest.mark.parametrize("shared_out", [(60, 41), (101, 0)])
def test_counts_of_processes_are_added(shared_out: tuple[int, int]) -> None:
    """To what one process alone would have found; also where one saw no batch, and knows of no classes."""
    random = torch.Generator().manual_seed(3)
    logits, targets = torch.randn(101, 5, generator=random), torch.randint(5, (101,), generator=random)
    wanted, alone = measured(logits, targets, [101])

    def one(rank: int) -> tuple[dict[str, float], Predictions]:
        metrics, predictions = evaluation_metrics()
        for gathering in dict.fromkeys(metric.gathering for metric in metrics):
            if shared_out[rank]:
                gathering.update(logits.split(shared_out)[rank], targets.split(shared_out)[rank])
            gathering.merge(Meeting(rank=rank, local_rank=rank, size=2, device=torch.device("cpu")))
        return {metric.column: metric.value() for metric in metrics}, predictions

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(one, (0, 1)))
    for found, predictions in both:
        assert found == pytest.approx(wanted, rel=1e-6)
        assert predictions.confusion is not None and alone.confusion is not None
        assert torch.equal(predictions.confusion, alone.confusion)


def test_a_confusion_matrix_is_kept_where_it_is_asked_for_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictions, "MOST_CLASSES", 3)
    for classes, asked, kept in ((3, True, True), (4, True, False), (3, False, False)):
        predictions = Predictions(confusion=asked)
        predictions.update(torch.randn(8, classes), torch.zeros(8, dtype=torch.int64))
        predictions.merge(ALONE)
        assert (predictions.confusion is not None) == kept
        assert predictions.samples.tolist() == [8] + [0] * (classes - 1), "counts per class are there in any case"


def test_an_evaluation_beside_a_run_leaves_the_run_s_metrics_alone() -> None:
    METRICS[3].reset()
    METRICS[3].update(LOGITS, TARGETS)
    measured(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64), [5])
    METRICS[3].merge(ALONE)
    assert METRICS[3].value() == pytest.approx(50.0)
    assert [metric.column for metric in METRICS][:2] == ["val_loss", "val_top1"]
    assert all(metric.samples == 0 for metric in evaluation_metrics()[0] if isinstance(metric, Mean)), "a fresh start"


NEW_METRIC = """
from training import metrics

def spread(logits, targets):
    return (logits.amax(dim=1) - logits.amin(dim=1)).sum()

metrics.METRICS = (*metrics.METRICS, metrics.Mean("val_spread", "logit spread", spread, form=".2f", in_bar=True))
import train

raise SystemExit(train.main())
"""


@pytest.mark.slow
def test_a_new_metric_is_one_entry(tmp_path: Path) -> None:
    """Its column, its words in the line of an epoch and its places in the report come with it."""
    (tmp_path / "with_metric.py").write_text(NEW_METRIC)
    command = [sys.executable, str(tmp_path / "with_metric.py"), *TINY, "--output", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[3:11] == ["val_loss", "val_top1", "val_top5", *CLASSWISE, "val_spread", "lr"]
    for row in rows:
        assert f"  logit spread {float(row['val_spread']):.2f}" in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Validation: logit spread" in page and "Final logit spread" in page
    assert f"<dd>{float(rows[-1]['val_spread']):.2f}</dd>" in page
    # and without the metric the run cannot go on
    with pytest.raises(ConfigError, match="unknown column 'val_spread'"):
        RunFolder(tmp_path / "run").check_metrics()


def test_a_sample_whose_logits_are_not_finite_is_mistaken() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan, nan, nan], [nan, 1, 0], [0, inf, 0], [-inf, -inf, -inf], [3, 1, -inf], [0, 1, 3]])
    values, predictions = measured(logits, torch.tensor([0, 0, 1, 0, 0, 2]), [6])
    assert values["top1"] == pytest.approx(100 * 2 / 6) and values["top5"] == values["top1"]
    assert predictions.recall().tolist() == [0.25, 0.0, 1.0]
    assert values["balanced"] == pytest.approx(100 * 1.25 / 3)
    assert predictions.confusion is not None and predictions.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert predictions.predicted.tolist() == [1, 0, 1] and predictions.bins[0].sum() == 2
