"""The picture of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from files.errors import Failure

MOST_NAMES = 40
"""Classes whose names stand at the axes; of more, numbers do."""

_MOST_COUNTS = 25  # classes whose counts stand in the cells


def draw_confusion(confusion: Tensor, names: Sequence[str], path: Path, *, title: str) -> None:
    """Draws a confusion matrix, its rows as shares of each label.

    Args:
        confusion: Counts (K, K), by label and prediction.
        names: Of the K classes.
        path: A PNG.
        title: Above it.

    Raises:
        Failure: It could not be written.
    """
    counts = confusion.numpy()
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    number = len(names)
    labels = [_cut(name, 24) for name in names]
    longest = max(map(len, labels)) if number <= MOST_NAMES else 4
    cell = 0.42 if number <= _MOST_COUNTS else 0.25 if number <= MOST_NAMES else 8 / number
    side = max(2.4, cell * number)  # of the matrix, in inches
    margin = 0.7 + 0.085 * longest
    width, height = side + margin + 1.1, side + margin + 0.5
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(width, height), dpi=130)
        axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
        most = 1 if shares.max() > 0.5 else max(shares.max(), 0.01)  # few samples of many classes stay visible
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=most, interpolation="nearest")
        axes.set_title(_cut(title, int(14 * side)), fontsize=10, loc="left")
        axes.set_xlabel("prediction")
        axes.set_ylabel("label")
        if number <= MOST_NAMES:
            axes.set_xticks(range(number), labels, rotation=0 if longest <= 3 else 90)
            axes.set_yticks(range(number), labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if number <= _MOST_COUNTS:
            size = 8 if counts.max() < 1000 else 6
            for i, j in zip(*np.nonzero(counts), strict=True):
                colour = "white" if shares[i, j] > 0.55 * most else "#1b1f24"
                axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", color=colour, fontsize=size)
        bar_axes = figure.add_axes(((margin + side + 0.15) / width, margin / height, 0.16 / width, side / height))
        bar = figure.colorbar(image, cax=bar_axes)
        bar.set_label("share of the label's samples")
        bar.outline.set_visible(False)  # type: ignore[operator]
        try:
            figure.savefig(path, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.12)
        except OSError as error:
            raise Failure(f"{path}: cannot be written: {error.strerror}") from None


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
