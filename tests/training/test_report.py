"""Reports: what is on the pages, what damaged run folders and bad paths do, and the README's pictures."""

import csv
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

import pictures
import training.report.__main__ as report_main
from files.errors import ConfigError
from layers.rates import drop_path_rates
from layers.schedule import DropPathSchedule
from training.report import charts, runs
from training.report.page import write_comparison, write_report
from training.run_folder import COLUMNS

CONFIG = """seed: 0
model: {name: poolformer_s12, num_classes: 10}
drop_path: {rate: 0.3, profile: linear, rate_is: max, mode: skip, break_even: {mlp: 0.05},
  schedule: {kind: ramp, start: 0.0}}
data: {dataset: digits}
optim: {epochs: 4}
"""
TOP1 = (20.0, 91.5, 98.75, 97.25)


class Page(HTMLParser):
    """Visible text, tags and attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self._hidden = 0
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._hidden += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else f" {data}"


def write_csv(path: Path, header: tuple[str, ...], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def make_run(path: Path, *, top1: tuple[float, ...] = TOP1, mode: str = "skip", config: str = CONFIG) -> Path:
    """A run folder as training leaves it: four epochs, three blocks."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config)
    environment = {
        "command": "python train.py 'model.name=a b'",
        "started": "2025-11-23T22:00:00+00:00",
        "commit": None,
        "device": "cpu",
        "cpu_count": 8,
        "torch": "2.14.1",
        "cuda": None,
    }
    (path / "environment.json").write_text(json.dumps(environment))
    rows = [[i, 11 * i, 2 / i, 1.5 / i, v, 100.0, 1e-3, 0.1 * i, 500.0, 2.5 * i] for i, v in enumerate(top1, start=1)]
    write_csv(path / "metrics.csv", COLUMNS, rows)
    blocks = [[i, f"stages.0.blocks.{i}", 0.15 * i, mode, 0.12 * i] for i in range(3)]
    write_csv(path / "drop_path.csv", ("block", "name", "nominal_rate", "mode", "realised_rate"), blocks)
    summary = {
        "best_top1": max(top1),
        "final_top1": top1[-1],
        "epochs": len(top1),
        "steps": 11 * len(top1),
        "seconds": 10.25,
        "images_per_second": 1234.4,
        "peak_memory_mb": 812.4,
        "weights_sha256": "ab12",
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "digits-1")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of an untouched run, drawn once."""
    run = make_run(tmp_path_factory.mktemp("runs") / "digits-1")
    return write_report(run).read_text(encoding="utf-8")


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


# ---- the page of a run -----------------------------------------------------------------------------------------------


def test_page_says_what_the_run_did(html: str) -> None:
    page = Page(html)
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


def test_page_has_its_figures_and_needs_nothing_else(html: str) -> None:
    page = Page(html)
    assert page.tags.count("figure") == page.tags.count("svg") == 6
    for label in ("training", "validation", "top-1", "top-5", "Learning rate", "nominal", "realised"):
        assert label in page.text
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert len(list(ElementTree.fromstring(svg).iter())) > 20
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert references
    assert all(value and value.startswith(("#", "data:image/png;base64,")) for value in references)
    assert "@import" not in html
    assert "url(http" not in html
    assert "prefers-color-scheme: dark" in html
    assert ("name", "viewport") in page.attributes


def test_charts_take_every_colour_from_the_page(html: str) -> None:
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", svgs)
    assert set(re.findall(r"var\((--\w+)\)", svgs)) <= set(re.findall(r"(--\w+):", html))


def test_equal_ids_on_a_page_name_equal_things(html: str) -> None:
    ids = [value for name, value in Page(html).attributes if name == "id"]
    assert ids
    clashing = {value for value in ids if ids.count(value) > 1}
    for value in clashing:  # harmless then: a reference finds the same shape
        assert len(set(re.findall(rf'<(?:path|clipPath) id="{value}".*?(?:/>|</clipPath>)', html, re.DOTALL))) == 1


def test_table_of_blocks(html: str) -> None:
    text = Page(html).text
    assert "2 stages.0.blocks.2 skip 0.300 0.240 76.0 %" in text
    assert "12.0 % of all branch computations were skipped, never computed." in text


def test_page_shows_the_planned_rates_where_a_schedule_changes_them(html: str, tmp_path: Path) -> None:
    assert "Drop-path rate of each block as planned: from 0 (pale) to 0.3 (dark)" in Page(html).text
    assert ("data:image/png;base64" in html) and html.count("<figure") == 6
    constant = make_run(tmp_path / "constant", config=CONFIG.replace("{kind: ramp, start: 0.0}", "{kind: constant}"))
    assert "as planned" not in page_of(constant).text
    unknown = make_run(tmp_path / "unknown", config=CONFIG.replace("kind: ramp", "kind: rump"))
    assert "as planned" not in page_of(unknown).text


def test_masked_blocks_count_as_computed(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "masked", mode="mask")).text
    assert "2 stages.0.blocks.2 mask 0.300 0.240 100.0 %" in text
    assert "12.0 % of all branch computations were dropped by a mask, none of them skipped." in text


def test_branches_that_mask_below_their_break_even(run: Path) -> None:
    path = run / "drop_path.csv"
    path.write_text(path.read_text().replace("0.3,skip", "0.3,skip/mask").replace("0.15,skip", "0.15,mask"))
    assert "2 stages.0.blocks.2 skip/mask 0.300 0.240 88.0 %" in page_of(run).text
    assert "4.0 % of all branch computations were skipped; 12.0 % were dropped in all." in page_of(run).text


def test_config_is_on_the_page_as_text_and_collapsed(html: str) -> None:
    assert f"<details><summary>config.yaml, resolved</summary><pre>{CONFIG.rstrip()}" in html


def test_values_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = make_run(tmp_path / "a&b", config=CONFIG.replace("poolformer_s12", f'"{evil}"'))
    (run / "environment.json").write_text(json.dumps({"command": evil, evil: {"x": evil}}))
    blocks = [[evil, evil, 0.1, evil, 0.1]]
    write_csv(run / "drop_path.csv", ("block", "name", "nominal_rate", "mode", "realised_rate"), blocks)
    page = page_of(run)
    assert "script" not in page.tags
    assert page.text.count("alert(1)") >= 6  # model, config, command, key and value, block, name, mode
    assert "<h1>a&amp;b</h1>" in (run / "report.html").read_text(encoding="utf-8")


# ---- what a killed run leaves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["metrics.csv", "summary.json", "drop_path.csv", "environment.json", "all"])
def test_missing_files_cost_their_part_only(run: Path, missing: str) -> None:
    files = {"metrics.csv": 1, "summary.json": 6, "drop_path.csv": 4, "environment.json": 6}
    for name in files if missing == "all" else [missing]:
        (run / name).unlink()
    page = page_of(run)
    assert page.tags.count("svg") == (0 if missing == "all" else files[missing])
    assert ("metrics.csv holds no epoch yet." in page.text) == (missing in ("metrics.csv", "all"))
    assert ("drop_path.csv holds no block yet." in page.text) == (missing in ("drop_path.csv", "all"))
    assert "mode skip" in page.text


def test_unfinished_run(run: Path) -> None:
    (run / "summary.json").unlink()
    metrics = run / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    text = page_of(run).text
    assert "Not finished, 2 of 4 epochs in 5.0 s: latest top-1 91.50 %, best 91.50 % at epoch 2." in text
    assert "Images/s 500" in text


def test_summary_of_a_run_that_goes_on_is_not_its_end(run: Path) -> None:
    (run / "config.yaml").write_text(CONFIG.replace("epochs: 4", "epochs: 6"))
    with (run / "metrics.csv").open("a") as file:
        file.write("5,55,0.5,0.4,99.5,100,0.001,0.4,600,12.5\n")
    text = page_of(run).text
    assert "Not finished, 5 of 6 epochs in 12 s: latest top-1 99.50 %, best 99.50 % at epoch 5." in text
    assert "Images/s 600" in text
    assert "Steps 55" in text


def test_first_epoch_draws_points(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", top1=(12.5,))
    (run / "summary.json").unlink()
    page = page_of(run)
    assert "Not finished, 1 of 4 epochs in 2.5 s" in page.text
    assert page.tags.count("use") >= 6  # one marker for each of six curves, beside the ticks


@pytest.mark.parametrize("rest", ["5,55,0.4", "5,55,0.4,0.3,99.99,100,0.001,0.4,500,2"])
def test_cut_off_row_is_left_out_and_said(run: Path, rest: str) -> None:
    with (run / "metrics.csv").open("a") as file:
        file.write(rest)  # no newline: the last number may have lost digits
    data = runs.read_run(run)
    assert data.epochs == 4
    assert "metrics.csv holds an incomplete row, which was left out." in page_of(run).text


def test_epoch_written_twice_counts_once(run: Path) -> None:
    with (run / "metrics.csv").open("a") as file:
        file.write("4,44,0.5,0.4,98.5,100,0.001,0.4,500,10\n")
    data = runs.read_run(run)
    assert data.metrics["epoch"] == [1, 2, 3, 4]
    assert data.metrics["val_top1"][-1] == 98.5


@pytest.mark.parametrize("text", ["", '{"best_top1": 9', "[1]", "\udcff"])
def test_damaged_summary_is_left_out_and_said(run: Path, text: str) -> None:
    (run / "summary.json").write_bytes(text.encode(errors="surrogateescape"))
    text = page_of(run).text
    assert "summary.json is damaged and was left out." in text
    assert "latest top-1 97.25 %, best 98.75 %" in text


def test_numbers_that_are_none(run: Path) -> None:
    metrics = run / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("98.75", "").replace("91.5", "nan").replace("0.375", "inf"))
    write_csv(
        run / "drop_path.csv", ("block", "name", "nominal_rate", "mode", "realised_rate"), [[0, "b", 0.1, "skip", ""]]
    )
    (run / "summary.json").write_text('{"epochs": 4, "final_top1": null, "peak_memory_mb": null}')
    data = runs.read_run(run)
    assert [math.isnan(v) for v in data.metrics["val_top1"]] == [False, True, True, False]
    assert math.isnan(data.metrics["val_loss"][-1])
    text = page_of(run).text
    assert "best 97.25 % at epoch 4" in text
    assert "Peak memory \u2013" in text
    assert "0 b skip 0.100 \u2013 \u2013" in text
    assert "No sample has been drawn for yet." in text


def test_report_replaces_the_old_one_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(run).read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    (run / "summary.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(ConfigError, match=r"cannot write .*report\.html': No space left"):
            write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".*"))
    assert write_report(run).read_bytes() != before


# ---- comparing runs --------------------------------------------------------------------------------------------------


def test_compare(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_run(tmp_path / "other", top1=(50.0, 99.5), config=CONFIG.replace("0.3", "0.1"))
    (other / "summary.json").unlink()
    output = tmp_path / "compared.html"
    assert report_main.main(["--compare", str(run), str(other), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    html = output.read_text(encoding="utf-8")
    page = Page(html)
    assert "2 runs compared" in page.text
    assert "digits-1 98.75 % 97.25 % 4 10 s 1,234 rate 0.3, profile linear" in page.text
    assert "other (not finished) 99.50 % 99.50 % 2 5.0 s 500 rate 0.1, profile linear" in page.text
    figures = re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL)
    assert len(figures) == 2
    for figure in figures:  # a line per run, in the colour of its key
        assert "stroke: var(--s0)" in figure
        assert "stroke: var(--s1)" in figure
    assert 'stroke="var(--s1)"' in html


def test_compare_tells_runs_of_one_name_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / folder / "run", top1=(50.0,)) for folder in "ab"]
    page = Page(write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8"))
    assert all(str(run) in page.text for run in runs)


def test_many_runs_differ_in_colour_or_dash() -> None:
    styles = {tuple(charts._style(i).values()) for i in range(32)}
    assert len(styles) == 32


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_the_same_bytes_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "deep" / "second"
    assert report_main.main(["--pictures", str(first)]) == 0
    torch.rand(3)  # the draws must not depend on the state around them
    assert report_main.main(["--pictures", str(second)]) == 0
    names = ["drop_path_rates.svg", "drop_path_batch.svg", "drop_path_schedules.svg"]
    assert capsys.readouterr().out.split() == [str(folder / name) for folder in (first, second) for name in names]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        svg = (first / name).read_text(encoding="utf-8")
        ElementTree.fromstring(svg)
        assert "<text" not in svg  # text as paths: the same on every machine
        assert not re.search(r"\d\d:\d\d|matplotlib v", svg, flags=re.IGNORECASE)
        assert len(svg) < 300_000


def test_heat_map_shows_the_rate_of_each_block_at_each_step() -> None:
    schedule = DropPathSchedule(kind="early", cutoff=100)
    image = charts.draw_heat_map(Figure().subplots(), [0.0, 0.2, 0.4], schedule, 200)
    values = image.get_array()
    assert values is not None and values.shape == (3, 200)
    assert values[2, 0] == pytest.approx(0.4) and values[1, 0] == pytest.approx(0.2)
    assert values[2, 50] == pytest.approx(0.4 * (1 - 50 / 99)) and not values[:, 100:].any()
    panels = [axes.get_title(loc="left").partition(":")[0] for axes in pictures.draw_schedules().axes if axes.images]
    assert panels == ["constant", "early", "late", "ramp", "cosine", "piecewise"]


def test_picture_of_rates_has_every_bar() -> None:
    figure = pictures.draw_rates()
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.containers}
    assert list(panels) == ["linear", "linear_from_first", "constant", "stagewise", "cosine"]
    for profile, axes in panels.items():
        heights = [bar.get_height() for bar in axes.containers[0]]
        assert heights == pytest.approx(drop_path_rates(0.3, [4, 4, 12, 4], profile))  # type: ignore[arg-type]


def test_step_holds_what_the_branches_really_saw() -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    computed = pictures.draw_step((4, 4, 12, 4), 0.4, batch=16, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert computed.shape == (16, 24)
    for kept, rate in zip(computed.sum(0).tolist(), drop_path_rates(0.4, (4, 4, 12, 4)), strict=True):
        assert abs(kept - 16 * (1 - rate)) < 1  # rounded up or down, never further: mode skip's fixed count
    assert computed[:, 0].all()
    assert len({tuple(row) for row in computed.tolist()}) == 16  # each sample takes its own path
    assert not torch.equal(computed, pictures.draw_step((4, 4, 12, 4), 0.4, batch=16, seed=1))


def test_picture_of_a_batch_draws_the_step() -> None:
    computed = pictures.draw_step((4, 4, 12, 4), 0.4, batch=16, seed=0)
    grid, shares = pictures.draw_batch().axes
    boxes = [c for c in grid.collections if isinstance(c, PolyCollection)]
    lines = [c for c in grid.collections if isinstance(c, LineCollection)]
    assert [len(c.get_paths()) for c in boxes] == computed.sum(1).tolist()
    assert [len(c.get_segments()) for c in lines] == (~computed).sum(1).tolist()
    assert len(grid.images) == 16
    assert [bar.get_height() for bar in shares.containers[1]] == pytest.approx(computed.float().mean(0).tolist())


# ---- bad input -------------------------------------------------------------------------------------------------------


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
        (["--compare", "{run}", "{tmp}/empty", "--output", "{tmp}/c.html"], "run '{tmp}/empty': not a run folder"),
        (["--compare", "{run}", "--output", "{tmp}/no/c.html"], "cannot write '{tmp}/no/c.html': No such file"),
        (["--compare", "{run}", "--output", "{tmp}/empty"], "cannot write '{tmp}/empty': Is a directory"),
        (["--pictures", "{tmp}/file"], "cannot make the folder '{tmp}/file': File exists"),
    ],
)
def test_bad_paths(
    run: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert report_main.main([a.format(tmp=tmp_path, run=run) for a in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message.format(tmp=tmp_path))
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_broken_config_is_one_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text("seed: [1")
    assert report_main.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert "config.yaml" in error
    assert error.count("\n") <= 3


@pytest.mark.parametrize("arguments", [[], ["--compare", "a"], ["a", "--output", "b"], ["a", "--pictures", "b"]])
def test_options_that_do_not_go_together(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        report_main.main(arguments)
    assert error.value.code == 2
