"""The command: its words, its exit codes, and a real study from one command."""

import json
import os
import re
from pathlib import Path

import pytest

import tune
from files.strict_yaml import load_yaml
from tests.tuning.parts import STUDY, Trained, links, stand_in


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "some.yaml"
    file.write_text(STUDY)
    return file


def test_print_config_and_schema(config: Path, tmp_path: Path, capsys) -> None:
    assert tune.main(["--config", str(config), "search.trials=4", "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_yaml(printed).data["search"]["trials"] == 4
    assert tune.main(["--json-schema"]) == 0
    assert "space" in json.loads(capsys.readouterr().out)["properties"]


def test_a_dry_run_leaves_nothing(config: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert tune.main(["--config", str(config), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("study     runs/tune-some: convformer_n4 on digits, 2 epochs")
    assert [path.name for path in tmp_path.iterdir()] == ["some.yaml"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--jobs", "0"], "--jobs: must be from 1 to 1024, got 0"),
        (["--jobs", "1" + "0" * 30], "--jobs: must be from 1 to 1024, got 1"),
        (["space={}"], "is empty"),
        (["verdict={}"], "has no test part"),
        (["search.sampler=grid"], "has no effect with sampler 'grid'"),
        (["storage=nonsense"], "storage: nonsense cannot be used"),
        (["model.name=convformer_n5"], "did you mean"),
    ],
)
def test_mistakes_end_with_2(config: Path, tmp_path: Path, words: list[str], told: str, capsys) -> None:
    out = tmp_path / "out"
    assert tune.main(["--config", str(config), "--output", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and len(error.splitlines()) <= 3
    assert not (out / "units").exists()


def test_a_study_that_fails_ends_with_1(config: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    trained: Trained = stand_in(monkeypatch)
    trained.fails = lambda config: "no such image"
    words = ["--config", str(config), "--output", str(tmp_path / "out")]
    assert tune.main(words) == 1
    assert "all 6 trials failed; 6 of them: no such image" in capsys.readouterr().err
    trained.fails, trained.stops = (lambda config: None), (lambda config: "SIGTERM" if len(trained.runs) == 8 else None)
    assert tune.main([*words, "--jobs", "1"]) == 0
    told = capsys.readouterr().out
    assert "trying again 6 runs that failed" in told and told.splitlines()[-1].startswith(
        "SIGTERM: the study is saved in"
    )


def test_more_processes_than_cores_are_warned_of(config: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    started: list[object] = []
    monkeypatch.setattr(
        tune, "start_helpers", lambda command, count, *, threads: started.extend([command, count]) or []
    )
    monkeypatch.setattr(tune, "work", lambda opened, threads: "SIGINT")
    assert (
        tune.main(["--config", str(config), "--output", str(tmp_path / "out"), "--jobs", "500", "search.trials=2"]) == 0
    )
    command, count = started
    assert count == 499 and isinstance(command, list) and "search.trials=2" in command
    assert command[-3:] == ["--worker", "--parent", str(os.getpid())]
    assert re.search(r"warning: 500 processes share \d+ cores", capsys.readouterr().err)


def test_a_study_from_one_command(config: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Real runs, real Optuna; run twice, it trains nothing twice."""
    monkeypatch.setattr("tuning.opening.Links", links)
    words = [
        "--config",
        str(config),
        "--output",
        str(tmp_path / "out"),
        "search.trials=2",
        "race={seeds: [1]}",
        "optim.epochs=1",
    ]
    for runs in (2, 0):
        assert tune.main(words) == 0
        told = capsys.readouterr().out
        assert len(re.findall(r"\d runs? left\n", told)) == runs
        assert "state" in told and "best.yaml" in told
    assert tune.main([*words, "optim.epochs=2"]) == 2
    assert "optim.epochs is 2 in what was given and 1 in the folder" in capsys.readouterr().err
