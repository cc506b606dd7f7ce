"""Predictions on their way out: as a table or file, as a contact sheet, with what could not be read named."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from files.durable import sync_folder
from files.errors import ConfigError, Failure, one_line
from files.outputs import Kept, is_same, refuse_overwriting
from files.words import counted
from training.evaluating.prediction import NoPrediction, Predictor, PredictRequest
from training.evaluating.results import check_writable
from training.evaluating.subject import files_of
from training.evaluating.tables import FORMATS, Format, open_writer


@dataclass(frozen=True)
class Wanted:
    """In which form.

    Attributes:
        format: Default: what `output` ends in, else a table.
        output: A file; None: standard output.
        contact_sheet: A PNG as well.
    """

    format: Format | None = None
    output: Path | None = None
    contact_sheet: Path | None = None

    @property
    def chosen(self) -> Format:
        """The format."""
        ending = self.output.suffix.removeprefix(".").lower() if self.output is not None else ""
        endings: dict[str, Format] = {fmt: fmt for fmt in FORMATS}
        return self.format or endings.get(ending, "table")

    def check(self) -> None:
        """Finds out now what cannot be written.

        Raises:
            ConfigError: Naming it.
        """
        if self.contact_sheet is not None and self.contact_sheet.suffix.lower() != ".png":
            raise ConfigError(f"--contact-sheet {self.contact_sheet}: a contact sheet is a .png file")
        for path, option in ((self.output, "--output"), (self.contact_sheet, "--contact-sheet")):
            if path is not None:
                check_writable(path, option)


def predict(request: PredictRequest, wanted: Wanted) -> int:
    """Predicts, and writes each row as it comes.

    Returns:
        The exit code: 1 where an image has no prediction.

    Raises:
        ConfigError: Whatever was given that cannot work; nothing was written then.
        Failure: What went wrong while running.
    """
    wanted.check()
    predictor = Predictor(request, _lines(sys.stdin))
    plan = predictor.plan
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    sheet = None
    if wanted.contact_sheet is not None:
        from training.evaluating.contact_sheet import ContactSheet  # needs matplotlib

        sheet = ContactSheet(wanted.contact_sheet, len(plan.paths))
    kept: list[Kept] = [(image, "is one of the images") for image in plan.paths]
    kept += files_of(request.model, request.choice)
    _refuse_to_overwrite(wanted.output, [] if sheet is None else sheet.planned, kept)
    unread = 0
    with _opened(wanted.output) as file:
        writer = open_writer(wanted.chosen, file, plan)
        try:
            for row in predictor.predictions():
                if wanted.output is None and sheet is None and getattr(sys.stdout, "deserted", False):
                    break  # who reads it, as `head` does, has enough
                if isinstance(row, NoPrediction):
                    unread += 1
                    tqdm.write(f"skipped: {row.path!r}: {row.reason}", file=sys.stderr)
                    continue
                writer.row(row)
                if sheet is not None:
                    sheet.add(row)
        finally:
            writer.end()
    if predictor.turns is not None:
        predictor.turns.warn()
    if sheet is not None:
        sheet.end()
        more = f"; {counted(sheet.left_out, 'image')} beyond the last page left out" if sheet.left_out else ""
        print(
            f"contact sheet: {', '.join(one_line(str(page)) for page in sheet.pages) or 'nothing to draw'}{more}",
            file=sys.stderr,
        )
    if unread:
        total = len(plan.paths)
        have = "has" if total == 1 else "have"
        print(f"error: {unread:,} of {counted(total, 'image')} {have} no prediction", file=sys.stderr)
    return 1 if unread else 0


def _refuse_to_overwrite(output: Path | None, pages: Sequence[Path], kept: Sequence[Kept]) -> None:
    """Refuses to write where something lies that was given, by whatever name, or twice to one place.

    Raises:
        ConfigError: Naming the file.
    """
    outputs = [] if output is None else [("--output", output)]
    for option, path in (*outputs, *(("--contact-sheet", page) for page in pages)):
        refuse_overwriting(f"{option} {path}", path, kept)
    for page in pages:
        if output is not None and is_same(output, page):
            raise ConfigError(f"--output {output}: is a page of the contact sheet as well; name two files")


def _lines(stdin: IO[str]) -> Iterable[str]:
    """Its lines, when they are asked for; names of files may be any bytes."""
    if hasattr(stdin, "reconfigure"):
        stdin.reconfigure(errors="surrogateescape")  # type: ignore[attr-defined]
    yield from stdin


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[IO[str]]:
    """The file to write to; standard output stays open. One that is there is replaced in the end, or stays as it was."""
    if path is None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[attr-defined]
        yield sys.stdout
        sys.stdout.flush()
        return
    path = Path(os.path.realpath(path))  # of a link, what it names is replaced
    temp = path.with_name(f".tmp-{path.name}") if path.is_file() else None
    if temp is not None:
        try:
            temp.touch()
        except OSError:  # the file may be written, its folder may not
            temp = None
    with _naming(path):
        file = (temp or path).open("w", newline="", encoding="utf-8", errors="surrogateescape")
    try:
        yield _Named(file, path)  # type: ignore[misc]
        with _naming(path):
            file.flush()
            if temp is not None:
                os.fsync(file.fileno())
            file.close()
            if temp is not None:
                shutil.copymode(path, temp)
                os.replace(temp, path)
                sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        if temp is not None:
            temp.unlink(missing_ok=True)
        raise


class _Named:
    """A file whose failures name it; those of whoever reads images meanwhile pass."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file = file
        self.path = path

    def write(self, text: str) -> int:
        with _naming(self.path):
            return self.file.write(text)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(f"--output {path}: cannot be written: {error.strerror}") from None
