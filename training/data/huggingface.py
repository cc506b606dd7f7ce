"""Data sets of the package `datasets`: from the Hugging Face hub by name, or from a local folder.

Rows are read by their index, and pictures as the bytes that were stored: our own decoders see them, as those of any kind.
"""

from __future__ import annotations

import io
import logging
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from files.durable import nearest_beside
from files.errors import ConfigError, nearest
from training.data.source import Sources, name_below

if TYPE_CHECKING:
    from training.config import DataSection

VAL_SPLITS = ("validation", "val", "valid")


class HuggingFaceSource:
    """Rows of one split.

    Args:
        rows: A `datasets.Dataset` with the one column of images, which are not decoded.
        split: Its name.
        targets: Of each row.
        class_names: The classes.
        location: The folder, or the data set's name.
    """

    def __init__(self, rows: Any, *, split: str, targets: list[int], class_names: list[str], location: str) -> None:
        self.rows = rows
        (self.column,) = rows.column_names
        self.split = split
        self.targets = targets
        self.class_names = class_names
        self.location = location
        # a path may be stored in full, or without links, where the root is written otherwise
        self.roots = (location, os.path.abspath(location), os.path.realpath(location))
        # An Arrow array, no object per row: where the images were files, their paths.
        self.paths = _arrow(rows.flatten(), f"{self.column}.path")
        files = {os.path.basename(path.as_py() or "") for path in self.paths}
        self.named = len(files) == len(targets) and "" not in files

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """The path below the data's folder; else the file's name, where each row has its own; else the row's number."""
        path = self.paths[index].as_py() or ""
        for root in self.roots:
            if (below := name_below(path, root)) != path:
                return below
        file = os.path.basename(path)
        return f"{self.split}/{file}" if self.named else "/".join(filter(None, (self.split, str(index), file)))

    def open(self, index: int) -> IO[bytes]:
        image = self.rows[index][self.column]
        if image is None:
            raise ValueError(f"row {index} has no image")
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        return open(image["path"], "rb")


def class_names(data: DataSection) -> list[str]:
    """The names of the label's classes; of a column of other values, the sorted values.

    Raises:
        ConfigError: As of `sources`.
    """
    splits = _load(data)
    train, _ = _parts(splits, data)
    return _classes(splits[train], train, _label_column(splits[train], data))


def sources(data: DataSection) -> Sources:
    """The splits for training and validation, and the one named `test`.

    Raises:
        ConfigError: For data that cannot be had, splits and columns that are not there, images and labels that are none.
    """
    splits = _load(data)
    train, val = _parts(splits, data)
    image, label = _image_column(splits[train], data), _label_column(splits[train], data)
    names = _classes(splits[train], train, label)
    if len(names) < 2:
        raise ConfigError(f"data.label_column: {label!r} has one class, {names[0]!r}; at least two are needed")
    left_out = [f"split {name}" for name in splits if name not in (train, val, "test")]

    def source(split: str, targets: list[int]) -> HuggingFaceSource:
        rows = _undecoded(splits[split], image, split)
        return HuggingFaceSource(rows, split=split, targets=targets, class_names=names, location=_location(data))

    def targets(split: str) -> list[int] | ConfigError:
        try:
            return _targets(splits[split], split, label, names)
        except ConfigError as error:
            return error

    found: dict[str, HuggingFaceSource] = {}
    for split in dict.fromkeys(filter(None, (train, val, "test"))):
        if split not in splits:
            continue
        its = targets(split)
        if isinstance(its, ConfigError):
            if split in (train, val):
                raise its
            left_out.append("split test (without labels)")
        else:
            found[split] = source(split, its)
    test = found.get("test") if "test" not in (train, val) else None
    return Sources(found[train], found.get(val or ""), ", ".join(left_out), test)


def _location(data: DataSection) -> str:
    return str(Path(data.root).expanduser()) if data.root else data.dataset


def _load(data: DataSection) -> dict[str, Any]:
    """The splits by name.

    Raises:
        ConfigError: In a line or two, whatever `datasets` says.
    """
    _, _, name = data.dataset.partition("/")
    if name and data.root is not None:
        raise ConfigError(
            f"data.root: has no effect with dataset {data.dataset!r}, which is one of the hub; for the folder, "
            "say data.dataset=huggingface"
        )
    if not name and data.root is None:
        raise ConfigError(
            "data.root: dataset 'huggingface' needs a root, or the name of a data set on the hub, for example "
            "data.dataset=huggingface/food101"
        )
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.dataset: {data.dataset!r} needs the package datasets: pip install 'drop-path-zoo[data]'"
        ) from error
    root = Path(data.root).expanduser() if data.root is not None else None
    if root is not None and not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise ConfigError(f"data.root: '{root}' {what}{nearest_beside(root)}")
    if root is not None and (left := data.config_name) is not None and _is_saved(root):
        raise ConfigError(f"data.config_name: {left!r} has no effect with a folder of save_to_disk; leave it out")
    chatter = logging.getLogger("huggingface_hub.utils._http")  # ten lines on retries, before the error says it in one
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        if root is not None and _is_saved(root):
            loaded = datasets.load_from_disk(str(root))
        else:
            loaded = datasets.load_dataset(str(root) if root is not None else name, data.config_name)
    except Exception as error:  # of a dozen libraries: no connection, no such name, no such config, damaged files
        key = "data.root" if root is not None else "data.dataset"
        text = textwrap.shorten(" ".join(str(error).split()), 300) or type(error).__name__
        if isinstance(error, IndexError):  # all that load_from_disk says of it
            text = "has a split no rows?"
        where = f"'{root}'" if root is not None else repr(data.dataset)
        raise ConfigError(f"{key}: {where} cannot be loaded: {text}") from error
    finally:
        chatter.setLevel(level)
    if isinstance(loaded, datasets.Dataset):
        return {data.train_split or "train": loaded}
    return {str(name): rows for name, rows in loaded.items()}


