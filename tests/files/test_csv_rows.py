"""Rows of CSV read back as they were."""

import csv
import io

from files.csv_rows import csv_row


def test_any_cell_reads_back() -> None:
    rows = [["a", "1", ""], ["a\rb", "a\nb", "a\r\nb"], ["\r\n", 'q"', "a,b"], ["\x1b[31m", "\u2028", " "]]
    text = "".join(map(csv_row, rows))
    assert list(csv.reader(io.StringIO(text, newline=""))) == rows


def test_a_plain_row_is_plain() -> None:
    assert csv_row(["a b", 1, 0.5]) == "a b,1,0.5\n"
