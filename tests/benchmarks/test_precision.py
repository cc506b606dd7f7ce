"""bfloat16 against float32: the two arms differ in precision alone, and what is said is what was measured."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmark import main
from benchmarks import precision
from benchmarks.measure import ROOT
from training.config import TrainConfig


def test_arms_differ_in_precision_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, TrainConfig] = {}

    def scored(config: TrainConfig, folder: Path, *, split: str) -> dict[str, float]:
        assert split == "test"
        asked[folder.relative_to(tmp_path).as_posix()] = config
        return {"top1": 90.0 + config.seed % 2 - (config.runtime.precision == "float32"), "cpu_seconds": 6.0}

    monkeypatch.setattr(precision, "score", scored)
    output = tmp_path / "a.json"
    command = ["precision", "--rounds", "0", "--work", str(tmp_path), "--output", str(output), "data.train_samples=500"]
    assert main(command) == 0
    assert len(asked) == 16
    for seed in range(8):
        one, other = (asked[f"{name}-seed-{seed}"] for name in ("bfloat16", "float32"))
        assert (one.seed, one.data.train_samples, one.optim.epochs, one.log.validate_every) == (seed, 500, 20, 20)
        assert (one.runtime.precision, other.runtime.precision) == ("bfloat16", "float32")
        assert one.model_copy(update={"runtime": other.runtime}) == other
    told = json.loads(output.read_text())
    assert told["precisions"]["bfloat16"]["mean"] == 90.5 and told["precisions"]["float32"]["mean"] == 89.5
    assert told["comparison"]["sentence"].startswith("bfloat16 beats float32 by 1.0 point (the same on every seed;")
    assert told["changes"] == ["optim.epochs=20", "data.train_samples=500"] and "steps" not in told


def test_steps_are_timed_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, int]] = []

    def step_of(config: TrainConfig) -> Callable[[], float]:
        built.append((config.model.name, config.data.batch_size))
        return lambda: 1.5 if config.runtime.precision == "float32" else 0.5

    monkeypatch.setattr(precision, "step_of", step_of)
    monkeypatch.setattr(precision, "seconds_of", lambda step, _: step())
    told = precision.steps(3)
    assert built == [("convformer_n4", 32)] * 2 + [("convformer_s18", 8)] * 2
    expected = {
        "milliseconds": {"bfloat16": 500, "float32": 1500}, "float32_over_bfloat16": 3, "quartiles": [3, 3]
    }  # fmt: skip
    assert told == dict.fromkeys(precision.MODELS, expected)


@pytest.mark.slow
def test_a_whole_benchmark_of_one_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "MODELS", {"a": ("model.depths=[1, 1]",)})
    output = tmp_path / "a.json"
    small = [
        "model={name: convformer_n4, in_chans: 1, image_size: 28, depths: [1, 1], dims: [8, 16]}",
        "optim.epochs=2",
    ]
    command = ["precision", "--seeds", "1", "--rounds", "2", "--work", str(tmp_path / "work"), "--output", str(output)]
    assert main([*command, *small]) == 0
    told = json.loads(output.read_text())
    assert all(0 < told["precisions"][name]["mean"] <= 100 for name in precision.PRECISIONS)
    assert all(min(row["milliseconds"].values()) > 0 for row in told["steps"].values())


def test_the_page_says_what_was_measured() -> None:
    """And that what was measured allows what `auto` does."""
    told = json.loads((ROOT / "benchmarks" / "results" / "precision.json").read_text())
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    assert told["comparison"]["sentence"] in page and told["comparison"]["seeds"] >= 8
    low, high = told["comparison"]["interval"]
    assert low <= 0 <= high, "no difference was found"
    for name in precision.PRECISIONS:
        row = told["precisions"][name]
        assert f"| {name} | {row['mean']:.2f} | {row['sd']:.2f} |" in page
    ratios = [row["float32_over_bfloat16"] for row in told["steps"].values()]
    assert f"{ratios[0]:.2f} times as fast, of ConvFormer-S18 (224 px, batch 8) {ratios[1]:.2f} times" in page
    assert min(ratios) > 1 and told["bfloat16_in_hardware"]
