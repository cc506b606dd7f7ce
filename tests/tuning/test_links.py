"""What a study takes from its neighbours, and what becomes of it where one of them fails."""

from pathlib import Path
from typing import Any

from tests.tuning.parts import study
from tuning import links, verdict
from tuning.links import Finalist, Links
from tuning.report import page
from tuning.study import StudyFolder


def test_a_report_that_fails_is_not_the_study_s_failure(tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(folder: Path) -> None:
        raise ZeroDivisionError("a division\nand more")

    monkeypatch.setattr(page, "write_study_report", fail)
    links.write_report(tmp_path)
    assert capsys.readouterr().err == "warning: no report: a division; it is made when the study is started again\n"


def test_finalists_are_given_to_the_verdict(tmp_path: Path, monkeypatch) -> None:
    given: dict[str, Any] = {}

    def conclude(folder: StudyFolder, contenders: list[Any], *, metric: str, split: str) -> dict[str, Any]:
        given.update(folder=folder, contenders=contenders, metric=metric, split=split)
        return {"sentence": "so"}

    monkeypatch.setattr(verdict, "conclude", conclude)
    one = Finalist("zero", {"drop_path.rate": 0.0}, "abc", study(tmp_path).base, {1000: 90.0, 1002: 91.0}, 1)
    folder = StudyFolder(tmp_path)
    assert links.conclude(folder, [one], "top1", "test") == {"sentence": "so"}
    assert given["folder"] is folder and (given["metric"], given["split"]) == ("top1", "test")
    assert vars(given["contenders"][0]) == {
        "role": "zero",
        "parameters": {"drop_path.rate": 0.0},
        "digest": "abc",
        "label": "rate 0",
        "seeds": [1000, 1002],
        "scores": [90.0, 91.0],
        "also": (),
        "failed": 1,
    }


def test_each_neighbour_is_one_function() -> None:
    assert Links().score_unit is links.score_unit and Links().write_best is links.write_best
