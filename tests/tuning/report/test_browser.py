"""Studies' pages as a browser shows them: on a phone and a laptop, in light and dark mode."""

from pathlib import Path

import pytest

from tests.browser import Browser
from tuning.report.page import write_study_report


@pytest.mark.parametrize("trials, final", [(12, 8), pytest.param(100, 0, marks=pytest.mark.slow)])
def test_page(tmp_path: Path, make_study, browser: Browser, trials: int, final: int) -> None:
    folder = make_study(tmp_path / "a", trials=trials, final=final)
    assert browser.problems(write_study_report(folder.path)) == []
