"""A report's charts of predictions: which class is taken for which, and whether confidence can be believed."""

import math

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from training.report.charts import INK, LINE, PALE, SERIES, SOFT, Box, draw_chart, draw_legend
from training.report.predictions import Evidence

MOST_NAMES = 20
"""Classes whose names stand at the axes of a confusion matrix; of more, their numbers do."""

_MOST_COUNTS = 15  # classes whose counts stand in the cells
_MOST_CELLS = 100  # to a side; more classes are taken together
_LONGEST_NAME = 14

# From nothing to a blue that is told from black and from white: an image cannot follow the page's colours.
_SHADES = LinearSegmentedColormap.from_list("shades", [(0.27, 0.51, 0.93, 0.0), (0.27, 0.51, 0.93, 1.0)])


def confusion_chart(evidence: Evidence) -> tuple[str, Markup] | None:
    """The confusion matrix, each row as shares of its class; `None` where there is nothing to confuse."""
    classes = len(evidence.classes)
    if classes < 2 or not evidence.pairs:
        return None
    if classes <= MOST_NAMES:
        return _named_confusion(evidence)
    return _numbered_confusion(evidence)


def _named_confusion(evidence: Evidence) -> tuple[str, Markup]:
    number = len(evidence.classes)
    names = [_cut(name) for name in evidence.classes]
    longest = max(map(len, names))
    samples = dict.fromkeys(range(number), 0)
    for label, _, count in evidence.pairs:
        samples[label] += count
    size = min(9.0, 150 / number)  # of text, in points
    turned = longest > 2

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        for label, prediction, count in evidence.pairs:
            share = count / max(samples[label], 1)
            colour = SERIES[0] if label == prediction else SERIES[1]
            alpha = 0.08 + 0.5 * share if label == prediction else min(0.15 + 1.5 * share, 0.65)
            axes.add_patch(
                Rectangle((prediction - 0.5, label - 0.5), 1, 1, facecolor=colour, edgecolor="none", alpha=alpha)
            )
            if number <= _MOST_COUNTS and count:
                axes.text(prediction, label, str(count), ha="center", va="center", color=INK, fontsize=size)
        axes.set_xlim(-0.5, number - 0.5)
        axes.set_ylim(number - 0.5, -0.5)
        axes.set_xticks(range(number), names, rotation=90 if turned else 0, fontsize=size, color=SOFT)
        axes.set_yticks(range(number), names, fontsize=size, color=SOFT)
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        axes.set_ylabel("true class", color=SOFT)

    margin = 0.085 * size / 9 * longest + 0.42  # in inches
    below = margin if turned else 0.55
    width, height = 4.6, 4.6 - margin + below
    box: Box = (margin / width, below / height, 1 - (margin + 0.05) / width, 1 - (below + 0.05) / height)
    caption = f"Confusion matrix of {evidence.samples:,} validation images: right in blue, mistaken in orange"
    return draw_chart(caption, draw, xlabel="predicted class", size=(width, height), box=box)


def _numbered_confusion(evidence: Evidence) -> tuple[str, Markup]:
    """Mistakes of many classes: as shares of each class's samples, neighbouring classes taken together where they must."""
    number = len(evidence.classes)
    size = -(-number // _MOST_CELLS)  # classes to a cell
    cells = -(-number // size)
    wrong, samples = np.zeros((cells, cells)), np.zeros(cells)
    for label, prediction, count in evidence.pairs:
        samples[label // size] += count
        if label != prediction:
            wrong[label // size, prediction // size] += count
    shares = wrong / np.maximum(samples, 1)[:, None]

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        most = (
            float(np.quantile(shares[shares > 0], 0.98)) if shares.any() else 1.0
        )  # a single cell would pale the rest
        side = cells * size
        axes.imshow(
            shares, cmap=_SHADES, vmin=0, vmax=most, extent=(0, side, side, 0), aspect="auto", interpolation="nearest"
        )
        axes.spines[:].set(visible=True, color=LINE)
        axes.set_xlim(0, number)
        axes.set_ylim(number, 0)
        axes.set_ylabel("true class", color=SOFT)

    together = f"; a cell is {size} classes" if size > 1 else ""
    caption = f"Where the mistakes of {number:,} classes fall, by their numbers{together}: the darker, the more"
    box: Box = (0.155, 0.12, 0.82, 0.86)
    return draw_chart(caption, draw, xlabel="predicted class", size=(4.6, 4.4), box=box)


def calibration_chart(evidence: Evidence) -> tuple[str, Markup] | None:
    """The reliability diagram: accuracy over confidence; `None` of a single class, or where nothing is finite."""
    total = sum(samples for samples, _, _ in evidence.bins)
    if len(evidence.classes) < 2 or math.isnan(evidence.calibration()[0]):
        return None
    number = len(evidence.bins)
    filled = [(i, each) for i, each in enumerate(evidence.bins) if each[0]]

    def draw(axes: Axes) -> None:
        middles = [100 * (i + 0.5) / number for i, _ in filled]
        shares = [100 * samples / total for _, (samples, _, _) in filled]
        axes.bar(middles, shares, width=92 / number, color=PALE, label="share of images")
        axes.plot([0, 100], [0, 100], color=SOFT, linewidth=1, linestyle="--", label="perfect")
        sure = [100 * confidence / samples for _, (samples, _, confidence) in filled]
        right = [100 * hits / samples for _, (samples, hits, _) in filled]
        axes.plot(sure, right, color=SERIES[0], marker="o", markersize=4, linewidth=1.4, label="accuracy")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 104)
        draw_legend(axes, handlelength=1.4, columnspacing=1.2)

    return draw_chart(calibration_caption(evidence), draw, xlabel="confidence of the prediction in %")


def calibration_caption(evidence: Evidence) -> str:
    """What the reliability diagram says."""
    ece, confidence, accuracy = evidence.calibration()
    gap = confidence - accuracy
    how = "about as sure as right" if abs(gap) < 1 else "surer than right" if gap > 0 else "less sure than right"
    return (
        f"Calibration in %: on average {confidence:.1f} sure and {accuracy:.1f} right, {how}; "
        f"calibration error (ECE) {ece:.1f}"
    )


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\u2026"
