"""Studies as they are read: what is missing or damaged costs its part and a note."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from files.errors import ConfigError
from tuning.report.reading import MOST_GROUPS, OTHERS, Cost, read_study, value_in_words
from tuning.study import StudyFolder


def test_study_is_read(study: StudyFolder) -> None:
    found = read_study(study.path)
    assert found.notes == []
    assert len(found.trials) == len(found.decisions) == len(found.scored) == 12
    assert found.winner is found.scored[0]
    assert [len(t.scores) for t in found.scored] == [4] * 3 + [2] * 3 + [1] * 6
    assert found.metric.column == "val_top1" and found.loss(91.0) == 9.0 and found.loss_name == "error in %"
    assert (found.axis, found.groups) == ("drop_path.rate", ["linear", "constant"])
    assert found.search == Cost(24, 24 * 480, 24 * 12.5)
    runs = 8 * len(found.verdict["configs"])
    assert found.final == Cost(runs, 480 * runs, 12.5 * runs)


def test_trials_of_one_configuration_share_their_runs(tmp_path: Path, make_study, study_page) -> None:
    folder = make_study(tmp_path / "a", trials=4, rounds=(1, 2), final=0, keys=("drop_path.rate",))
    before = read_study(folder.path)
    trials = folder.read_trials()
    again = [replace(trials[0], number=n, state="dropped", reason="the same configuration as trial 0") for n in (4, 5)]
    folder.write_trials([*trials, *again])
    found = read_study(folder.path)
    assert found.search == before.search and found.scored == before.scored and len(found.trials) == 6
    assert study_page(folder).text.count("the same configuration as trial 0") == 2


def test_runs_that_the_search_paid_for_are_not_counted_twice(tmp_path: Path, make_study) -> None:
    folder = make_study(tmp_path / "a", final=2)
    verdict = json.loads(folder.verdict.read_text())
    before = read_study(folder.path).final
    first = verdict["configs"][0]
    trials = [
        replace(t, scores=t.scores | {1000: 90.0}) if t.digest == first["digest"] else t for t in folder.read_trials()
    ]
    folder.write_trials(trials)
    assert read_study(folder.path).final.runs == before.runs - 1


@pytest.mark.parametrize(
    "name, text",
    [
        ("study.yaml", "a: [1"),
        ("train.yaml", "\0"),
        ("trials.json", "[{}]"),
        ("verdict.json", "{}"),
        ("verdict.json", "[]"),
        ("verdict.json", '{"sentence": "s", "split": "test", "seeds": [], "comparisons": [{}], "configs": []}'),
        (
            "verdict.json",
            '{"sentence": "s", "split": "test", "seeds": [1], "comparisons": [], "configs": [{"scores": [1]}]}',
        ),
    ],
)
def test_damaged_file_costs_its_part(tmp_path: Path, make_study, study_page, name: str, text: str) -> None:
    folder = make_study(tmp_path / "a", trials=4, rounds=(1, 2))
    (folder.path / name).write_text(text)
    found = read_study(folder.path)
    assert len(found.notes) == 1 and found.notes[0].startswith(f"{name} is damaged and was left out")
    assert found.notes[0] in study_page(folder).text


def test_verdict_of_a_study_that_went_on_is_left_out(tmp_path: Path, make_study, study_page) -> None:
    folder = make_study(tmp_path / "a", trials=4, rounds=(1, 2))
    assert read_study(folder.path).verdict
    trials = folder.read_trials()
    folder.write_trials([replace(t, state="racing") if t.state == "winner" else t for t in trials])
    (note,) = read_study(folder.path).notes
    assert note == "verdict.json was left out: the study has gone on since, and has another winner or none yet."
    page = study_page(folder).text
    assert note in page and "No verdict yet" in page and "How sure" not in page
    folder.write_trials(trials)
    folder.config.write_text(folder.config.read_text() + "verdict: null\n")
    (note,) = read_study(folder.path).notes
    assert note == "verdict.json was left out: it is from when the study had a final."
    assert "No final was asked for" in study_page(folder).text


def test_what_is_no_study_is_named(tmp_path: Path) -> None:
    (tmp_path / "rates").mkdir()
    with pytest.raises(ConfigError, match="no such folder; did you mean 'rates'"):
        read_study(tmp_path / "rate")
    with pytest.raises(ConfigError, match=r"holds no study\.yaml$"):
        read_study(tmp_path / "rates")
    (tmp_path / "rates" / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match=r"a run's report is made by python -m training\.report"):
        read_study(tmp_path / "rates")


def test_lower_is_better_for_a_loss(tmp_path: Path, make_study) -> None:
    folder = make_study(tmp_path / "a", final=0)
    folder.config.write_text(folder.config.read_text().replace("val_top1", "val_loss"))
    found = read_study(folder.path)
    assert found.lower_is_better and found.loss(0.3) == 0.3 and found.loss_name == "val loss"
    over_one = [t.mean for t in found.scored if len(t.scores) == 1]
    assert over_one == sorted(over_one)


def test_rare_kinds_are_put_together(tmp_path: Path, make_study) -> None:
    folder = make_study(tmp_path / "a", trials=20, final=0)
    kinds = [{"kind": "early", "cutoff_epochs": i // 2, "shape": None} for i in range(20)]
    trials = [replace(t, parameters=t.parameters | {"s": k}) for t, k in zip(folder.read_trials(), kinds, strict=True)]
    folder.write_trials(trials)
    found = read_study(folder.path)
    assert len(found.groups) == MOST_GROUPS + 1 and found.groups[-1] == OTHERS
    assert {found.group(t) for t in found.trials} == set(range(MOST_GROUPS + 1))
    assert "linear, early 1 epoch" in found.groups


@pytest.mark.parametrize(
    "value, words",
    [
        (0.12345, "0.123"), (3, "3"), (True, "true"), (None, "none"), ("linear", "linear"), ([0.1, 0.2], "[0.1, 0.2]"),
        ([0.0, 0.1, 0.2, 0.3, 0.4], "5 values of 0 to 0.4"), ({"kind": "early", "cutoff_epochs": 15}, "early 15 epochs"),
        ({"kind": "ramp", "start": None}, "ramp"),
    ],
)  # fmt: skip
def test_values_in_words(value: object, words: str) -> None:
    assert value_in_words(value) == words
