"""The picture of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from torch import Tensor

from files.errors import Failure

MOST_NAMES = 40
"""Classes whose names stand at the axes; of more, numbers do."""

_MOST_COUNTS = 25  # classes whose counts stand in the cells
_FONT = "DejaVu Sans"


def draw_confusion(confusion: Tensor, names: Sequence[str], path: Path, *, title: str) -> None:
    """Draws a confusion matrix, its rows as shares of each label.

    Args:
        confusion: Counts (K, K), by label and prediction.
        names: Of the K classes. One that the font cannot draw stands as #i, of its place i from 0.
        path: A PNG.
        title: Above it.

    Raises:
        Failure: It could not be written.
    """
    counts = confusion.numpy()
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    number = len(names)
    labels = [_cut(name, 24) if _drawable(name) else f"#{place}" for place, name in enumerate(names)]
    longest = max(map(len, labels)) if number <= MOST_NAMES else 4
    cell = 0.42 if number <= _MOST_COUNTS else 0.25 if number <= MOST_NAMES else 8 / number
    side = max(2.4, cell * number)  # of the matrix, in inches
    margin = 0.7 + 0.085 * longest
    width, height = side + margin + 1.1, side + margin + 0.5
    rc: dict[Any, Any] = {"font.family": _FONT, "font.size": 9, "text.parse_math": False}  # names may hold a $
    with matplotlib.rc_context(rc):
        figure = Figure(figsize=(width, height), dpi=130)
        axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
        most = 1 if shares.max() > 0.5 else max(shares.max(), 0.01)  # few samples of many classes stay visible
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=most, interpolation="nearest")
        title = title if _drawable(title) else ascii(title)
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


def _drawable(text: str) -> bool:
    """Whether the font has all letters of a text: for others it would draw boxes."""
    return all(ord(letter) in _letters() or letter == "\n" for letter in text)


@cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont(_FONT)).get_charmap())


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
