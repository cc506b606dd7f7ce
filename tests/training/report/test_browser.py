"""Pages as a browser shows them: on a phone and a laptop, in light and dark mode, without a word of complaint."""

from pathlib import Path

import pytest

from tests.browser import Browser
from training.report.page import write_comparison, write_report

# A page with one fault of each kind that `Browser.problems` finds.
FAULTY = """<!doctype html><meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark }} p {{ color: #fff; background: #fff }}</style><body>
<script>console.warn("careful")</script><img src="nowhere.png" alt="lost"><svg style="display: none" class="hidden"></svg>
<figure style="width: 2000px; height: 5px" aria-label="wide"></figure><p>white on white</p></body>"""


def test_faults_are_found(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(FAULTY.format())
    found = browser.look(page, width=390).problems()
    for fault in ("console: careful", "asks for file:", "scrolls sideways", "img 'lost' is not visible",
                  "svg 'hidden' is not visible", "figure 'wide' sticks out",
                  "'white on white' has contrast 1.00"):  # fmt: skip
        assert any(fault in problem for problem in found), fault


def test_report(browser: Browser, run: Path) -> None:
    assert browser.problems(write_report(run)) == []


@pytest.mark.slow
def test_comparison(browser: Browser, tmp_path: Path, make_run) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b", "c")]
    assert browser.problems(write_comparison(runs, tmp_path / "comparison.html")) == []


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [3, 3000])
@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_few_and_many(browser: Browser, tmp_path: Path, make_run, config_text: str, classes: int, epochs: int) -> None:
    names = [f"class number {i} of the many that there are" if i % 3 else f"n{i:08d}" for i in range(classes)]
    config = config_text.replace("num_classes: 10", f"num_classes: {classes}").replace("epochs: 4", f"epochs: {epochs}")
    config = config.replace("dataset: digits", f"dataset: digits, class_names: {names}")
    top1 = tuple(90 - 80 / i + (i * 7919 % 13) / 10 for i in range(1, epochs + 1))
    runs = [make_run(tmp_path / name, top1=top1, config=config, classes=names) for name in ("a", "b")]
    page = write_report(runs[0])
    assert page.stat().st_size < 2_000_000
    assert browser.problems(page) == []
    text = browser.look(page, width=390).text
    assert ("Most frequent mistakes" in text) == ("Its surest mistakes" in text) == (classes > 1)
    assert f"Finished {epochs} epochs" in text and ("Top-5" in text or "top-5" in text) == (classes == 1000)
    comparison = write_comparison(runs, tmp_path / "comparison.html")
    assert comparison.stat().st_size < 2_000_000 and browser.problems(comparison) == []


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["evaluation.json", "metrics.csv", "everything"])
def test_what_is_left_of_a_run(browser: Browser, run: Path, missing: str) -> None:
    for path in run.iterdir():
        if path.name == missing or (missing == "everything" and path.name != "config.yaml"):
            path.unlink()
    assert browser.problems(write_report(run)) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [20, 21])
def test_as_many_names_as_fit(browser: Browser, tmp_path: Path, make_run, number: int) -> None:
    names = ["x" * 90, *("Donaudampfschifffahrtsgesellschaft " + str(i) for i in range(number - 1))]
    assert browser.problems(write_report(make_run(tmp_path / ("run-" + 60 * "y"), classes=names))) == []
