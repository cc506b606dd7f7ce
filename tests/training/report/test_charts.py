"""Charts: their colours, points and rates."""

import re
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layers.schedule import DropPathSchedule
from training.report import charts


def test_charts_take_every_colour_from_the_page(html: str) -> None:
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", svgs)
    assert set(re.findall(r"var\((--\w+)\)", svgs)) <= set(re.findall(r"(--\w+):", html))


def test_page_shows_the_planned_rates_where_a_schedule_changes_them(
    html: str, tmp_path: Path, make_run, page_of, read_page, config_text
) -> None:
    assert "Drop-path rate of each block as planned: from 0 (pale) to 0.3 (dark)" in read_page(html).text
    assert ("data:image/png;base64" in html) and html.count("<svg") == 10
    constant = make_run(
        tmp_path / "constant", config=config_text.replace("{kind: ramp, start: 0.0}", "{kind: constant}")
    )
    assert "as planned" not in page_of(constant).text
    unknown = make_run(tmp_path / "unknown", config=config_text.replace("kind: ramp", "kind: rump"))
    assert "as planned" not in page_of(unknown).text


def test_first_epoch_draws_points(tmp_path: Path, make_run, page_of) -> None:
    run = make_run(tmp_path / "first", top1=(12.5,))
    (run / "summary.json").unlink()
    page = page_of(run)
    assert "Not finished, 1 of 4 epochs in 2.5 s" in page.text
    assert page.tags.count("use") >= 6  # one marker for each of six curves, beside the ticks


def test_many_runs_differ_in_colour_or_dash() -> None:
    styles = {tuple(charts._style(i).values()) for i in range(32)}
    assert len(styles) == 32


def test_heat_map_shows_the_rate_of_each_block_at_each_step() -> None:
    schedule = DropPathSchedule(kind="early", cutoff=100)
    image = charts.draw_heat_map(Figure().subplots(), [0.0, 0.2, 0.4], schedule, 200)
    values = image.get_array()
    assert values is not None and values.shape == (3, 200)
    assert values[2, 0] == pytest.approx(0.4) and values[1, 0] == pytest.approx(0.2)
    assert values[2, 50] == pytest.approx(0.4 * (1 - 50 / 99)) and not values[:, 100:].any()


def test_ticks_of_a_single_epoch_are_epochs() -> None:
    _, svg = charts.draw_chart("one", lambda axes: charts._line(axes, [1.0], [0.5]))
    ticks = [text for text in re.findall(r">([^<>]+)</text>", svg) if text.replace(".", "").isdigit()]
    assert "1" in ticks and not any(text.startswith(("0.9", "1.0")) for text in ticks)


@pytest.mark.parametrize(("low", "high"), [(-0.05, 0.05), (60.0, 130.0), (-30.0, 118.0), (99.9, 100.1)])
def test_no_axis_of_percentages_has_a_number_that_is_none(low: float, high: float) -> None:
    """A diverged run has 0 % in every epoch, of which a margin would show as much below 0 as above."""
    axes = Figure().subplots()
    axes.set_ylim(low, high)
    assert not all(0 <= tick <= 100 for tick in ticks_in_view(axes))
    charts.keep_percent(axes)
    assert all(0 <= tick <= 100 for tick in ticks_in_view(axes)) and len(ticks_in_view(axes)) > 1
    below, above = axes.get_ylim()  # the mark of a point at the end is whole
    assert (low > 0 or below < 0) and (high < 100 or above > 100)


def test_an_axis_within_percentages_stays() -> None:
    axes = Figure().subplots()
    axes.plot([40.0, 60.0])
    before = axes.get_ylim()
    charts.keep_percent(axes)
    assert axes.get_ylim() == before


def ticks_in_view(axes: Axes) -> list[float]:
    low, high = axes.get_ylim()
    return [tick for tick in axes.get_yticks() if low <= tick <= high]


@pytest.mark.filterwarnings("error")
def test_letters_that_the_font_lacks_are_left_to_the_reader_s_fonts() -> None:
    _, svg = charts.draw_chart("one", lambda axes: None, xlabel="\u65e5\u672c")
    assert "\u65e5\u672c" in svg


def test_a_metric_without_a_value_has_no_chart(run: Path, page_of, write_csv) -> None:
    assert "Validation: ECE in %" in page_of(run).text
    text = (run / "metrics.csv").read_text().splitlines()
    place = text[0].split(",").index("val_ece")
    rows = [[cell if i != place else "nan" for i, cell in enumerate(line.split(","))] for line in text[1:]]
    write_csv(run / "metrics.csv", tuple(text[0].split(",")), rows)
    assert "Validation: ECE in %" not in page_of(run).text
