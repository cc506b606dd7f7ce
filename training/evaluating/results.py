"""What an evaluation leaves: lines for people, a row in a table of results, a folder with the details."""

from __future__ import annotations

import csv
import datetime
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from files.csv_rows import csv_row
from files.durable import save_text
from files.errors import ConfigError, Failure
from files.outputs import Kept, refuse_overwriting
from files.strict_json import json_text
from files.words import counted
from training.evaluating.corruptions import Corruption
from training.evaluating.validation import Evaluation, Request
from training.metrics import evaluation_metrics

# In metrics.csv and the line of an epoch a shorter name serves.
_RENAMED = {"balanced": "balanced_accuracy"}

_TIMMS = ("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation")
_MEASURED = [_RENAMED.get(m.column, m.column) for m in evaluation_metrics()[0] if m.column not in ("top1", "top5")]

COLUMNS: tuple[str, ...] = (
    *_TIMMS, *_MEASURED, "samples", "samples_per_second", "weights", "dataset", "split", "flip", "corruption", "precision"
)  # fmt: skip
"""Of the table of results: timm's, then ours."""

# What makes two rows the same evaluation, so that the later one takes the place of the earlier.
_KEY = ("model", "img_size", "crop_pct", "weights", "dataset", "split", "flip", "corruption", "precision")

MOST_CLASSES_IN_PICTURE = 1000

DETAILS = ("metrics.json", "per_class.csv", "mistakes.csv", "confusion.csv", "confusion.png")
"""Files of an evaluation's folder."""


