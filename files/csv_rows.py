"""Rows of CSV files, which read back as they were whatever is in a cell."""

import csv
import io
from collections.abc import Iterable
from typing import Any


def csv_row(cells: Iterable[Any]) -> str:
    """A row as text, its line break with it.

    Python's writer quotes a carriage return in a cell only where rows end in one, and its reader ends a row there.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"
