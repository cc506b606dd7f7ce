"""The command line of a study's report."""

from pathlib import Path

import pytest

from tuning.report.__main__ import main


def test_report_is_written_again(tmp_path: Path, make_study, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_study(tmp_path / "a", trials=1, rounds=(1,), final=0)
    assert main([str(folder.path)]) == 0
    assert capsys.readouterr().out == f"{folder.report}\n"
    assert folder.report.stat().st_size > 2000


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "not a study's folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
