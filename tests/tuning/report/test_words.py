"""Sentences of a study's page, at every stage of a study."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tuning.report.reading import read_study
from tuning.report.words import (
    called,
    comparisons,
    facts,
    number,
    origin,
    race_sentence,
    recommended,
    seed_rows,
    short_name,
    subtitle,
    verdict_sentence,
)
from tuning.study import StudyFolder, Trial
from tuning.units import note_failure


def test_verdict_is_the_verdicts(study: StudyFolder) -> None:
    found = read_study(study.path)
    assert verdict_sentence(found) == json.loads(study.verdict.read_text())["sentence"]


def test_sentence_of_a_study_that_is_not_at_its_end(tmp_path: Path, make_study) -> None:
    folder = make_study(tmp_path / "a", trials=6, final=0, keys=("drop_path.rate",))
    trials = folder.read_trials()
    assert verdict_sentence(read_study(folder.path)).startswith("No verdict yet: the search chose rate 0.1 (top-1 9")
    with folder.config.open("a") as file:
        file.write("verdict: null\n")
    assert verdict_sentence(read_study(folder.path)).startswith(
        "No final was asked for: the search chose rate 0.1 (top-1 9"
    )
    racing = [
        replace(t, state="racing" if t.number < 2 else "waiting", scores={0: 90.0} if t.number < 2 else {})
        for t in trials
    ]
    folder.write_trials(racing)
    assert verdict_sentence(read_study(folder.path)) == (
        "No verdict yet: the search is not at its end, 6 of 6 trials are still in the race. "
        "Best so far: rate 0 (top-1 90.00 over 1 seed)."
    )
    failed = replace(racing[0], state="failed", scores={0: 99.0})
    folder.write_trials([failed, *racing[1:]])
    assert "Best so far: rate 0.1 (top-1 90.00" in verdict_sentence(read_study(folder.path))
    folder.write_trials([replace(t, scores={}, state="waiting") for t in trials])
    assert verdict_sentence(read_study(folder.path)) == "No run is done yet; 6 trials wait for it."
    folder.write_trials([])
    assert verdict_sentence(read_study(folder.path)) == "Nothing has been tried yet."


@pytest.mark.parametrize("count, start", [(3, "All 3 trials failed"), (1, "The only trial failed")])
def test_sentence_where_all_failed(tmp_path: Path, make_study, count: int, start: str) -> None:
    folder = make_study(tmp_path / "a", trials=count, final=0, keys=("drop_path.rate",))
    reason = "the loss is not finite at step 3\nsamples 1, 2"
    folder.write_trials([replace(t, scores={}, state="failed", reason=reason) for t in folder.read_trials()])
    told = verdict_sentence(read_study(folder.path))
    assert told == f"{start}, so there is nothing to choose from: the loss is not finite at step 3"


def test_facts_say_what_to_use_and_what_it_cost(study: StudyFolder) -> None:
    found = read_study(study.path)
    told = dict(facts(found))
    assert told["Use"] == recommended(found)["label"]
    assert told["Its top1 (test)"].endswith("\u00a0%") and told["Rests on"] == "8 fresh seeds"
    assert told["Tried"] == "12 trials" and told["Search"] == "24 runs, 11,520 steps"
    assert told["Verdict"] == f"{found.final.runs} runs, {480 * found.final.runs:,} steps"
    assert subtitle(found).startswith(
        "convformer_n4 on mnist5k (500 training images); 30 epochs a run; tried: drop-path rate 0 to"
    )


def test_runs_that_failed_are_told(tmp_path: Path, make_study) -> None:
    folder = make_study(tmp_path / "a", trials=4, rounds=(1, 2), final=2, keys=("drop_path.rate",))
    trials = folder.read_trials()
    lost = next(t for t in trials if t.state != "winner" and len(t.scores) == 2)
    folder.write_trials([replace(t, state="failed", scores={0: 90.0}) if t is lost else t for t in trials])
    for seed in (1, 1000):  # the second is the final's
        folder.unit(lost.digest, seed).mkdir(parents=True, exist_ok=True)
        note_failure(folder.unit(lost.digest, seed), "the loss is not finite", final=True)
    verdict = json.loads(folder.verdict.read_text())
    verdict["configs"][1]["failed"] = 2
    folder.verdict.write_text(json.dumps(verdict))
    told = dict(facts(read_study(folder.path)))
    assert told["Search"].startswith("5 runs, ") and told["Search"].endswith(" steps; 1 run that failed not counted")
    assert told["Verdict"].endswith(" steps; 2 runs that failed not counted")


def test_recommended_is_what_the_verdict_says(tmp_path: Path, make_study) -> None:
    folder = make_study(tmp_path / "a", keys=("drop_path.rate",))
    verdict = json.loads(folder.verdict.read_text())
    folder.verdict.write_text(json.dumps(verdict | {"recommended": "zero"}))
    assert recommended(read_study(folder.path))["label"] == "rate 0"
    del verdict["recommended"]
    folder.verdict.write_text(json.dumps(verdict))
    assert recommended(read_study(folder.path))["role"] == "winner"


def test_tables_of_the_final(study: StudyFolder) -> None:
    found = read_study(study.path)
    verdict = json.loads(study.verdict.read_text())
    (row, *_), (raw, *_) = comparisons(found), verdict["comparisons"]
    assert row["difference"] == f"{raw['difference']:+.2f}" and row["seeds"] == "8"
    alone = comparisons(replace(found, verdict=found.verdict | {"comparisons": [raw | {"p_holm": raw["p"]}]}))
    assert alone[0]["holm"] == row["p"], "one number is written in one way"
    assert row["says"] == ("a difference" if raw["p"] < 0.05 else "no difference found")
    rows = seed_rows(found)
    assert [name for name, _ in rows] == [str(seed) for seed in verdict["seeds"]] + ["mean"]
    first = verdict["configs"][0]["scores"]
    assert [scores[0] for _, scores in rows] == [f"{v:.2f}" for v in first] + [f"{sum(first) / 8:.2f}"]


def test_means_of_the_final_are_over_seeds_that_all_have(tmp_path: Path, make_study) -> None:
    folder = make_study(tmp_path / "a", final=4, keys=("drop_path.rate",))
    verdict = json.loads(folder.verdict.read_text())
    first = verdict["configs"][0]
    first["seeds"], first["scores"], first["failed"] = first["seeds"][1:], first["scores"][1:], 1
    folder.verdict.write_text(json.dumps(verdict))
    found = read_study(folder.path)
    name, means = seed_rows(found)[-1]
    assert name == "mean of the 3 that all have"
    assert means == [f"{sum(c['scores'][-3:]) / 3:.2f}" for c in verdict["configs"]]
    assert dict(facts(found))["Rests on"] == "3 fresh seeds, 1 more failed"


def test_few_seeds_claim_nothing(tmp_path: Path, make_study) -> None:
    found = read_study(make_study(tmp_path / "a", final=1, keys=("drop_path.rate",)).path)
    (row, *_) = comparisons(found)
    assert row["says"] == "too few seeds to tell" and row["p"] == row["interval"] == "\u2013"


def test_an_interval_without_width_is_none(study: StudyFolder) -> None:
    found = read_study(study.path)
    raw = found.verdict["comparisons"][0] | {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    (row,) = comparisons(replace(found, verdict=found.verdict | {"comparisons": [raw]}))
    assert (row["difference"], row["interval"]) == ("+0.00", "the same on every seed")


def test_race_says_who_went_on(study: StudyFolder) -> None:
    found = read_study(study.path)
    assert "12 had 1 seed; 6 had 2 seeds; 3 had 4 seeds" in race_sentence(found, [1, 2, 4])
    assert race_sentence(found, [1]).startswith("Every trial has 1 seed at most so far")


def test_names_and_numbers() -> None:
    assert short_name("drop_path.rate") == "rate" and short_name("augment.mixup") == "augment mixup"
    assert short_name("optim.layer_decay") == "layer decay"
    assert number(91.237) == "91.24" and number(0.123456) == "0.1235" and number(float("nan")) == "\u2013"
    trial = Trial(0, "d", {"drop_path.rate": 0.12345, "optim.lr": 1e-3}, "GPSampler")
    assert called(trial) == "rate 0.123, lr 0.001" and called(trial, ["optim.lr"]) == "lr 0.001"
    assert origin(trial) == "Gaussian process" and origin(replace(trial, origin="given")) == "given by you"
    assert origin(replace(trial, origin="new kind")) == "new kind"
