"""Images and labels in a table: a CSV file of paths and class names for each part, also separated by tabs or semicolons."""

from __future__ import annotations

import csv
import itertools
import logging
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from files.errors import ConfigError, nearest
from files.words import counted
from training.data.names import Names
from training.data.source import Sources

if TYPE_CHECKING:
    from training.config import DataSection

logger = logging.getLogger(__name__)

# Where the config names no column: the first, or else the only one there is of the others.
PATH_COLUMNS = ("path", "filename", "file", "image", "filepath", "file_name", "image_path")
LABEL_COLUMNS = ("label", "class", "target", "category", "class_name", "labels")


# int() would take 1_2 for 12, and does not read thousands of digits.
_WHOLE = re.compile(r"[+-]?[0-9]{1,1000}")


class Row(NamedTuple):
    """A sample of a table.

    Attributes:
        path: As a name below the table's folder, where it lies there.
        label: The name of its class.
        line: The line it ends on.
        cell: The path as it is written.
    """

    path: str
    label: str
    line: int
    cell: str


@dataclass(frozen=True)
class Table:
    """A file that was read. A million rows are in columns: as objects they would take more memory than all else of the data.

    Attributes:
        file: Its path.
        folder: What its paths are relative to.
        columns: Names of the columns of paths and of labels.
        paths: Of each row, as `Row` has them.
        label_names: In the order in which they come first.
        labels: Of each row its label's place in `label_names`.
        rows: Reads it again.
    """

    file: Path
    folder: Path
    columns: tuple[str, str]
    paths: Names
    label_names: list[str]
    labels: array[int]
    rows: Callable[[], Iterator[Row]]

    def line(self, index: int) -> int:
        """The line that a row ends on: for messages, it is counted again."""
        return next(itertools.islice(self.rows(), index, None)).line


class CsvSource:
    """Image files that a table lists, in its order.

    Args:
        table: The rows.
        class_names: The classes in the order of their targets; all labels are among them.
    """

    def __init__(self, table: Table, class_names: list[str]) -> None:
        self.location = str(table.folder)
        self.class_names = class_names
        places = {name: place for place, name in enumerate(class_names)}
        target_of = [places[name] for name in table.label_names]
        self.paths = table.paths
        self.prefix = os.path.join(self.location, "")
        self.targets = [target_of[label] for label in table.labels]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index].removeprefix(self.prefix)

    def open(self, index: int) -> IO[bytes]:
        return open(os.path.join(self.location, self.paths[index]), "rb")


def class_names(data: DataSection) -> list[str]:
    """The labels of the training table, sorted; as numbers, where all are whole numbers.

    Raises:
        ConfigError: For a table that cannot be used.
    """
    return _classes(_table(data, "train_file"))


def sources(data: DataSection) -> Sources:
    """The images that the tables list; without `data.val_file`, a validation part is to be split off.

    Raises:
        ConfigError: For a table or a row that cannot be used, naming the line.
    """
    tables = {key: _table(data, key) for key in ("train_file", "val_file", "test_file") if getattr(data, key)}
    train = tables["train_file"]
    names = _classes(train)
    if len(names) < 2:
        raise ConfigError(f"data.train_file: '{train.file}' has one class, {names[0]!r}; at least two are needed")
    known = set(names)
    for key, table in tables.items():
        unknown = next((label for label in table.label_names if label not in known), None)
        if unknown is not None:
            line = table.line(table.labels.index(table.label_names.index(unknown)))
            raise ConfigError(
                f"data.{key}: '{table.file}', line {line}: label {unknown!r} is none of the training "
                f"table's {counted(len(names), 'class')}{nearest(unknown, names)}"
            )
        if data.on_error == "stop":
            _check_files(key, table)
    logger.info("table     paths in column %r, labels in column %r of '%s'", *train.columns, train.file)
    parts = {key: CsvSource(table, names) for key, table in tables.items()}
    _warn_of_shared(parts)
    return Sources(parts["train_file"], parts.get("val_file"), test=parts.get("test_file"))


