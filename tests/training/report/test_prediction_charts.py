"""Confusion matrices of few and many classes, and the reliability diagram."""

import re

import pytest

from training.report.prediction_charts import calibration_caption, calibration_chart, confusion_chart
from training.report.predictions import Evidence

Pairs = list[tuple[int, int, int]]
Bins = list[tuple[float, float, float]]


def evidence(classes: list[str], pairs: Pairs, bins: Bins | None = None) -> Evidence:
    samples = sum(count for *_, count in pairs)
    return Evidence(epoch=1, samples=samples, classes=classes, pairs=pairs, bins=bins or [])


def words(svg: str) -> list[str]:
    return re.findall(r">([^<>\n]+)</text>", svg)


def test_few_classes_have_their_names_and_counts() -> None:
    chart = confusion_chart(
        evidence(["cat", "dog", "a very long name of a class"], [(0, 0, 71), (0, 1, 12), (1, 1, 80), (2, 2, 9)])
    )
    assert chart is not None
    caption, svg = chart
    assert "172 validation images" in caption
    told = words(svg)
    assert told.count("cat") == told.count("dog") == told.count("a very long n\u2026") == 2, "at both axes"
    assert {"71", "12", "80", "9", "true class", "predicted class"} <= set(told)
    assert svg.count("var(--s0)") == 3 and svg.count("var(--s1)") == 1, "three right, one mistaken"


def test_names_are_shown_as_they_are() -> None:
    chart = confusion_chart(evidence(["<b>$x_1$", "b&c"], [(0, 0, 1), (1, 1, 1)]))
    assert chart is not None and "<b>" not in chart[1] and {"&lt;b&gt;$x_1$", "b&amp;c"} <= set(words(chart[1]))


@pytest.mark.parametrize("number", [21, 100, 101, 1000])
def test_many_classes_are_a_picture_without_names(number: int) -> None:
    names = [f"class {i}" for i in range(number)]
    pairs = [(i, i, 9) for i in range(number)] + [(i, (7 * i + 1) % number, 1) for i in range(number)]
    chart = confusion_chart(evidence(names, pairs))
    assert chart is not None
    caption, svg = chart
    assert "class 3" not in svg and svg.count("<image") == 1 and len(svg) < 100_000
    assert f"{number:,} classes" in caption and (("a cell is" in caption) == (number > 100))


def test_nothing_to_confuse() -> None:
    assert confusion_chart(evidence(["only"], [(0, 0, 4)])) is None
    assert confusion_chart(evidence(["a", "b"], [])) is None
    assert confusion_chart(evidence([str(i) for i in range(50)], [(i, i, 3) for i in range(50)])) is not None, (
        "no mistake"
    )
    assert calibration_chart(evidence(["only"], [(0, 0, 4)], [(4, 4, 4)])) is None
    assert calibration_chart(evidence(["a", "b"], [(0, 0, 4)], [(0, 0, 0)])) is None


@pytest.mark.parametrize(
    ("hits", "how"),
    [
        (70, "surer than right; calibration error (ECE) 20.0"),
        (90, "about as sure as right"),
        (99, "less sure than right"),
    ],
)
def test_calibration_says_which_way(hits: int, how: str) -> None:
    told = evidence(["a", "b"], [(0, 0, hits), (0, 1, 100 - hits)], [(0.0, 0.0, 0.0)] * 13 + [(100.0, hits, 90.0)])
    assert how in calibration_caption(told)
    chart = calibration_chart(told)
    assert chart is not None and {"accuracy", "perfect", "share of images"} <= set(words(chart[1]))
