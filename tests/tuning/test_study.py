"""What a study leaves on the disk is read back as it was."""

import math
from pathlib import Path

import pytest

from files.errors import ConfigError
from tuning.study import StudyFolder, Trial


def test_trials_are_read_back(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert folder.read_trials() == []
    trials = [
        Trial(0, "ab", {"drop_path.rate": 0.0}, "zero", {0: 91.5, 7: 90.5}, "racing", steps=30, seconds=1.5),
        Trial(1, "cd", {"drop_path.rate": 0.4}, "gp", state="failed", reason="not finite"),
    ]
    folder.write_trials(trials)
    assert folder.read_trials() == trials
    assert folder.read_trials()[0].mean == 91.0
    assert math.isnan(folder.read_trials()[1].mean)


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"number": 1}]', '[{"scores": {"a": 1}}]', '[{"scores": 1}]'])
def test_damaged_trials_are_named(tmp_path: Path, text: str) -> None:
    folder = StudyFolder(tmp_path)
    folder.trials.write_text(text)
    with pytest.raises(ConfigError, match=r"trials\.json is damaged"):
        folder.read_trials()


def test_a_decision_cut_short_is_left_out(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert folder.read_decisions() == []
    folder.decisions.write_text('{"what": "a"}\n1\n{"wh')
    assert folder.read_decisions() == [{"what": "a"}]
