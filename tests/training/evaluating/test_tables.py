"""Predictions as a table, CSV and JSON."""

import csv
import io
import json

import pytest

from training.evaluating.prediction import Plan, Prediction
from training.evaluating.tables import Format, open_writer

ROWS = [
    Prediction("a/b, c.jpg", ["tench, Tinca tinca", "cat"], [0.75, 0.125]),
    Prediction("d\n.png", ["a class with a very long name indeed", "cat"], [1.0, 1.25e-9]),
]
PLAN = Plan([row.path for row in ROWS], ["cat", *(row.classes[0] for row in ROWS)], 2, [])


def written(fmt: Format, rows: list[Prediction]) -> str:
    file = io.StringIO()
    writer = open_writer(fmt, file, PLAN)
    for row in rows:
        writer.row(row)
    writer.end()
    return file.getvalue()


def test_a_table_has_a_line_per_image_and_its_columns_stand_below_each_other() -> None:
    head, first, second = written("table", ROWS).splitlines()
    assert head.index("class") == first.index("tench") == second.index("a class")
    assert head.index("2.") == first.index("cat") == second.index("cat")
    assert " 75.0" in first and " 12.5" in first and "100.0" in second and "…" in second
    assert second.startswith(r"d\n.png  "), "on one line"


def test_csv() -> None:
    head, first, second = csv.reader(io.StringIO(written("csv", ROWS)))
    assert head == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    assert first == ["a/b, c.jpg", "tench, Tinca tinca", "0.75", "cat", "0.125"]
    assert second[0] == "d\n.png" and float(second[4]) == 1.25e-9


@pytest.mark.parametrize("count", [0, 1, 2])
def test_json(count: int) -> None:
    found = json.loads(written("json", ROWS[:count]))
    assert [row["path"] for row in found] == [row.path for row in ROWS[:count]]
    for told, row in zip(found, ROWS, strict=False):
        pairs = zip(row.classes, row.probabilities, strict=True)
        assert told["predictions"] == [{"class": name, "probability": value} for name, value in pairs]


def test_names_of_classes_stay_on_one_line() -> None:
    file = io.StringIO()
    names = ["line\nbreak", "tab\there \u82b1"]
    open_writer("table", file, Plan(["a.png"], names, 2, [])).row(Prediction("a.png", names, [0.75, 0.25]))
    _, row = file.getvalue().splitlines()
    assert r" line\nbreak " in row and "tab\\there \u82b1 " in row, "as messages write them"
