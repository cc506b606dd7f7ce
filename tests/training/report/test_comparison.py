"""Runs side by side: who is ahead, by more than chance or not, and on which classes."""

import json
from pathlib import Path

import pytest

from training.report.comparison import differing_classes, standing
from training.report.page import write_comparison
from training.report.runs import Run, read_run


@pytest.fixture
def two(tmp_path: Path, make_run):
    def make(first: float, second: float) -> list[Run]:
        runs = [make_run(tmp_path / name, top1=(50.0, top1)) for name, top1 in (("a", first), ("b", second))]
        for run in runs:
            (run / "summary.json").unlink()
        return [read_run(run) for run in runs]

    return make


def test_a_small_lead_may_be_chance(two) -> None:
    told = standing(two(97.0, 98.0), "ab")
    assert told.startswith(
        "b ends at 98.00\u00a0% top-1, 1.00 points ahead of a: not more than chance, since 360 validation images"
    )


def test_a_large_lead_is_not(two) -> None:
    told = standing(two(98.0, 80.0), "ab")
    assert (
        "a ends at 98.00\u00a0% top-1, 18.00 points ahead of b: more than 360 validation images leave to chance" in told
    )


def test_equal_runs_and_runs_of_other_data(two, tmp_path: Path) -> None:
    runs = two(98.0, 98.0)
    assert "and so does" in standing(runs, "ab")
    evidence = json.loads((tmp_path / "b" / "evaluation.json").read_text()) | {"samples": 1000}
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps(evidence))
    assert "not validated on the same number of images" in standing([runs[0], read_run(tmp_path / "b")], "ab")
    assert "nothing to compare" in standing(runs[:1], "a")


def test_classes_on_which_runs_differ(two, tmp_path: Path, read_page) -> None:
    runs = two(97.0, 98.0)
    assert differing_classes(runs, 9) == []
    path = tmp_path / "b" / "evaluation.json"
    evidence = json.loads(path.read_text())
    evidence["pairs"] = [[i, i, 36] if i != 3 else [3, 3, 18] for i in range(10)] + [[3, 5, 18]]
    path.write_text(json.dumps(evidence))
    runs[1] = read_run(tmp_path / "b")
    rows = differing_classes(runs, 3)
    assert rows[0].name == "3" and len(rows) == 3
    assert rows[0].recalls == pytest.approx([100 * 35 / 36, 50]) and rows[0].samples == 36
    page = read_page(write_comparison([run.path for run in runs], tmp_path / "c.html").read_text())
    assert "Classes on which they differ Class Images a b 3 36 97.2 % 50.0 %" in page.text
    evidence["classes"][0] = "zero"
    path.write_text(json.dumps(evidence))
    assert differing_classes([runs[0], read_run(tmp_path / "b")], 3) == [], "other classes"
    assert differing_classes([runs[0]], 3) == []
