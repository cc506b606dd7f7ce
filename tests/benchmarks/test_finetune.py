"""What fine-tuning is worth: the settings differ in what they say they do, and in nothing else."""

import json
from pathlib import Path

import pytest

from benchmark import main
from benchmarks import finetune
from benchmarks.finetune import ARMS, FINE_TUNING, FIRST_CLASSES, LINEAR_PROBE
from benchmarks.measure import ROOT
from training.config import TrainConfig


def test_settings_see_the_same_labels_for_as_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, TrainConfig] = {}

    def scored(config: TrainConfig, folder: Path, *, split: str) -> dict[str, float]:
        assert split == "test"
        asked[folder.relative_to(tmp_path).as_posix()] = config
        return {"top1": 90.0 + len(asked) % 5, "cpu_seconds": 6.0}

    monkeypatch.setattr(finetune, "score", scored)
    output = tmp_path / "a.json"
    assert main(["finetune", "--seeds", "6", "--work", str(tmp_path), "--output", str(output)]) == 0
    assert len(asked) == 6 * 5 and all(c.log.validate_every == c.optim.epochs for c in asked.values())
    for seed in range(6):
        first, *arms = (asked[f"seed-{seed}/{name}"] for name in (
            "pre-training", "fine-tuned", "fine-tuned-at-rate-0.1", "linear-probe", "from-scratch-at-rate-0.1"
        ))  # fmt: skip
        assert first.data.classes == ["0", "1", "2", "3", "4"] and first.seed == seed
        assert len({(c.seed, str(c.data), c.optim.epochs, c.runtime.threads) for c in arms}) == 1
        tuned, dropped, probe, scratch = arms
        assert tuned.model.checkpoint == str(tmp_path / f"seed-{seed}" / "pre-training" / "best")
        assert scratch.model.checkpoint is None and scratch.freeze.epochs == 0 and scratch.optim.layer_decay is None
        assert scratch.augment == tuned.augment and scratch.optim.lr == tuned.optim.lr
        assert probe.freeze.epochs == "all" and probe.model == tuned.model
        assert dropped.drop_path.rate == 0.1 and tuned.drop_path.rate == 0
        assert dropped.model_copy(update={"drop_path": tuned.drop_path}) == tuned
        assert scratch.drop_path == dropped.drop_path, "compared at equal rates"
    told = json.loads(output.read_text())
    assert told["cpu_minutes"] == 3.0 and told["settings"]["fine-tuned"]["mean"] == 92.0
    # 93 against 90 at each seed
    assert told["comparisons"][2]["sentence"].startswith(
        "fine-tuned at rate 0.1 beats from scratch at rate 0.1 by 3.0 points (the same on every seed;"
    )


@pytest.mark.slow
def test_a_whole_benchmark_of_one_seed(tmp_path: Path) -> None:
    work, output = tmp_path / "work", tmp_path / "a.json"
    small = ["model.depths=[1, 1]", "model.dims=[8, 16]", "optim.epochs=5", "optim.warmup_epochs=0"]
    assert main(["finetune", "--seeds", "1", "--work", str(work), "--output", str(output), *small]) == 0
    told = json.loads(output.read_text())
    assert all(0 <= setting["mean"] <= 100 for setting in told["settings"].values())
    assert "too few seeds to tell" in told["comparisons"][0]["sentence"]


def test_docs_and_heads_say_what_was_measured() -> None:
    """One measurement: the figures in docs/training.md and in the recipes' heads are those of the results."""
    told = json.loads((ROOT / "benchmarks" / "results" / "finetune.json").read_text())
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    for comparison in told["comparisons"]:
        assert comparison["sentence"][1:] in page and comparison["seeds"] >= 6
    heads = {path.stem: path.read_text().partition("\nseed:")[0] for path in (FINE_TUNING, LINEAR_PROBE)}
    for arm in ARMS:
        measured = told["settings"][arm]
        assert f"| {arm} | {measured['mean']:.1f} | {measured['sd']:.1f} |" in page
        assert f"{measured['mean']:.1f} %" in heads["mnist5k_new_classes"], arm
    assert f"{told['settings']['linear probe']['mean']:.1f} %" in heads["mnist5k_linear_probe"]
    for head in heads.values():
        assert told["machine"].removesuffix(", CPU") in head and FIRST_CLASSES[1] in head
