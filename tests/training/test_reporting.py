"""The end of a run: the report changes nothing that is learned, and its failure is not the run's."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.test_train import command, environment
from tests.training.parts import TINY
from training import loop
from training.config import load_config
from training.console import StopSignals
from training.evaluating import evidence
from training.metrics import METRICS
from training.report import page
from training.run import describe_result, run

MIXED = ["augment.mixup=0.5", "augment.cutmix=0.5", "drop_path.schedule={kind: ramp, start: 0.5}"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "write_report", lambda _: None)  # they take longer than all the rest


def train(folder: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    return run(load_config(None, [*TINY, *overrides]), folder, resume="auto" if resume else None)


def files(folder: Path) -> dict[str, Any]:
    """What a run leaves but for times."""
    rows = [line.split(",")[:-2] for line in (folder / "metrics.csv").read_text().splitlines()]
    told: dict[str, Any] = {name: (folder / name).read_bytes() for name in ("rates.csv", "drop_path.csv", "data.json")}
    return told | {"metrics": rows, "best": (folder / "best" / "model.safetensors").read_bytes()}


def right(folder: Path) -> float:
    """Percent of the pairs of class and prediction that are right."""
    told = json.loads((folder / "evaluation.json").read_text())
    return 100 * sum(n for label, prediction, n in told["pairs"] if label == prediction) / told["samples"]


def test_what_a_run_writes_is_json_whatever_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"samples": 1, "classes": ["a"], "pairs": [], "bins": [[1.0, 0.0, math.nan]], "mistakes": [], "batch": []}
    monkeypatch.setattr(evidence, "measure", lambda *_, **__: found)
    monkeypatch.setattr(loop, "validate", lambda *_, **__: {metric.column: math.nan for metric in METRICS})
    summary = train(tmp_path / "run", "optim.epochs=1", "optim.warmup_epochs=0")
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert told["bins"] == [[1.0, 0.0, None]]
    read = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert read["final_top1"] is read["best_top1"] is None
    assert {key: summary[key] for key in read} == read
    assert describe_result(summary).startswith("final top-1 unknown, best unknown, ")


def test_weights_and_metrics_are_equal_with_and_without_a_report(tmp_path: Path) -> None:
    summaries = [train(tmp_path / flag, *MIXED, f"log.report={flag}") for flag in ("true", "false")]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    assert files(tmp_path / "true") == files(tmp_path / "false")
    assert right(tmp_path / "true") == pytest.approx(summaries[0]["final_top1"])
    assert not (tmp_path / "false" / "evaluation.json").exists()


def test_a_finished_run_goes_on_as_one_that_was_not_measured_in_between(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *MIXED, "drop_path.schedule={kind: constant}", "optim.schedule=constant")
    one = [*MIXED, "drop_path.schedule={kind: constant}", "optim.schedule=constant"]
    train(tmp_path / "two", *one, "optim.epochs=1")
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["epoch"] == 1
    gone_on = train(tmp_path / "two", *one, resume=True)
    assert gone_on["weights_sha256"] == whole["weights_sha256"]
    assert files(tmp_path / "two") == files(tmp_path / "whole")
    assert (tmp_path / "two" / "evaluation.json").read_text() == (tmp_path / "whole" / "evaluation.json").read_text()


def test_a_run_that_a_signal_stops_spends_no_time_on_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[Path] = []
    monkeypatch.setattr(page, "write_report", pages.append)
    measured: list[Any] = []
    monkeypatch.setattr(evidence, "measure", lambda *_, **__: measured.append(1))
    take = StopSignals.finish_steps
    monkeypatch.setattr(StopSignals, "finish_steps", lambda self: (take(self), self.ask("SIGTERM")))
    assert train(tmp_path / "run")["stopped_by"] == "SIGTERM"
    assert not measured and not (tmp_path / "run" / "evaluation.json").exists() and pages == [tmp_path / "run"]


def test_a_signal_while_measuring_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[StopSignals] = []
    real = evidence.measure

    def measure(setup: Any, *, signals: StopSignals) -> Any:
        told.append(signals)
        signals.ask("SIGTERM")
        return real(setup, signals=signals)

    monkeypatch.setattr(evidence, "measure", measure)
    summary = train(tmp_path / "run")
    assert told and "stopped_by" not in summary and summary["epochs"] == 2
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize("what", ["measure", "page"])
def test_what_fails_is_said_in_a_line(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no room\nfor it")

    monkeypatch.setattr(*((evidence, "measure") if what == "measure" else (page, "write_report")), fail)
    summary = train(tmp_path / "run", "optim.epochs=1")
    told = capsys.readouterr().err.splitlines()
    words = {"measure": "the report shows no predictions: no room", "page": "no report: no room; to make it: python -m"}
    assert [line for line in told if line.startswith(f"warning: {words[what]}")]
    assert summary["epochs"] == 1 and (tmp_path / "run" / "evaluation.json").exists() == (what == "page")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_measure_together(parallel: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["data.batch_size=128", "augment.mixup=0.5", f"runtime.parallel={parallel}"]
    done = subprocess.run(
        command("--output", folder, *TINY, *settings, processes=2),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "report shows no" not in done.stderr, done.stderr
    assert right(folder) == pytest.approx(json.loads((folder / "summary.json").read_text())["final_top1"])
    assert (folder / "report.html").exists()
