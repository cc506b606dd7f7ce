"""A report's charts, as SVG in colours that follow the page's light or dark mode."""

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from pydantic import ValidationError

from layers.schedule import DropPathSchedule
from training.config import DropPathSection, build_schedule
from training.metrics import METRICS, Metric
from training.report.runs import Block, Run, is_known
from training.report.words import many

# Stand-ins that become CSS variables in the page, so that one drawing follows light and dark.
INK, SOFT, LINE, PALE = "#010101", "#020202", "#030303", "#050505"

SERIES = tuple(f"#0404{i:02x}" for i in range(8))

_VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", PALE: "--pale"} | {
    c: f"--s{i}" for i, c in enumerate(SERIES)
}

DASHES = ("-", "--", ":", "-.")
HEAT_MAP_TICKS = "#6b7480"
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def _style(run: int) -> dict[str, Any]:
    """Colour and dash of the n-th run: 32 that differ."""
    return {"color": SERIES[run % len(SERIES)], "linestyle": DASHES[run // len(SERIES) % len(DASHES)]}


Box = tuple[float, float, float, float]
"""Left, bottom, width and height, as shares of a figure."""


def draw_chart(
    caption: str,
    draw: Callable[[Axes], None],
    *,
    xlabel: str = "epoch",
    size: tuple[float, float] = (4.6, 2.8),
    box: Box = (0.125, 0.175, 0.86, 0.705),
) -> tuple[str, Markup]:
    """Draws one small chart and returns its caption and inline SVG that takes its colours from the page.

    Args:
        caption: What it shows.
        draw: Draws into the axes.
        xlabel: Below them.
        size: Of the figure, in inches.
        box: Of the axes in it.
    """
    rc: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": caption,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.parse_math": False,  # names of classes may hold a $
    }
    with matplotlib.rc_context(rc):
        figure = Figure(figsize=size)
        figure.patch.set_alpha(0)
        axes = figure.add_axes(box)
        axes.patch.set_alpha(0)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=SOFT)
        axes.tick_params(color=SOFT, labelcolor=SOFT, length=3)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(xlabel, color=SOFT)
        draw(axes)
        text = io.StringIO()
        with warnings.catch_warnings():
            # text stays text in SVG: the reader's fonts draw what the one that measures it here lacks
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(text, format="svg", metadata=NO_METADATA)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups, and several charts share a page
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return caption, Markup(svg)  # drawn above, and matplotlib escapes its labels


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    known = thinned([(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(b)])  # not every epoch is validated
    x, y = [a for a, _ in known], [b for _, b in known]
    # Few points need markers: a single epoch would otherwise draw nothing.
    axes.plot(x, y, marker="o" if len(is_known(y)) <= 12 else None, markersize=3.5, linewidth=1.6, **style)


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """The points, or of more than `most` the lowest and highest of each stretch, the first and the last."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def draw_legend(axes: Axes, **options: Any) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, labelcolor=INK, borderaxespad=0.2, **options
    )


def _focus(axes: Axes, epochs: Sequence[Sequence[float]], series: Sequence[Sequence[float]]) -> None:
    """Starts the axis of percentages below the last three quarters of the epochs: the first rise would flatten the rest.

    The last value of every line stays in view, however short its run.
    """
    quarter = max((e for run in epochs for e in run), default=0.0) / 4
    shown = [v for x, y in zip(epochs, series, strict=True) for e, v in zip(x, y, strict=True) if e > quarter]
    shown = is_known([*shown, *(v for y in series for v in is_known(y)[-1:])])
    if shown:
        margin = 0.06 * max(max(shown) - min(shown), 0.5)
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    keep_percent(axes)


def keep_percent(axes: Axes) -> None:
    """Ends an axis of percentages where they end: a margin, or an interval, would number some below 0 or above 100.

    What is left beyond is for the mark of a point at the end, and too little for a tick.
    """
    low, high = axes.get_ylim()
    mark = 0.03 * (min(high, 100.0) - max(low, 0.0))
    axes.set_ylim(max(low, -mark), min(high, 100.0 + mark))


def run_charts(run: Run) -> list[tuple[str, Markup]]:
    metrics = run.metrics
    epochs = metrics["epoch"]
    percents = [metric for metric in METRICS if metric.percent and (metric.column != "val_top5" or many(run))]
    others = [metric for metric in METRICS if not metric.percent and metric.column != "val_loss"]

    def loss(axes: Axes) -> None:
        _line(axes, epochs, metrics["train_loss"], label="training", color=SERIES[1])
        _line(axes, epochs, metrics["val_loss"], label="validation", color=SERIES[0])
        draw_legend(axes)

    def accuracy(axes: Axes) -> None:
        for metric, color in zip(percents, itertools.cycle((SERIES[0], *SERIES[2:])), strict=False):
            _line(axes, epochs, metrics[metric.column], label=metric.label, color=color)
        _focus(axes, [epochs] * len(percents), [metrics[metric.column] for metric in percents])
        draw_legend(axes, handlelength=1.2, columnspacing=1.2)

    def alone(metric: Metric) -> Callable[[Axes], None]:
        return lambda axes: _line(axes, epochs, metrics[metric.column], color=SERIES[0])

    def learning_rate(axes: Axes) -> None:
        _line(axes, epochs, metrics["lr"], color=SERIES[0])
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
        axes.yaxis.get_offset_text().set_color(SOFT)

    def drop_path_rate(axes: Axes) -> None:
        _line(axes, epochs, metrics["drop_path_rate"], color=SERIES[0])
        axes.set_ylim(0, max([0.1, *(1.1 * r for r in is_known(metrics["drop_path_rate"]))]))

    return [
        draw_chart("Loss", loss),
        draw_chart("Validation accuracy in % (the axis may leave out the first rise)", accuracy),
        *(
            draw_chart(f"Validation: {metric.label}", alone(metric))
            for metric in others
            if is_known(metrics[metric.column])
        ),
        draw_chart("Learning rate", learning_rate),
        draw_chart("Drop-path rate: the largest over blocks, after the schedule", drop_path_rate),
    ]


def rates_chart(blocks: Sequence[Block]) -> tuple[str, Markup]:
    def draw(axes: Axes) -> None:
        x = range(len(blocks))
        axes.bar(x, [b.nominal for b in blocks], width=0.86, color=PALE, label="nominal")
        axes.bar(x, [b.realised for b in blocks], width=0.44, color=SERIES[0], label="realised")
        axes.set_xlim(-0.7, len(blocks) - 0.3)
        axes.xaxis.set_major_formatter(lambda i, _: blocks[int(i)].block if 0 <= i < len(blocks) else "")
        axes.set_ylim(0, max([0.1, *(1.1 * r for b in blocks for r in is_known((b.nominal, b.realised)))]))
        draw_legend(axes)

    return draw_chart("Drop-path rate of each block", draw, xlabel="block, first to last")


def rates_over_time_chart(run: Run) -> tuple[str, Markup] | None:
    """Drop-path rate asked for and realised, by epoch; `None` where rates.csv holds nothing."""
    rates = run.rates
    if not is_known(each.realised for each in rates):
        return None
    epochs = [each.epoch for each in rates]

    def draw(axes: Axes) -> None:
        _line(axes, epochs, [each.nominal for each in rates], label="nominal", color=SERIES[1], linestyle="--")
        _line(axes, epochs, [each.realised for each in rates], label="realised", color=SERIES[0])
        highest = max(is_known(value for each in rates for value in (each.nominal, each.realised)))
        axes.set_ylim(0, max(0.05, 1.1 * highest))
        draw_legend(axes)

    return draw_chart("Drop-path rate by epoch, on average over branches", draw)


def schedule_chart(run: Run) -> tuple[str, Markup] | None:
    """Rate of each block over the whole run as config.yaml plans it; `None` where no schedule changes it."""
    rates = [b.nominal for b in run.blocks]
    try:
        section = DropPathSection.model_validate(run.setting("drop_path"))
        epochs = int(run.setting("optim", "epochs"))
    except (ValidationError, TypeError, ValueError):
        return None
    if not run.epochs or not run.metrics["epoch"][-1] > 0 or len(is_known(rates)) < max(len(rates), 1):
        return None
    per_epoch = round(run.metrics["step"][-1] / run.metrics["epoch"][-1])
    if section.schedule.kind == "constant" or per_epoch < 1:
        return None
    schedule = build_schedule(section, per_epoch, epochs)

    def draw(axes: Axes) -> None:
        draw_heat_map(axes, rates, schedule, per_epoch * epochs)
        axes.grid(visible=False)
        axes.tick_params(colors=SOFT, labelsize=10)
        axes.get_xticklabels()[-1].set_horizontalalignment("right")  # it would stand over the edge

    highest = max(rates) * max(schedule(step) for step in range(per_epoch * epochs))
    caption = f"Drop-path rate of each block as planned: from 0 (pale) to {highest:.3g} (dark)"
    return draw_chart(caption, draw, xlabel="optimizer step")


def compare_charts(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    def overlay(column: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for i, run in enumerate(runs):
                _line(axes, run.metrics["epoch"], run.metrics[column], **_style(i))
            if column == "val_top1":
                _focus(axes, [run.metrics["epoch"] for run in runs], [run.metrics[column] for run in runs])

        return draw

    return [
        draw_chart("Validation top-1 in % (the axis may leave out the first rise)", overlay("val_top1")),
        draw_chart("Validation loss", overlay("val_loss")),
    ]


def draw_heat_map(axes: Axes, rates: Sequence[float], schedule: DropPathSchedule, steps: int) -> AxesImage:
    """Drop-path rate of each block (upwards) at each optimizer step (to the right), as colour from 0 to 1.

    Args:
        axes: Where to draw.
        rates: Nominal rate of each block, in order.
        schedule: Multiplier of all rates over steps.
        steps: Optimizer steps of the run.
    """
    shown = sorted({round(i * (steps - 1) / 199) for i in range(200)})
    values = np.outer(rates, [schedule(step) for step in shown])
    image = axes.imshow(
        values,
        aspect="auto",
        origin="lower",
        cmap="Blues",
        vmin=0.0,
        vmax=max(rates) or 1.0,
        extent=(0, steps, 0.5, len(rates) + 0.5),
        interpolation="nearest",
    )
    axes.set_yticks([1, len(rates)], ["first", "last"])
    axes.tick_params(length=0, labelsize=8, colors=HEAT_MAP_TICKS)
    axes.set_xticks([0, steps // 2, steps])
    axes.set_xlim(0, steps)
    for side in axes.spines.values():
        side.set_visible(False)
    return image
