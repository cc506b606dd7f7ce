"""Pages: what stands on them, and that they replace one another whole."""

import json
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from files import durable
from files.errors import ConfigError
from training.report.page import write_comparison, write_report

ROOT = Path(__file__).resolve().parents[3]


def test_page_says_what_the_run_did(html: str, read_page) -> None:
    page = read_page(html)
    assert "Finished 4 epochs in 10 s: final top-1 97.25 %, best 98.75 % at epoch 3." in page.text
    assert "poolformer_s12 on digits" in page.text
    for fact in ("Images/s 1,234", "Peak memory 812 MB", "Steps 44", "Machine device cpu, cpu count 8 Versions"):
        assert fact in page.text
    assert "Command python train.py 'model.name=a b' Machine" in page.text
    assert "Versions torch 2.14.1 Started 2025-11-23T22:00:00+00:00 Weights" in page.text
    assert (
        "rate 0.3, profile linear, rate_is max, mode skip, break_even (mlp 0.05), schedule ramp (start 0.0)"
        in page.text
    )
    assert "Weights sha256 ab12" in page.text


def test_page_has_its_figures_and_needs_nothing_else(html: str, read_page) -> None:
    page = read_page(html)
    assert page.tags.count("svg") == 10 and page.tags.count("img") == 26
    assert page.tags.count("figure") == page.tags.count("svg") + page.tags.count("img") + 1, "and the bar of times"
    for label in ("training", "validation", "top-1", "top-5", "Learning rate", "nominal", "realised"):
        assert label in page.text
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert len(list(ElementTree.fromstring(svg).iter())) > 20
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert references
    assert all(value and value.startswith(("#", "data:image/png;base64,")) for value in references)
    assert "@import" not in html
    assert "url(http" not in html
    assert "prefers-color-scheme: dark" in html
    assert ("name", "viewport") in page.attributes


def test_equal_ids_on_a_page_name_equal_things(html: str, read_page) -> None:
    ids = [value for name, value in read_page(html).attributes if name == "id"]
    assert ids
    clashing = {value for value in ids if ids.count(value) > 1}
    for value in clashing:  # harmless then: a reference finds the same shape
        assert len(set(re.findall(rf'<(?:path|clipPath) id="{value}".*?(?:/>|</clipPath>)', html, re.DOTALL))) == 1


def test_table_of_blocks(html: str, read_page) -> None:
    text = read_page(html).text
    assert "2 stages.0.blocks.2 skip 0.300 0.240 76.0 %" in text
    assert "12.0 % of all branch computations were skipped, never computed." in text


def test_config_is_on_the_page_as_text_and_collapsed(html: str, config_text) -> None:
    assert f"<details><summary>config.yaml, resolved</summary><pre>{config_text.rstrip()}" in html


def test_values_are_escaped(tmp_path: Path, make_run, page_of, write_csv, config_text) -> None:
    evil = "<script>alert(1)</script>"
    run = make_run(tmp_path / "a&b", config=config_text.replace("poolformer_s12", f'"{evil}"'))
    (run / "environment.json").write_text(json.dumps({"command": evil, evil: {"x": evil}}))
    blocks = [[evil, evil, 0.1, evil, 0.1]]
    write_csv(run / "drop_path.csv", ("block", "name", "nominal_rate", "mode", "realised_rate"), blocks)
    page = page_of(run)
    assert "script" not in page.tags
    assert page.text.count("alert(1)") >= 6  # model, config, command, key and value, block, name, mode
    assert "<h1>a&amp;b</h1>" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", ["metrics.csv", "summary.json", "drop_path.csv", "environment.json", "rates.csv",
                                     "evaluation.json", "data.json", "all"])  # fmt: skip
def test_missing_files_cost_their_part_only(run: Path, missing: str, page_of) -> None:
    charts = {"metrics.csv": 4, "summary.json": 10, "drop_path.csv": 7, "environment.json": 10, "rates.csv": 9}
    charts |= {"evaluation.json": 8, "data.json": 10}
    files = dict.fromkeys(charts)
    for name in files if missing == "all" else [missing]:
        (run / name).unlink()
    page = page_of(run)
    assert page.tags.count("svg") == (0 if missing == "all" else charts[missing])
    assert ("metrics.csv holds no epoch yet." in page.text) == (missing in ("metrics.csv", "all"))
    assert ("drop_path.csv holds no block yet." in page.text) == (missing in ("drop_path.csv", "all"))
    assert "mode skip" in page.text


def test_report_replaces_the_old_one_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(run).read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    (run / "summary.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "replace", fail)
        with pytest.raises(ConfigError, match=r"report\.html was not saved, .*: No space left"):
            write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".*"))
    assert write_report(run).read_bytes() != before


def test_compare_tells_runs_of_one_name_apart(tmp_path: Path, make_run, read_page) -> None:
    runs = [make_run(tmp_path / folder / "run", top1=(50.0,)) for folder in "ab"]
    page = read_page(write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8"))
    assert all(str(run) in page.text for run in runs)


def test_templates_travel_with_the_package() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "training" / "report" / "templates"
    (pattern,) = data["training.report"]
    assert {p.suffix for p in folder.iterdir()} == {".j2", ".css"}
    assert set((ROOT / "training" / "report").glob(pattern)) == set(folder.iterdir())
