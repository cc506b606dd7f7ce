"""The page of a study: the verdict first, all that it rests on, and readable whatever there is."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from tuning.report.page import write_study_report
from tuning.report.reading import read_study
from tuning.study import StudyFolder

ROOT = Path(__file__).resolve().parents[3]


def test_verdict_comes_first(html: str, study: StudyFolder, read_page) -> None:
    page = read_page(html)
    sentence = " ".join(json.loads(study.verdict.read_text())["sentence"].split())
    text = page.text[page.text.index("convformer_n4 on mnist5k") :]
    assert text.index(sentence) < text.index("Use rate")
    places = [text.index(word) for word in ("How sure", "Error in % over drop-path rate", "The race", "What mattered")]
    assert places == sorted(places)
    assert "python train.py --config" in text and f"python tune.py --config {study.config}" in text


def test_page_needs_nothing_else(html: str, read_page) -> None:
    page = read_page(html)
    assert page.tags.count("figure") == page.tags.count("svg") == 3
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert references and all(value and value.startswith("#") for value in references)
    assert "@import" not in html and "url(http" not in html
    assert "prefers-color-scheme: dark" in html and ("name", "viewport") in page.attributes


def test_tables(html: str, study: StudyFolder, read_page) -> None:
    text = read_page(html).text
    for trial in read_study(study.path).trials:
        assert f"units/{trial.digest}" in text
    assert "published" in text and "advisor" in text and "Gaussian process" in text
    assert "12 decisions, in order" in text and "2026-11-25 20:00 trial 0 is dropped" in text
    assert "Seed rate 0" in text and "1007" in text


@pytest.mark.parametrize(
    "trials, rounds, final, figures",
    [(1, (1,), 0, 0), (1, (1,), 1, 0), (3, (1,), 0, 1), (2, (1, 2), 6, 3), (12, (4,), 0, 1)],
)
def test_small_studies(tmp_path: Path, make_study, study_page, trials: int, rounds, final: int, figures: int) -> None:
    folder = make_study(tmp_path / "a", trials=trials, rounds=rounds, final=final, keys=("drop_path.rate",))
    page = study_page(folder)
    assert page.tags.count("figure") == figures
    assert ("No verdict yet" in page.text) == (final == 0)
    assert ("There is nothing to compare it with" in page.text) == (final > 0 and trials == 1)
    assert "nan" not in page.text.lower().replace("nano", "")


@pytest.mark.parametrize("state", ["failed", "waiting", "racing"])
def test_studies_without_a_score(tmp_path: Path, make_study, study_page, state) -> None:
    folder = make_study(tmp_path / "a", trials=3, final=0)
    folder.write_trials(
        [replace(t, scores={}, state=state, reason="no room left", steps=0) for t in folder.read_trials()]
    )
    page = study_page(folder)
    assert "figure" not in page.tags and "No run has a score yet." in page.text and "The race" not in page.text
    assert page.text.count("no room left") >= 3


def test_a_study_that_has_just_begun(tmp_path: Path, study_page) -> None:
    (tmp_path / "study.yaml").write_text("space: {}\n")
    page = study_page(StudyFolder(tmp_path))
    assert "Nothing has been tried yet." in page.text and "trials.json holds no trial yet." in page.text


def test_values_are_escaped(tmp_path: Path, make_study, study_page) -> None:
    evil = "<script>alert(1)</script>"
    folder = make_study(tmp_path / "a&b", trials=4, rounds=(1, 2), final=6)
    folder.write_trials([
        replace(t, origin=evil, reason=evil, parameters={"drop_path.rate": 0.1 * t.number, evil: f"{evil}{t.number}"})
        for t in folder.read_trials()
    ])  # fmt: skip
    folder.decisions.write_text(json.dumps({"time": evil, "what": evil, "why": evil}) + "\n{}\n")
    folder.best.write_text(evil)
    verdict = json.loads(folder.verdict.read_text())
    verdict["configs"][0]["label"] = verdict["sentence"] = verdict["metric"] = evil
    folder.verdict.write_text(json.dumps(verdict))
    page = study_page(folder)
    assert "script" not in page.tags and page.text.count("alert(1)") >= 12


def test_large_study_is_small_and_folded(tmp_path: Path, make_study, study_page) -> None:
    folder = make_study(tmp_path / "a", trials=100)
    page = study_page(folder)
    assert "All 100 trials, the best first" in page.text
    assert folder.report.stat().st_size < 400_000


@pytest.mark.slow
def test_a_thousand_trials_stay_below_two_megabytes(tmp_path: Path, make_study, study_page) -> None:
    folder = make_study(tmp_path / "a", trials=1000, keys=("drop_path.rate", "drop_path.profile", "optim.lr"), final=30)
    page = study_page(folder)
    assert "Scores of 30 seeds" in page.text
    assert folder.report.stat().st_size < 2_000_000


def test_page_is_written_again_alike(study: StudyFolder, html: str) -> None:
    assert write_study_report(study.path).read_text(encoding="utf-8") == html


def test_templates_travel_with_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = ROOT / "tuning" / "report" / "templates"
    (pattern,) = settings["package-data"]["tuning.report"]
    assert set((ROOT / "tuning" / "report").glob(pattern)) == set(folder.iterdir())
    assert "tuning.report" in settings["packages"]
