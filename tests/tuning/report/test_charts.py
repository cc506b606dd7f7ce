"""Charts of a study: what they draw, what they leave out, and that they take their colours from the page."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tuning.report import charts
from tuning.report.charts import error_chart, final_chart, race_chart, race_rounds
from tuning.report.reading import read_study
from tuning.study import StudyFolder


def test_colours_are_the_pages(html: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(svgs) == 3
    for svg in svgs:
        assert len(list(ElementTree.fromstring(svg).iter())) > 20
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", svg)
        assert set(re.findall(r"var\((--\w+)\)", svg)) <= set(re.findall(r"(--\w+):", html))


def markers(svg: str) -> int:
    return svg.count("<use ")


def test_every_run_is_a_point(study: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_study(study.path)
    drawn = error_chart(found)
    assert drawn is not None
    caption, svg = drawn
    assert "ring: the winner" in caption and "band: 95\u00a0% interval" in caption and "its runs (dots)" in caption
    monkeypatch.setattr(charts, "MOST_POINTS", 23)
    fewer = error_chart(found)
    assert fewer is not None and "dots" not in fewer[0]
    assert markers(svg) - markers(fewer[1]) == 24


def test_one_seed_has_no_band(tmp_path: Path, make_study) -> None:
    found = read_study(make_study(tmp_path / "a", rounds=(1,), final=0, keys=("drop_path.rate",)).path)
    drawn = error_chart(found)
    assert drawn is not None and "one run each, so that no interval can be given" in drawn[0]
    assert race_chart(found) is None and final_chart(found) is None


def test_no_number_draws_no_curve(tmp_path: Path, make_study) -> None:
    folder = make_study(tmp_path / "a", final=0)
    folder.write_trials([
        replace(t, parameters={"drop_path.profile": t.parameters["drop_path.profile"]}) for t in folder.read_trials()
    ])  # fmt: skip
    assert error_chart(read_study(folder.path)) is None
    one = make_study(tmp_path / "b", trials=1, final=0)
    assert error_chart(read_study(one.path)) is None


def test_a_few_bad_runs_do_not_flatten_the_rest(tmp_path: Path, make_study) -> None:
    folder = make_study(tmp_path / "a", final=0)
    trials = folder.read_trials()
    assert "leaves out" not in error_chart(read_study(folder.path))[0]  # pyright: ignore[reportOptionalSubscript]
    trials[-1] = replace(trials[-1], scores={0: 10.0})
    folder.write_trials(trials)
    caption, _ = error_chart(read_study(folder.path)) or ("", "")
    assert caption.endswith("the axis leaves out the 1 worst run")


def test_near_rates_make_one_point(tmp_path: Path, make_study) -> None:
    found = read_study(make_study(tmp_path / "a", trials=60, final=0, keys=("drop_path.rate",)).path)
    bins = charts._bins(found, found.scored, "drop_path.rate", logarithmic=False)
    assert len(bins) <= charts.BINS + 1 and sum(map(len, bins)) == 60
    for part in bins:
        rates = [t.parameters["drop_path.rate"] for t in part]
        assert max(rates) - min(rates) < 0.5 / charts.BINS


def test_logarithmic_parameter_is_drawn_so(tmp_path: Path, make_study) -> None:
    found = read_study(
        make_study(tmp_path / "a", final=0, keys=("drop_path.profile", "drop_path.rate", "optim.lr")).path
    )
    assert found.axis == "drop_path.rate" and found.numbers == ["drop_path.rate", "optim.lr"]
    only = [replace(t, parameters={"optim.lr": t.parameters["optim.lr"]}) for t in found.trials]
    found.folder.write_trials(only)
    drawn = error_chart(read_study(found.folder.path))
    assert drawn is not None and "over lr;" in drawn[0]
    found.folder.config.write_text(found.folder.config.read_text().replace(", log: true", ""))
    linear = error_chart(read_study(found.folder.path))
    assert linear is not None
    powers = [tick for tick in ("0.001", "0.002", "0.005", "0.01") if f">{tick}<" in drawn[1]]
    assert len(powers) >= 2 and "mathdefault" not in drawn[1] and drawn[1] != linear[1]


def test_race_shows_every_trial(study: StudyFolder) -> None:
    found = read_study(study.path)
    assert race_rounds(found) == [1, 2, 4]
    drawn = race_chart(found)
    assert drawn is not None
    left_out = int((re.search(r"leaves out (\d+)", drawn[0]) or ["", "0"])[1])
    assert left_out < 6  # those that went on are all shown
    assert "1 seed" in drawn[1] and "4 seeds" in drawn[1]


def test_rounds_that_were_not_reached_are_not_drawn(tmp_path: Path, make_study) -> None:
    folder = make_study(tmp_path / "a", final=0)
    folder.write_trials([replace(t, scores=dict(list(t.scores.items())[:2])) for t in folder.read_trials()])
    assert race_rounds(read_study(folder.path)) == [1, 2]
    folder.config.unlink()
    assert race_rounds(read_study(folder.path)) == [1, 2]
    folder.write_trials([])
    assert race_rounds(read_study(folder.path)) == []


def test_final_draws_a_line_for_each_seed(study: StudyFolder) -> None:
    found = read_study(study.path)
    caption, svg = final_chart(found) or ("", "")
    assert caption == "top1 in % on the test part: a line for each seed, diamonds for the means"
    lines = re.findall(r"stroke: var\(--pale\)", svg)
    assert len(lines) == 8
