"""The picture of a confusion matrix: its cells stand where they should, for few classes and for many."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from files.errors import Failure
from training.evaluating.confusion import draw_confusion


@pytest.mark.parametrize(("classes", "length"), [(2, 60), (10, 1), (25, 9), (40, 24), (41, 5), (300, 9)])
def test_any_number_of_classes(classes: int, length: int, tmp_path: Path) -> None:
    confusion = torch.eye(classes, dtype=torch.int64) * 50
    draw_confusion(
        confusion, [f"{i}".rjust(length, "x") for i in range(classes)], tmp_path / "c.png", title="run " * 20
    )
    with Image.open(tmp_path / "c.png") as picture:
        width, height = picture.size
        assert 300 < width < 2600 and 300 < height < 2600
        darkest = min(picture.convert("L").tobytes())
    assert darkest < 60, "the diagonal is dark"


def test_a_class_without_samples_is_no_fault(tmp_path: Path) -> None:
    draw_confusion(torch.tensor([[3, 1], [0, 0]]), ["a", "b"], tmp_path / "c.png", title="m")
    assert (tmp_path / "c.png").exists()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="cannot be written"):
        draw_confusion(torch.eye(2, dtype=torch.int64), ["a", "b"], tmp_path / "no" / "c.png", title="m")


@pytest.mark.filterwarnings("error")
def test_names_are_no_formulas_and_need_no_letters_that_the_font_lacks(tmp_path: Path) -> None:
    names = ["$\\frac$", "$x^2$", "line\nbreak", "tab\there", "\u65e5\u672c"]
    draw_confusion(torch.eye(5, dtype=torch.int64), names, tmp_path / "c.png", title="runs/$\\q$ \u65e5")
    assert (tmp_path / "c.png").exists()
