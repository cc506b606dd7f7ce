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
