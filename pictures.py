"""Draws every picture of README and docs, in one palette: `python pictures.py`."""

import io
import re
from collections.abc import Sequence
from typing import Any

from models.config import MetaFormerConfig

_COLOURS = (
    "#2f6db5",
    "#d9661f",
    "#3a8f5d",
    "#8a5fb0",
    "#b8860b",
    "#c0392b",
    "#16808a",
    "#6b7480",
    "#a0527a",
    "#556b2f",
)

_MARKERS = "osD^vPX*<>"
_ZOO_INK, _ZOO_GREY, _ZOO_LINE = "#1b1f24", "#6b7480", "#e3e7ec"


def families(configs: Sequence[MetaFormerConfig]) -> dict[str, list[tuple[float, float]]]:
    """Published (MACs, top-1) by family, the name up to its first `_`: each in order of cost, the best family first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for config in configs:
        facts = config.published
        if facts and facts.macs is not None and facts.top1 is not None:
            found.setdefault(config.name.partition("_")[0], []).append((facts.macs, facts.top1))
    by_top1 = sorted(found.items(), key=lambda item: (-max(top1 for _, top1 in item[1]), item[0]))
    return {family: sorted(points) for family, points in by_top1}


def draw_zoo(configs: Sequence[MetaFormerConfig]) -> str:
    """SVG of published top-1 over multiply-accumulates, a line per family; the same bytes each time."""
    # here, because it takes as long to import as all the counting
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    # Text as paths: a README is read on machines with other fonts. The salt and the missing date fix the bytes.
    rc: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "zoo", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(rc):
        figure = Figure(figsize=(9, 5.4))
        axes = figure.add_axes((0.075, 0.11, 0.755, 0.76))
        ends = []
        for number, (family, points) in enumerate(families(configs).items()):
            xs, ys = zip(*points, strict=True)
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            axes.plot(xs, ys, color=colour, marker=marker, markersize=5.5, linewidth=1.6, clip_on=False)
            ends.append((ys[-1], xs[-1], family, colour))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16, 32, 64, 128, 256]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color=_ZOO_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=9, labelcolor=_ZOO_GREY)
        axes.set_xlabel(
            "multiply-accumulates per image in billions, as published (logarithmic)", fontsize=9, color=_ZOO_GREY
        )
        figure.text(
            0.02, 0.945, "The zoo: published ImageNet-1k top-1 in %", fontsize=13, fontweight="bold", color=_ZOO_INK
        )
        figure.text(
            0.02, 0.905, "trained on ImageNet-1k alone, at each model's own size; a line is a family, its marks are sizes",
            fontsize=9, color=_ZOO_GREY,
        )  # fmt: skip
        low, high = axes.get_ylim()
        gap, last = (high - low) / 26, high + 1.0
        for y, x, family, colour in sorted(ends, reverse=True):  # labels at the right edge, pushed apart
            place = min(y, last - gap)
            axes.annotate(
                family, (x, y), (1.015, (place - low) / (high - low)), textcoords="axes fraction", va="center",
                fontsize=9.5, color=colour, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5},
            )  # fmt: skip
            last = place
        axes.set_ylim(low, high)
        text = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(text, format="svg", metadata=nothing, facecolor="white")
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)