def _is_saved(root: Path) -> bool:
    """Whether a folder is one that `save_to_disk` has written."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _parts(splits: Mapping[str, Any], data: DataSection) -> tuple[str, str | None]:
    """The names of the splits to train and to validate on; the second is None where there is none."""
    train = data.train_split or "train"
    val = data.val_split or next((name for name in VAL_SPLITS if name in splits), None)
    for key, split in (("train_split", train), ("val_split", val)):
        if split is not None and split not in splits:
            there = ", ".join(map(repr, splits))
            raise ConfigError(
                f"data.{key}: {_location(data)!r} has no split {split!r}{nearest(split, splits)}\nsplits there: {there}"
            )
    if train == val:
        raise ConfigError(f"data.val_split: {val!r} is the split to train on")
    return train, val


def _columns(rows: Any) -> str:
    """The columns and what they hold, in words."""
    shown = [f"{name} ({_kind(feature)})" for name, feature in rows.features.items()]
    return "columns: " + ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _kind(feature: Any) -> str:
    dtype = getattr(feature, "dtype", None)
    return str(dtype) if type(feature).__name__ == "Value" else type(feature).__name__


def _given(column: str, key: str, rows: Any) -> Any:
    if column not in rows.features:
        raise ConfigError(
            f"data.{key}: there is no column {column!r}{nearest(column, rows.features)}\n{_columns(rows)}"
        )
    return rows.features[column]


def _is_image(feature: Any) -> bool:
    """Whether it is a column of images, or of encoded ones that another tool than `datasets` has written."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image" or _kind(feature) in ("binary", "large_binary")


def _image_column(rows: Any, data: DataSection) -> str:
    if data.image_column is not None:
        if not _is_image(_given(data.image_column, "image_column", rows)):
            raise ConfigError(f"data.image_column: {data.image_column!r} is no column of images\n{_columns(rows)}")
        return data.image_column
    images = [name for name, feature in rows.features.items() if type(feature).__name__ == "Image"]
    if len(images) != 1:
        what = f"{len(images)} columns of images" if images else "no column of images"
        raise ConfigError(f"data.image_column: the data have {what}; say which to use\n{_columns(rows)}")
    return images[0]


def _label_column(rows: Any, data: DataSection) -> str:
    if data.label_column is not None:
        feature = _given(data.label_column, "label_column", rows)
        if not _is_label(feature):
            raise ConfigError(
                f"data.label_column: {data.label_column!r} holds neither classes nor text nor whole numbers\n"
                f"{_columns(rows)}"
            )
        return data.label_column
    labels = [name for name, feature in rows.features.items() if type(feature).__name__ == "ClassLabel"]
    if not labels and _is_label(rows.features.get("label")):
        return "label"
    if len(labels) != 1:
        what = f"{len(labels)} columns of classes" if labels else "no column of classes"
        raise ConfigError(f"data.label_column: the data have {what}; say which to use\n{_columns(rows)}")
    return labels[0]


def _is_label(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel" or _kind(feature).startswith(
        ("string", "large_string", "int", "uint")
    )


def _values(rows: Any, column: str) -> list[Any]:
    return _arrow(rows, column).to_pylist()


def _arrow(rows: Any, column: str) -> Any:
    """A column as an Arrow array in memory."""
    return rows.select_columns([column]).with_format("arrow")[:].column(column)


def _classes(rows: Any, split: str, column: str) -> list[str]:
    """The classes of the training rows: those the column names, or else its values, sorted."""
    feature = rows.features[column]
    if type(feature).__name__ == "ClassLabel":
        return list(feature.names)
    values = _values(rows, column)
    _check_present(values, split, column)
    return [str(value) for value in sorted(set(values))]


def _check_present(values: Sequence[Any], split: str, column: str) -> None:
    wrong = [row for row, value in enumerate(values) if value is None or value == "" or value == -1]
    if wrong:
        more = f" (and {len(wrong) - 1:,} more of {len(values):,} rows)" if len(wrong) > 1 else ""
        raise ConfigError(
            f"data.label_column: row {wrong[0]} of split {split!r} has no label, {column} is {values[wrong[0]]!r}{more}"
        )


def _targets(rows: Any, split: str, column: str, names: list[str]) -> list[int]:
    """Of each row, its class's place in the names.

    Raises:
        ConfigError: For a row without a label or with another.
    """
    feature = _given(column, "label_column", rows)
    values = _values(rows, column)
    _check_present(values, split, column)
    if type(feature).__name__ == "ClassLabel":
        if list(feature.names) != names:
            raise ConfigError(f"data.label_column: the classes of {column!r} differ between the splits")
        places: dict[Any, int] = {place: place for place in range(len(names))}
        known = f"from 0 to {len(names) - 1}"
    else:
        places = {name: place for place, name in enumerate(names)}
        values = [str(value) for value in values]
        known = f"one of the {len(names):,} of the training rows"
    for row, value in enumerate(values):
        if value not in places:
            raise ConfigError(
                f"data.label_column: row {row} of split {split!r} has the label {value!r}, expected {known}"
                f"{nearest(value, names) if isinstance(value, str) else ''}"
            )
    return [places[value] for value in values]


def _undecoded(rows: Any, column: str, split: str) -> Any:
    """The one column of images, as stored bytes and paths."""
    import datasets

    if not _is_image(_given(column, "image_column", rows)):
        raise ConfigError(f"data.image_column: {column!r} of split {split!r} is no column of images\n{_columns(rows)}")
    return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
