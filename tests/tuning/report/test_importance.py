"""Importance: the parameter that matters comes first, and nothing is ranked from too little."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from tuning.report.importance import importances
from tuning.report.reading import read_study
from tuning.report.words import importance_sentence
from tuning.study import StudyFolder


def test_what_matters_comes_first(tmp_path: Path, make_study) -> None:
    keys = ("drop_path.rate", "drop_path.profile", "optim.lr")
    folder: StudyFolder = make_study(tmp_path / "a", trials=40, rounds=(1,), keys=keys, final=0)
    trials = folder.read_trials()
    by_lr = [
        replace(t, scores={0: 90 + 3 * np.log10(t.parameters["optim.lr"]) - t.parameters["drop_path.rate"]})
        for t in trials
    ]
    folder.write_trials(by_lr)
    shares = importances(read_study(folder.path))
    assert next(iter(shares)) == "optim.lr" and shares["optim.lr"] > 0.8 and set(shares) == set(keys)
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert shares == importances(read_study(folder.path))
    by_profile = [
        replace(t, scores={0: 90.0 if t.parameters["drop_path.profile"] == "linear" else 80.0}) for t in trials
    ]
    folder.write_trials(by_profile)
    shares = importances(read_study(folder.path))
    assert next(iter(shares)) == "drop_path.profile"
    assert importance_sentence(read_study(folder.path), shares).startswith("Of what was varied, profile made the most")


def test_too_little_is_not_ranked(tmp_path: Path, make_study) -> None:
    one = read_study(make_study(tmp_path / "a", keys=("drop_path.rate",), final=0).path)
    assert importances(one) == {}
    assert importance_sentence(one, {}) == "Only one thing was varied, so there is nothing to rank."
    few = read_study(make_study(tmp_path / "b", trials=9, final=0).path)
    assert importances(few) == {}
    assert importance_sentence(few, {}) == "9 trials with a score are too few to rank 2 parameters; 10 are needed."
    folder = make_study(tmp_path / "c", trials=12, final=0)
    folder.write_trials([replace(t, scores={0: 90.0}) for t in folder.read_trials()])
    same = read_study(folder.path)
    assert importances(same) == {}
