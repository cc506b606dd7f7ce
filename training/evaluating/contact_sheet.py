"""A contact sheet: thumbnails in a grid, each with what a model takes it for."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from files.errors import Failure, one_line
from training.data.images import read_image
from training.evaluating.prediction import Prediction

PER_PAGE = 100
MOST_PAGES = 20

_INK, _GREY, _LINE, _BAR, _PALE = "#1b1f24", "#6b7480", "#e3e7ec", "#2f6db5", "#dfe8f3"
_GAP = 14


class ContactSheet:
    """Draws predictions as they come, `PER_PAGE` to a page: FILE.png, FILE-2.png, ... and no more than `MOST_PAGES`.

    Args:
        path: Of the first page.
        total: Images to come: so few are drawn larger.

    Attributes:
        planned: Pages, where all images can be read.
        pages: Those written.
        left_out: Images beyond the last page.
    """

    def __init__(self, path: Path, total: int) -> None:
        self.path = path
        on_page = max(1, min(total, PER_PAGE))
        self.columns = math.ceil(math.sqrt(on_page * 1.25)) if on_page > 3 else on_page
        self.side = 320 if on_page <= 4 else 220 if on_page <= 20 else 160
        self.planned = [self._page(number) for number in range(1, min(math.ceil(total / PER_PAGE), MOST_PAGES) + 1)]
        self.waiting: list[Image.Image] = []
        self.pages: list[Path] = []
        self.left_out = 0

    def add(self, prediction: Prediction) -> None:
        """Draws one image.

        Raises:
            Failure: A page could not be written.
        """
        if len(self.pages) == MOST_PAGES:
            self.left_out += 1
            return
        self.waiting.append(_cell(prediction, self.side))
        if len(self.waiting) == PER_PAGE:
            self._write()

    def end(self) -> None:
        """Writes the last page.

        Raises:
            Failure: It could not be written.
        """
        if self.waiting:
            self._write()

    def _write(self) -> None:
        columns = min(self.columns, len(self.waiting)) if not self.pages else self.columns
        rows = math.ceil(len(self.waiting) / columns)
        width, height = self.waiting[0].size
        page = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white")
        for i, cell in enumerate(self.waiting):
            row, column = divmod(i, columns)
            page.paste(cell, (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP)))
        path = self._page(len(self.pages) + 1)
        try:
            page.save(path)
        except OSError as error:
            raise Failure(f"--contact-sheet {path}: cannot be written: {error.strerror or error}") from None
        self.pages.append(path)
        self.waiting = []

    def _page(self, number: int) -> Path:
        return self.path if number == 1 else self.path.with_stem(f"{self.path.stem}-{number}")


def _cell(prediction: Prediction, side: int) -> Image.Image:
    """A thumbnail, the likeliest class, its probability as a bar and a number, and the file's name."""
    size = 16 if side >= 320 else 14 if side >= 220 else 12
    line = size + 6
    cell = Image.new("RGB", (side, side + 3 * line + 4), "white")
    draw = ImageDraw.Draw(cell)
    try:
        with open(prediction.path, "rb") as file:
            picture = read_image(file, 3)
    except Exception:  # it was read a moment ago, so that it was removed or is being written
        picture = Image.new("RGB", (side, side), _LINE)
    scale = side / max(picture.size)
    smooth = Image.Resampling.LANCZOS if scale < 4 else Image.Resampling.NEAREST  # pixels of tiny pictures stay such
    picture = picture.resize([max(1, round(length * scale)) for length in picture.size], smooth)
    draw.rectangle((0, 0, side - 1, side - 1), fill="#f6f7f9")
    cell.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    top = side + 5
    bold, plain = _font("DejaVuSans-Bold.ttf", size), _font("DejaVuSans.ttf", size - 2)
    draw.text((0, top), _fit(prediction.classes[0], bold, side), font=bold, fill=_INK)
    probability = prediction.probabilities[0]
    number = f"{100 * probability:.1f} %"
    room = side - round(plain.getlength("100.0 %")) - 8
    middle = top + line + line // 2
    draw.rectangle((0, middle - 4, room, middle + 3), fill=_PALE)
    draw.rectangle((0, middle - 4, max(1, round(room * probability)), middle + 3), fill=_BAR)
    draw.text((side, middle), number, font=plain, fill=_INK, anchor="rm")
    name = Path(prediction.path).name
    draw.text((0, top + 2 * line), _fit(name, plain, side, keep_end=True), font=plain, fill=_GREY)
    return cell


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts, which know more letters than Pillow's own."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int, *, keep_end: bool = False) -> str:
    """A text that is no wider, cut at its end, or in front where its end matters."""
    text = one_line(text)
    cut = text
    while font.getlength(cut) > width and len(text) > 1:
        text = text[1:] if keep_end else text[:-1]
        cut = f"…{text}" if keep_end else f"{text}…"
    return cut
