"""The benchmark of a training step: what it measures, in what order, and what it says."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark import main, parse_args
from benchmarks import step
from benchmarks.measure import facts
from benchmarks.sides import Setting, make_pair
from benchmarks.step import (
    MODELS,
    QUICK,
    Case,
    chosen_cases,
    earlier_result,
    line_of,
    line_of_inference,
    measure_inference,
    spread,
)
from files.errors import ConfigError


def choose(tmp_path: Path, *options: str) -> list[Case]:
    return chosen_cases(parse_args(["step", "--output", str(tmp_path / "a.json"), *options]))


def test_cases(tmp_path: Path) -> None:
    every = choose(tmp_path)
    assert len(every) == len(set(every)) == len(MODELS) * 2 * 4
    assert choose(tmp_path, "--quick") == list(QUICK) and set(QUICK) <= set(every)
    assert choose(tmp_path, "--models", "a", "--settings", "0.3:constant", "0.1", "--precision", "float32") == [
        Case("a", "float32", Setting(0.3, "constant")),
        Case("a", "float32", Setting(0.1)),
    ]


@pytest.mark.parametrize("option", [["--models", "a"], ["--settings", "0"], ["--precision", "float32"]])
def test_quick_chooses_itself(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--output", str(tmp_path / "a.json"), "--quick", *option]) == 2
    assert f"--quick: chooses models, settings and precisions itself; leave out {option[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1", "-0.1", "x", "0.4:cosine", "nan"])
def test_settings_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no RATE"):
        step.parse_setting(text)


def test_models_are_looked_up_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "make_pair", lambda name: pytest.fail("built"))
    assert main(["step", "--output", str(tmp_path / "a.json"), "--models", "poolformer_s12", "poolformer_s13"]) == 2
    assert "poolformer_s13" in capsys.readouterr().err


def test_rows_hold_every_side_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[list[str]] = []
    seconds = {"skipping": 1.0, "timm": 3.0, "timm channels_last": 2.0, "limit": 0.5}

    def take_turns(runs: dict[str, Any], rounds: int, *, warmup: int) -> dict[str, list[float]]:
        turns.append(list(runs))
        assert all(run() > 0 for run in runs.values())
        return {name: [seconds[name] * (1 + number) for number in range(rounds)] for name in runs}

    monkeypatch.setattr(step, "take_turns", take_turns)
    output = tmp_path / "a.json"
    arguments = ["step", "--output", str(output), "--models", "timm/test_vit", "--settings", "0", "0.4:constant"]
    assert main([*arguments, "--batch", "2", "--rounds", "3", "--memory", "--infer"]) == 0
    told = json.loads(output.read_text())
    assert turns == [["skipping", "timm", "timm channels_last", "limit"]] * 4
    assert [(row["precision"], row["rate"], row["profile"]) for row in told["rows"]] == [
        (precision, *setting)
        for precision in ("float32", "bfloat16")
        for setting in ((0.0, "linear"), (0.4, "constant"))
    ]
    for row in told["rows"]:
        assert row["times"]["timm"] == {"ms": 6000.0, "quartiles": [4500.0, 7500.0], "min": 3000.0}
        assert row["timm_over"]["skipping"]["timm channels_last"] == {"median": 2.0, "quartiles": [2.0, 2.0]}
        assert row["over_limit"]["timm channels_last"]["median"] == 4.0
        assert row["peak_mb"].keys() == row["times"].keys() - {"limit"}
    none, constant = told["rows"][:2]
    assert constant["limit_gmacs"] < 0.75 * none["limit_gmacs"]
    assert told["inference"] == [], "of a model of timm there is nothing to fold"
    assert [each["precision"] for each in told["ways"]] == ["float32", "bfloat16"]
    assert all(min(trial["ms"].values()) >= 0 for each in told["ways"] for trial in each["trials"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].split()[:3] == ["test_vit", "float32", "0"] and "2.000 [2.000 2.000]" in printed[2]


def test_rows_are_appended_where_they_are_of_the_same_machine(tmp_path: Path) -> None:
    row = {"model": "a", "precision": "float32", "rate": 0.4, "profile": "linear", "batch": 2}
    other = {**row, "profile": "constant"}
    of = {"model": "a", "precision": "float32"}, {"model": "b", "precision": "float32"}
    old: dict[str, Any] = {"command": "first", **facts(), "earlier_commands": [], "rows": [row, other],
                           "inference": list(of), "ways": list(of)}  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text("")
    cases = [Case("a", "float32", Setting(0.4))]
    assert earlier_result(path, cases, 2, True)["rows"] == []
    path.write_text(json.dumps(old))
    kept = {"earlier_commands": ["first"], "rows": [other], "inference": [of[1]], "ways": [of[1]]}
    assert earlier_result(path, cases, 2, True) == kept
    assert earlier_result(path, cases, 2, False) == {**kept, "inference": list(of)}, "not measured again"
    with pytest.raises(ConfigError, match="was measured with batch 2, now it is 4"):
        earlier_result(path, cases, 4, False)
    path.write_text(json.dumps({**old, "commit": "other"}))
    with pytest.raises(ConfigError, match="was measured with commit 'other', now"):
        earlier_result(path, cases, 2, False)


def test_lines_stand_in_their_columns() -> None:
    found = {"median": 1.5, "quartiles": [1.25, 1.75]}
    row = {
        "model": "timm/convnext_tiny", "precision": "float32", "rate": 0.4, "profile": "constant",
        "times": {name: spread([0.5]) for name in ("skipping", "timm", "timm channels_last", "limit")},
        "timm_over": {"skipping": {"timm channels_last": found}},
        "over_limit": {"skipping": found, "timm channels_last": found},
    }  # fmt: skip
    line, titles = line_of(row), step.HEADER.splitlines()[1]
    assert line.index("0.4 constant") == titles.index("setting")
    assert line.index("1.500 [1.250 1.750]") == titles.rindex("skipping", 0, titles.rindex("masked"))
    assert line.rstrip().endswith("-         1.500     1.500") and len(line) < 180


@pytest.mark.slow
def test_inference_is_folded_and_compared_with_the_better_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"folded": 1.0, "timm": 2.0, "timm channels_last": 3.0}
    monkeypatch.setattr(
        step, "take_turns", lambda runs, rounds: {name: [seconds[name]] * 2 for name in runs if runs[name]()}
    )
    row = measure_inference(make_pair("vit_tiny_patch16_224"), "float32", 1, 2, torch.device("cpu"))
    assert row["better_layout"] == "timm" and row["timm_over_folded"]["median"] == 2.0
    assert row["images_per_second"] == {
        "folded": 8.0,
        "timm": 4.0,
        "timm channels_last": 2.67,
    }  # eight passes at batch 1
    assert "folded over timm 2.000 [2.000 2.000]" in line_of_inference(row)
