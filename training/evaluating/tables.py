"""Predictions as a table, CSV or JSON, a row at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import IO, Literal, Protocol, get_args

from files.csv_rows import csv_row
from files.errors import one_line
from training.evaluating.prediction import Plan, Prediction

Format = Literal["table", "csv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)

_WIDEST_PATH, _WIDEST_CLASS = 60, 28


class Writer(Protocol):
    """Writes predictions as they come."""

    def row(self, prediction: Prediction) -> None:
        """One image."""
        ...

    def end(self) -> None:
        """What stands behind the last row; also called when a row could not be had."""
        ...


class TableWriter:
    """For people: a line per image."""

    def __init__(self, file: IO[str], plan: Plan) -> None:
        self.file = file
        self.path_width = min(_WIDEST_PATH, max(len("image"), *(len(one_line(path)) for path in plan.paths)))
        self.class_width = min(_WIDEST_CLASS, max(len(one_line(name)) for name in plan.class_names))
        heads = [f"{'class' if k == 0 else f'{k + 1}.':<{self.class_width}}  {'%':>5}" for k in range(plan.topk)]
        self._line("image", heads)

    def row(self, prediction: Prediction) -> None:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        self._line(
            one_line(prediction.path),
            [f"{self._class(name):<{self.class_width}}  {100 * value:>5.1f}" for name, value in pairs],
        )

    def end(self) -> None:
        pass

    def _class(self, name: str) -> str:
        return _cut(one_line(name), self.class_width)

    def _line(self, path: str, cells: Sequence[str]) -> None:
        self.file.write(f"{path:<{self.path_width}}  {'   '.join(cells)}".rstrip() + "\n")


class CsvWriter:
    """path, class_1, probability_1, class_2, ...: a row per image."""

    def __init__(self, file: IO[str], plan: Plan) -> None:
        self.file = file
        numbers = range(1, plan.topk + 1)
        file.write(csv_row(["path", *(f"{what}_{k}" for k in numbers for what in ("class", "probability"))]))

    def row(self, prediction: Prediction) -> None:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        cells = (cell for name, value in pairs for cell in (name, f"{value:.6g}"))
        self.file.write(csv_row([prediction.path, *cells]))

    def end(self) -> None:
        pass


class JsonWriter:
    """A list of {"path", "predictions": [{"class", "probability"}, ...]}, a line per image."""

    def __init__(self, file: IO[str], plan: Plan) -> None:
        self.file = file
        self.rows = 0

    def row(self, prediction: Prediction) -> None:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        told = [{"class": name, "probability": float(f"{value:.6g}")} for name, value in pairs]
        text = json.dumps({"path": prediction.path, "predictions": told}, ensure_ascii=False)
        self.file.write(("[\n" if not self.rows else ",\n") + text)
        self.rows += 1

    def end(self) -> None:
        self.file.write("\n]\n" if self.rows else "[]\n")


_WRITERS = {"table": TableWriter, "csv": CsvWriter, "json": JsonWriter}


def open_writer(fmt: Format, file: IO[str], plan: Plan) -> Writer:
    """A writer of that format, its header written."""
    return _WRITERS[fmt](file, plan)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
