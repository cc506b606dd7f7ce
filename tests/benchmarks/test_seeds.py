"""Units over seeds: trained once, gone on with, never mixed up; and what is claimed of their differences."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import seeds
from benchmarks.seeds import compare, score, spread
from files.errors import ConfigError, Failure
from tests.training.parts import TINY
from training.config import TrainConfig, load_config
from training.evaluating.validation import Request, validate


def tiny(*overrides: str) -> TrainConfig:
    return load_config(None, [*TINY, "optim.epochs=1", "optim.warmup_epochs=0", "log.report=false", *overrides])


def test_a_unit_is_trained_once_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "unit"
    found = score(tiny(), folder, split="val")
    summary = json.loads((folder / "summary.json").read_text())
    assert found["top1"] == summary["best_top1"] and found["cpu_seconds"] > 0
    (measured,) = validate(Request([str(folder)]))
    assert measured.metrics["top1"] == pytest.approx(found["top1"])
    other = score(tiny(), tmp_path / "other", split="train")
    assert 0 < other["top1"] != found["top1"] and other["nll"] > 0
    assert "epoch" in (folder.parent / "unit.log").read_text(), "what the run says is kept beside it"
    monkeypatch.setattr(seeds, "run", None)
    assert score(tiny(), folder, split="val") == found
    for config, split in ((tiny("optim.lr=2e-3"), "val"), (tiny(), "train")):
        with pytest.raises(ConfigError, match="holds a unit of other settings"):
            score(config, folder, split=split)  # type: ignore[arg-type]
    (folder / seeds.SCORE).write_text('{"top1": 90.0, "nll": 0.5}')
    with pytest.raises(ConfigError, match="holds a unit of other settings"):
        score(tiny(), folder, split="val")


def test_a_unit_that_was_interrupted_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stopped(config: TrainConfig, folder: Path, *, resume: Any) -> dict[str, Any]:
        asked.append(resume)
        return {"stopped_by": "SIGTERM"}

    monkeypatch.setattr(seeds, "run", stopped)
    for _ in range(2):
        with pytest.raises(Failure, match="stopped by SIGTERM; the same command goes on"):
            score(tiny(), tmp_path / "unit", split="val")
    assert asked == ["auto", "auto"] and not (tmp_path / "unit" / seeds.SCORE).exists()


def test_scores_in_figures() -> None:
    told = spread({0: 90.0, 1: 92.0, 2: 94.12345})
    assert told == {"scores": {0: 90.0, 1: 92.0, 2: 94.123}, "mean": 92.04, "sd": 2.06}


WORSE = {seed: 80.0 + seed for seed in range(8)}


def test_a_difference_of_one_sign_on_8_seeds_is_found() -> None:
    better = {seed: value + 1 + seed % 2 for seed, value in WORSE.items()}
    told = compare(("a", better), ("b", WORSE))
    assert (told["difference"], told["p"], told["seeds"]) == (1.5, round(2 / 2**8, 5), 8)
    low, high = told["interval"]
    assert 1 <= low < 1.5 < high <= 2
    assert told["sentence"].startswith("a beats b by 1.5 points (95 %: 1.")
    turned = compare(("b", WORSE), ("a", better))
    assert turned["difference"] == -1.5 and turned["interval"] == [-high, -low]
    assert turned["sentence"].startswith("a beats b by 1.5 points (95 %: 1.") and turned["p"] == told["p"]


def test_what_is_not_found_or_cannot_be() -> None:
    mixed = {seed: value + (-1) ** seed for seed, value in WORSE.items()}
    told = compare(("a", mixed), ("b", WORSE))
    assert told["p"] == 1.0 and told["sentence"].startswith("no difference found between a and b")
    few = {seed: value + 5 + seed for seed, value in WORSE.items() if seed < 5}
    told = compare(("a", few), ("b", WORSE))
    assert told["p"] == 0.0625 and told["sentence"].startswith("too few seeds to tell")
    told = compare(("a", {0: 99.0}), ("b", WORSE))
    assert "p" not in told and told["sentence"].startswith("too few seeds to tell")