def _table(data: DataSection, key: str) -> Table:
    """Reads a table.

    Raises:
        ConfigError: Naming the line.
    """
    file = Path(getattr(data, key)).expanduser()
    folder = file.parent if data.root is None else Path(data.root).expanduser()
    if not file.exists():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ConfigError(f"data.{key}: '{file}' does not exist{nearest(file.name, siblings)}")
    if not folder.is_dir():
        raise ConfigError(f"data.root: '{folder}' is no folder; the paths in '{file}' are relative to it")
    where = f"data.{key}: '{file}'"
    header, _ = next(_lines(file, where), ([], 0))
    if not header:
        raise ConfigError(f"{where} is empty; expected a line of column names, such as path,label")
    columns = (
        _column(header, "path_column", data.path_column, PATH_COLUMNS, where),
        _column(header, "label_column", data.label_column, LABEL_COLUMNS, where),
    )
    rows = partial(_rows, file, os.path.abspath(folder), header, columns, where)
    places: dict[str, int] = {}
    labels, hashes = array("i"), array("q")

    def paths() -> Iterator[str]:
        for path, label, *_ in rows():
            labels.append(places.setdefault(label, len(places)))
            hashes.append(hash(path))
            yield path

    try:
        names = Names(paths())
    except ConfigError:
        _check_labels(rows, hashes, labels, where)  # what stands in an earlier line is said first
        raise
    _check_labels(rows, hashes, labels, where)
    if not names:
        raise ConfigError(f"{where} has no rows below its column names")
    return Table(file, folder, columns, names, list(places), labels, rows)


def _rows(file: Path, folder: str, header: Sequence[str], columns: tuple[str, str], where: str) -> Iterator[Row]:
    """The rows of a table below its column names.

    Raises:
        ConfigError: Naming the line.
    """
    path_at, label_at = (header.index(column) for column in columns)
    prefix = os.path.join(folder, "")
    for cells, line in itertools.islice(_lines(file, where), 1, None):
        if len(cells) != len(header):
            raise ConfigError(
                f"{where}, line {line}: {counted(len(cells), 'cell')}, but {counted(len(header), 'column')} in the first "
                "line; quote what holds a separator"
            )
        cell, label = cells[path_at], cells[label_at]
        if not cell or not label:
            column = columns[1] if cell else columns[0]
            raise ConfigError(f"{where}, line {line}: column {column!r} is empty")
        path = os.path.normpath(cell).removeprefix(prefix).replace(os.sep, "/")
        yield Row(path, label, line, cell)


def _check_labels(rows: Callable[[], Iterator[Row]], hashes: Sequence[int], labels: Sequence[int], where: str) -> None:
    """Refuses a file that is listed under two labels.

    Args:
        rows: Reads the table again, where something is suspect.
        hashes: Of the path of each row: a dictionary of a million paths takes ten times the memory.
        labels: Of each row, as numbers.
        where: What messages call the table.
    """
    values, numbers = np.asarray(hashes, dtype=np.int64), np.asarray(labels, dtype=np.int32)
    order = np.argsort(values, kind="stable")
    values, numbers = values[order], numbers[order]
    suspects = set(values[1:][(values[1:] == values[:-1]) & (numbers[1:] != numbers[:-1])].tolist())
    if not suspects:
        return
    labelled: dict[str, Row] = {}
    for row in rows():
        if hash(row.path) not in suspects:
            continue
        first = labelled.setdefault(row.path, row)
        if first.label != row.label:
            raise ConfigError(
                f"{where}: {row.cell!r} has two labels, {first.label!r} in line {first.line} and {row.label!r} "
                f"in line {row.line}"
            )