def result_row(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as a row of the table."""
    spec, metrics = evaluation.spec, evaluation.metrics
    height, width = spec.input_size[1:]
    values = {_RENAMED.get(key, key): value for key, value in metrics.items()}
    return {
        "model": evaluation.subject.text,
        "top1": round(values["top1"], 4),
        "top1_err": round(100 - values["top1"], 4),
        "top5": round(values["top5"], 4),
        "top5_err": round(100 - values["top5"], 4),
        "param_count": round(evaluation.parameters / 1e6, 2),
        "img_size": width if height == width else f"{height}x{width}",
        "crop_pct": round(spec.crop_pct, 4),
        "interpolation": spec.interpolation,
        **{key: round(values[key], 6) for key in _MEASURED},
        "samples": evaluation.samples,
        "samples_per_second": round(evaluation.samples / evaluation.seconds, 2),
        "weights": evaluation.weights,
        "dataset": evaluation.data.dataset,
        "split": evaluation.part.name,
        "flip": evaluation.flip,
        "corruption": "" if evaluation.corruption is None else str(evaluation.corruption),
        "precision": evaluation.precision,
    }


def describe(evaluation: Evaluation) -> str:
    """An evaluation in a few lines."""
    spec, subject = evaluation.spec, evaluation.subject
    size = " x ".join(map(str, spec.input_size))
    settings = [f"{size}, crop {spec.crop_pct:g}, {spec.interpolation}"]
    settings += ["with mirror images (mean of probabilities)"] if evaluation.flip else []
    settings += [f"corrupted by {evaluation.corruption}"] if evaluation.corruption is not None else []
    where = f" in {evaluation.part.source.location}" if evaluation.part.source.location else ""
    told = [metric.text(evaluation.metrics[metric.column]) for metric in evaluation_metrics()[0]]
    lines = [
        f"{subject.text}: {evaluation.weights}, {evaluation.parameters / 1e6:.2f} M parameters",
        f"  data      {evaluation.data.dataset}, {evaluation.part.name}{where}: {counted(evaluation.samples, 'image')}, "
        f"{counted(len(evaluation.part.class_names), 'class')}",
        f"  input     {'; '.join(settings)}; {evaluation.precision} on {evaluation.device}",
        f"  result    {'  '.join(re.sub(' +', ' ', text) for text in told)}",
        f"  speed     {evaluation.samples / evaluation.seconds:,.0f} images/s, reading included",
    ]
    lines += [f"  note      {note}" for note in evaluation.notes]
    if evaluation.skipped:
        lines.append(f"  skipped   {counted(evaluation.skipped, 'image')} that cannot be read, left out of all figures")
    return "\n".join(lines)


# ---- the table of results -----------------------------------------------------------------------------------------


class ResultsFile:
    """A CSV of evaluations, best first, as timm writes it with further columns; earlier rows stay.

    Args:
        path: The file; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, kept: Sequence[Kept] = ()) -> None:
        """Finds out now whether rows can be added.

        Args:
            kept: What it must not be.

        Raises:
            ConfigError: It cannot be written, or holds something else.
        """
        check_writable(self.path, "--results")
        refuse_overwriting(f"--results {self.path}", self.path, kept)
        self._rows()

    def add(self, evaluation: Evaluation) -> None:
        """Adds a row, or replaces that of the same evaluation; the file is whole at any time.

        Raises:
            Failure: It cannot be written any more; its old content is untouched.
        """
        new = {key: str(value) for key, value in result_row(evaluation).items()}
        rows = [row for row in self._rows() if any(row[key] != new[key] for key in _KEY)] + [new]
        rows.sort(key=lambda row: -float(row["top1"]))
        path = Path(os.path.realpath(self.path))  # of a link, what it names is replaced
        save_text(path, csv_text(COLUMNS, [[row[key] for key in COLUMNS] for row in rows]))

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
        except (OSError, ValueError, csv.Error) as error:
            raise ConfigError(f"--results {self.path}: cannot be read: {error}") from None
        if reader.fieldnames is not None and tuple(reader.fieldnames) != COLUMNS:
            unknown = [c for c in reader.fieldnames if c not in COLUMNS]
            missing = [c for c in COLUMNS if c not in reader.fieldnames]
            columns = f"columns: {', '.join(unknown)}" if unknown else f"lacks columns: {', '.join(missing)}"
            told = textwrap.shorten(columns if unknown or missing else "its columns are in another order", 300)
            raise ConfigError(f"--results {self.path}: is another table ({told}); name another file")
        whole = all(isinstance(value, str) for row in rows for value in row.values())
        if not whole or not all(_is_number(row["top1"]) for row in rows):
            raise ConfigError(f"--results {self.path}: has a row that is no result; name another file")
        return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_writable(path: Path, option: str) -> None:
    """Finds out whether a file can be written, and leaves what is there as it is.

    Raises:
        ConfigError: It cannot, with the reason.
    """
    if os.path.isdir(path):
        raise ConfigError(f"{option} {path}: is a folder; name a file")
    if not os.path.isdir(path.parent):
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}")
    existed = os.path.exists(path)
    try:
        with path.open("ab"):
            pass
        if not existed:
            os.unlink(os.path.realpath(path))  # a link to nothing stays one
            probe = path.with_name(f".tmp-{path.name}")  # what a file written durably begins as
            with probe.open("ab"):
                pass
            probe.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error.strerror}") from None


# ---- the folder of details ----------------------------------------------------------------------------------------


def check_folder(folder: Path, files: Iterable[Path] = (), kept: Sequence[Kept] = ()) -> None:
    """Makes the folder and finds out now whether it can be written.

    Args:
        folder: Of `--output`.
        files: What is to be written in it.
        kept: What none of them must be.

    Raises:
        ConfigError: It cannot, or one of the files lies where one lies that was given.
    """
    for file in files:
        refuse_overwriting(f"--output: {file}", file, kept)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be made: {error.strerror}") from None
    check_writable(folder / "metrics.json", "--output")


def folder_of(output: Path, evaluation: Evaluation, *, alone: bool) -> Path:
    """Where an evaluation's details go: the folder itself, or one in it where there are several evaluations."""
    passes = None if evaluation.mc is None else evaluation.mc.passes
    return output if alone else _folder_of(output, evaluation.subject.text, evaluation.corruption, passes)


def folders_of(output: Path, request: Request, *, alone: bool) -> list[Path]:
    """Where the details of all evaluations go that are asked for, see `folder_of`."""
    if alone:
        return [output]
    passes = [None] if request.mc is None else [None, request.mc.passes]
    return [
        _folder_of(output, text, corruption, each)
        for text in request.models
        for corruption in request.corruptions or [None]
        for each in passes
    ]


