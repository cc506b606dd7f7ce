"""The tuner against the grid: what is counted, and what is compared."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmark import main
from benchmarks import tuning
from benchmarks.measure import ROOT
from files.errors import Failure
from tuning.study import StudyFolder, Trial


def verdict_of(label: str, scores: list[float]) -> dict[str, Any]:
    seeds = list(range(1000, 1000 + len(scores)))
    zero = {"role": "zero", "label": "rate 0", "seeds": seeds, "scores": [80.0] * len(seeds)}
    return {"configs": [{"role": "winner", "label": label, "seeds": seeds, "scores": scores}, zero], "sentence": "so"}


def test_a_configuration_counts_once() -> None:
    at_zero = {"drop_path.rate": 0.0, "drop_path.profile": "linear"}
    trials = [
        Trial(0, "a", at_zero, "zero", {0: 90.0, 1: 92.0}, steps=200),
        Trial(1, "b", {"drop_path.rate": 0.123456, "drop_path.profile": "constant"}, "gp", {0: 88.0}, steps=100),
        Trial(2, "a", at_zero | {"drop_path.profile": "constant"}, "gp", {0: 90.0, 1: 92.0}, steps=200),
        Trial(3, "c", {"drop_path.rate": 0.5, "drop_path.profile": "linear"}, "gp", state="failed"),
    ]
    told = tuning.summary(trials)
    assert told["steps"] == 300
    assert told["trials"] == [
        {"rate": 0.0, "profile": "linear", "scores": [90.0, 92.0], "mean": 91.0},
        {"rate": 0.1235, "profile": "constant", "scores": [88.0], "mean": 88.0},
        {"rate": 0.5, "profile": "linear", "scores": [], "mean": None},
    ]


def test_winners_are_compared_on_the_fresh_seeds() -> None:
    tuned, grid = verdict_of("rate 0.1 (linear)", [91.0] * 8), verdict_of("rate 0.2 (linear)", [90.0] * 8)
    told = tuning.against(tuned, grid)
    assert told["sentence"].startswith("the tuner's rate 0.1 (linear) beats the grid's rate 0.2 (linear) by 1.0 point")
    assert tuning.against(tuned, tuned)["sentence"] == "both found rate 0.1 (linear)"


def test_both_are_run_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str]) -> Any:
        folder = StudyFolder(Path(command[command.index("--output") + 1]))
        asked.append((Path(command[command.index("--config") + 1]).stem, command[command.index("--output") + 2 :]))
        grid = folder.path.name.endswith("grid")
        folder.path.mkdir(parents=True)
        parameters = {"drop_path.rate": 0.1, "drop_path.profile": "linear"}
        folder.write_trials([Trial(0, "a", parameters, "gp", {0: 90.0}, steps=1000 if grid else 350)])
        folder.verdict.write_text(json.dumps(verdict_of("rate 0.1 (linear)", [90.0] * 8)))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tuning, "subprocess", SimpleNamespace(run=run))
    output = tmp_path / "tuning.json"
    command = ["tuning", "--studies", "mnist5k_few", "--work", str(tmp_path / "work"), "--output", str(output)]
    assert main([*command, "optim.epochs=2"]) == 0
    assert asked == [("mnist5k_few", [*tuning.GRID, "optim.epochs=2"]), ("mnist5k_few", ["optim.epochs=2"])]
    (told,) = json.loads(output.read_text())["studies"].values()
    assert told["share_of_steps"] == 0.35 and told["comparison"]["sentence"] == "both found rate 0.1 (linear)"


def test_a_study_that_was_stopped_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "subprocess", SimpleNamespace(run=lambda command: SimpleNamespace(returncode=0)))
    with pytest.raises(Failure, match="did not come to its end; the same command goes on"):
        tuning.study(tmp_path / "a.yaml", tmp_path / "out", [])


def test_docs_say_what_was_measured() -> None:
    """One measurement: figures in docs/tuning.md, README and the heads of the studies are those of the results."""
    told = json.loads((ROOT / "benchmarks" / "results" / "tuning.json").read_text())
    page = " ".join((ROOT / "docs" / "tuning.md").read_text().split())
    for name, found in told["studies"].items():
        assert found["tuner"]["verdict"]["sentence"].replace("\u00a0", " ") in page, name
        assert found["comparison"]["sentence"] in page, name
        share = f"{found['share_of_steps']:.0%}".replace("%", " %")
        assert f"{share} of the grid's steps" in page and found["share_of_steps"] <= 0.4, name
        for row in found["grid"]["trials"]:
            assert f"{row['mean']:.1f}" in page, (name, row)


def test_the_fine_tuning_that_is_told_was_measured() -> None:
    told = json.loads((ROOT / "benchmarks" / "results" / "tuning-new-classes.json").read_text())
    sentence = told["verdict"]["sentence"].replace("\u00a0", " ")
    for page in ("README.md", "docs/tuning.md"):
        assert sentence in " ".join((ROOT / page).read_text().split()), page
    assert told["command"] in (ROOT / "README.md").read_text() and len(told["trials"]) == 9