def _lines(file: Path, where: str) -> Iterator[tuple[list[str], int]]:
    """Cells of each line that is not blank, without spaces around them, and the number of the line it ends on."""
    reader = None
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:  # spreadsheets put a mark in front
            first = next((line for line in text if line.strip()), "")
            text.seek(0)
            reader = csv.reader(text, delimiter=_separator(file, first), strict=True, skipinitialspace=True)
            for cells in reader:
                if "\0" in "".join(cells):
                    raise ConfigError(f"{where}, line {reader.line_num}: has a null character; is this a text file?")
                cells = [cell.strip() for cell in cells]
                if any(cells):
                    yield cells, reader.line_num
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not in UTF-8 (byte {error.start}); save it as CSV in UTF-8") from None
    except csv.Error as error:
        line = reader.line_num if reader is not None else 1
        raise ConfigError(f"{where}, line {line}: no valid CSV: {error}") from None
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None


def _separator(file: Path, first: str) -> str:
    if file.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    return next((mark for mark in ",;\t" if mark in first), ",")


def _column(header: Sequence[str], key: str, given: str | None, usual: Sequence[str], where: str) -> str:
    """The column that the config names, or a usual one."""
    twice = [name for name, count in Counter(header).items() if count > 1]
    there = ", ".join(repr(name) for name in header[:10]) + (" and more" if len(header) > 10 else "")
    if given is not None:
        candidates = [name for name in header if name == given]
        if not candidates:
            raise ConfigError(f"data.{key}: {where.partition(': ')[2]} has no column {given!r}{nearest(given, header)}")
    else:
        candidates = [name for word in usual for name in dict.fromkeys(header) if name.lower() == word]
        first = [name for name in candidates if name.lower() == usual[0]]
        candidates = [usual[0]] if usual[0] in first else first or candidates
        if len(candidates) != 1:
            which = f"several columns that may be meant, {', '.join(map(repr, candidates))}" if candidates else "none"
            raise ConfigError(
                f"{where}: expected a column {usual[0]!r}, found {which}; say which by data.{key}\ncolumns: {there}"
            )
    if candidates[0] in twice:
        raise ConfigError(f"{where} has two columns {candidates[0]!r}; rename one")
    return candidates[0]


def _classes(table: Table) -> list[str]:
    """The labels, sorted; as numbers where all are whole numbers."""
    labels = sorted(table.label_names)
    if not all(map(_WHOLE.fullmatch, labels)):
        return labels
    numbers = {label: int(label) for label in labels}
    shared = Counter(numbers.values())
    same = [label for label in labels if shared[numbers[label]] > 1]
    if same:
        raise ConfigError(
            f"data.train_file: '{table.file}': labels {same[0]!r} and {same[1]!r} are one number; write it in one way"
        )
    return sorted(labels, key=numbers.__getitem__)


def _check_files(key: str, table: Table) -> None:
    """Refuses a table that lists files that are not there, naming the first."""
    folder = str(table.folder)
    missing = [i for i, path in enumerate(table.paths) if not os.path.isfile(os.path.join(folder, path))]
    if not missing:
        return
    path, line = table.paths[missing[0]], table.line(missing[0])
    place = table.folder / path
    what = "is a folder" if place.is_dir() else "does not exist"
    advice = "paths are relative to the table's folder, or to data.root"
    if "\\" in path and os.sep == "/":
        advice = "parts of a path are separated by / here, not by \\"
    more = f" (and {len(missing) - 1:,} more of {len(table.paths):,} rows)" if len(missing) > 1 else ""
    raise ConfigError(f"data.{key}: '{table.file}', line {line}: {str(place)!r} {what}{more}\n{advice}")


def _warn_of_shared(parts: dict[str, CsvSource]) -> None:
    """Says it where a training image is validated or tested on: figures are then too good."""
    train = parts["train_file"]
    for key, part in parts.items():
        if part is train:
            continue
        theirs = Counter(_places(part, train))  # fewer than for training
        shared = sum(theirs.pop(path, 0) for path in _places(train, part))
        if shared:
            logger.warning("warning: data.%s: %s of its %s images are training images", key, shared, len(part))


def _places(part: CsvSource, other: CsvSource) -> Iterable[str]:
    """Where the images lie; the paths alone, where both parts have them relative to one folder."""
    if part.location == other.location:
        return part.paths
    return (os.path.join(part.location, path) for path in part.paths)