def _folder_of(output: Path, text: str, corruption: Corruption | None, passes: int | None) -> Path:
    parts = [text, *([] if corruption is None else [str(corruption)]), *([] if passes is None else [f"mc{passes}"])]
    return folder_in(output, "-".join(parts))


def folder_in(output: Path, text: str) -> Path:
    """A folder for what is called so."""
    return output / re.sub(r"[^\w.=-]+", "_", text).strip("_.")


def write_details(evaluation: Evaluation, folder: Path) -> None:
    """metrics.json, per_class.csv, confusion.csv, confusion.png and mistakes.csv, each replacing the one of before.

    Raises:
        Failure: One could not be written.
    """
    from training.evaluating.confusion import draw_confusion  # needs matplotlib

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"{folder}: cannot be made: {error.strerror}") from None
    per_class = per_class_rows(evaluation)
    save_text(folder / "metrics.json", json_text(_facts(evaluation, per_class)))
    header = ("class", "samples", "recall", "precision", "f1")
    save_text(folder / "per_class.csv", csv_text(header, [[row[key] for key in header] for row in per_class]))
    save_text(folder / "mistakes.csv", csv_text(*_mistakes(evaluation)))
    confusion, names = evaluation.predictions.confusion, evaluation.logit_names
    if confusion is not None:
        counts = confusion[: len(evaluation.part.class_names)].tolist()
        rows = [[name, *row] for name, row in zip(evaluation.part.class_names, counts, strict=True)]
        save_text(folder / "confusion.csv", csv_text(("label", *names), rows))
        if len(names) <= MOST_CLASSES_IN_PICTURE:
            draw_confusion(confusion, names, folder / "confusion.png", title=evaluation.name)


def per_class_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Recall, precision and F1 of each class, in percent; empty where they are not defined."""
    predictions = evaluation.predictions
    counts = (predictions.samples, predictions.predicted, predictions.hits)
    rows = []
    for name, samples, predicted, hits in zip(evaluation.logit_names, *(part.tolist() for part in counts), strict=True):
        shares = {"recall": (hits, samples), "precision": (hits, predicted), "f1": (2 * hits, samples + predicted)}
        row = {key: round(100 * part / whole, 4) if whole else "" for key, (part, whole) in shares.items()}
        rows.append({"class": name, "samples": samples, **row})
    return rows


def _facts(evaluation: Evaluation, per_class: list[dict[str, Any]]) -> dict[str, Any]:
    """What metrics.json holds."""
    row = result_row(evaluation)
    exact = {_RENAMED.get(key, key): value for key, value in evaluation.metrics.items() if key != "samples"}
    return {
        **{key: value for key, value in row.items() if key not in exact},
        "metrics": exact,
        "recall": {each["class"]: each["recall"] if each["recall"] != "" else None for each in per_class},
        "mean": list(evaluation.spec.mean),
        "std": list(evaluation.spec.std),
        "data": evaluation.data.model_dump(exclude_none=True),
        "skipped": evaluation.skipped,
        "seconds": round(evaluation.seconds, 3),
        **({} if evaluation.mc is None else {"mc": {"passes": evaluation.mc.passes, "rates": evaluation.mc.rates}}),
        "device": evaluation.device,
        "notes": list(evaluation.notes),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__},
    }


def _mistakes(evaluation: Evaluation) -> tuple[Sequence[str], list[list[Any]]]:
    """Header and rows of mistakes.csv; see `PerSample.mistakes` for their order."""
    from training.data.source import place

    source, names = evaluation.part.source, evaluation.logit_names
    rows = [
        [
            place(source, m.index),
            names[m.label],
            names[m.prediction],
            f"{m.probability:.6g}",
            f"{m.label_probability:.6g}",
        ]
        for m in evaluation.per_sample.mistakes(source.targets)
    ]
    return ("path", "label", "prediction", "probability", "label_probability"), rows


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as CSV."""
    text = "".join(map(csv_row, (header, *rows)))
    # names of files may be any bytes
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
