"""`python -m training.report`: what it writes and says, and what mistakes cost."""

import re
from pathlib import Path

import pytest

import training.report.__main__ as report_main

UNSAVED = "was not saved, what was there before is untouched:"


def test_compare(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_run, read_page, config_text
) -> None:
    other = make_run(tmp_path / "other", top1=(50.0, 99.5), config=config_text.replace("0.3", "0.1"))
    (other / "summary.json").unlink()
    output = tmp_path / "compared.html"
    assert report_main.main([str(run), str(other), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    html = output.read_text(encoding="utf-8")
    page = read_page(html)
    assert "2 runs compared" in page.text
    assert "digits-1 98.75 % 97.25 % 4 10 s 1,234 7.5 % rate 0.3, profile linear" in page.text
    assert "other (not finished) 99.50 % 99.50 % 2 5.0 s 500 7.5 % rate 0.1, profile linear" in page.text
    assert "What differs in their configs Setting digits-1 other drop_path.rate 0.3 0.1 Results" in page.text
    figures = re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL)
    assert len(figures) == 2
    for figure in figures:  # a line per run, in the colour of its key
        assert "stroke: var(--s0)" in figure
        assert "stroke: var(--s1)" in figure
    assert 'stroke="var(--s1)"' in html


def test_several_runs_go_to_a_page_here(run: Path, tmp_path: Path, monkeypatch, capsys, make_run) -> None:
    monkeypatch.chdir(tmp_path)
    assert report_main.main([str(run), str(make_run(tmp_path / "other"))]) == 0
    assert capsys.readouterr().out == "comparison.html\n" and (tmp_path / "comparison.html").is_file()
    assert not (run / "report.html").exists()


def test_a_report_may_go_elsewhere(run: Path, tmp_path: Path) -> None:
    assert report_main.main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file() and not (run / "report.html").exists()


def test_a_page_is_not_written_over_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.yaml").read_text()
    assert report_main.main([str(run), "--output", str(run / "config.yaml")]) == 2
    assert "config.yaml: is the run's own file, of" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before
    for _ in range(2):
        assert report_main.main([str(run), "--output", str(run / "report.html")]) == 0


def test_command_writes_the_report_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_main.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/digits-2"], "run '{tmp}/digits-2': no such folder; did you mean 'digits-1'?"),
        (["{tmp}/no/where"], "run '{tmp}/no/where': no such folder"),
        (["{tmp}/file"], "run '{tmp}/file': no such folder"),
        (["{tmp}/empty"], "run '{tmp}/empty': not a run folder, it holds no config.yaml"),
        (["{run}", "{tmp}/empty", "--output", "{tmp}/c.html"], "run '{tmp}/empty': not a run folder"),
        (["{run}", "{run}/../digits-1"], "run '{run}/../digits-1': given twice; name each run once"),
        (["{run}", "--output", "{tmp}/no/c.html"], "{tmp}/no/c.html {unsaved} No such file"),
        (["{run}", "{tmp}/other", "--output", "{tmp}/no/c.html"], "{tmp}/no/c.html {unsaved} No such file"),
        (["{run}", "--output", "{tmp}/empty"], "{tmp}/empty {unsaved} Is a directory"),
    ],
)
def test_bad_paths(
    run: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], make_run
) -> None:
    make_run(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert report_main.main([a.format(tmp=tmp_path, run=run) for a in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: " + message.format(tmp=tmp_path, run=run, unsaved=UNSAVED))
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_broken_config_is_one_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text("seed: [1")
    assert report_main.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert "config.yaml" in error
    assert error.count("\n") <= 3


@pytest.mark.parametrize("arguments", [[], ["--output", "b"], ["a", "--compare", "b"]])
def test_no_run_and_unknown_options(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        report_main.main(arguments)
    assert error.value.code == 2
