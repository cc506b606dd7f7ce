"""Contact sheets of one image and of many: pages, limits, what stands in a cell."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from files.errors import Failure
from training.evaluating import contact_sheet
from training.evaluating.contact_sheet import ContactSheet
from training.evaluating.prediction import Prediction


@pytest.fixture
def red(tmp_path: Path) -> str:
    Image.new("RGB", (90, 60), (200, 20, 20)).save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def drawn(path: str, sheet: Path, count: int, *, name: str = "red", probability: float = 0.5) -> ContactSheet:
    made = ContactSheet(sheet, count)
    for _ in range(count):
        made.add(Prediction(path, [name], [probability]))
    made.end()
    return made


def share(picture: Path, colour: tuple[int, int, int]) -> float:
    """Of pixels near a colour."""
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return float((np.abs(pixels - colour).max(axis=2) < 12).mean())


@pytest.mark.parametrize("count", [1, 2, 5, 21, 99, 100])
def test_a_page_holds_each_image(count: int, red: str, tmp_path: Path) -> None:
    sheet = drawn(red, tmp_path / "s.png", count)
    assert sheet.pages == [tmp_path / "s.png"] and sheet.left_out == 0
    with Image.open(sheet.pages[0]) as page:
        area = count * sheet.side**2 * 2 / 3  # each is 3 wide and 2 high
        assert share(sheet.pages[0], (200, 20, 20)) * page.width * page.height == pytest.approx(area, rel=0.05)
        assert page.width < 2600 and sheet.side >= 160


def test_more_go_to_further_pages_and_there_is_a_limit(
    red: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact_sheet, "PER_PAGE", 3)
    monkeypatch.setattr(contact_sheet, "MOST_PAGES", 2)
    assert [p.name for p in drawn(red, tmp_path / "a.png", 4).pages] == ["a.png", "a-2.png"]
    sheet = drawn(red, tmp_path / "b.png", 8)
    assert [p.name for p in sheet.pages] == ["b.png", "b-2.png"] and sheet.left_out == 2
    assert drawn(red, tmp_path / "c.png", 0).pages == []


def test_the_bar_is_as_long_as_the_probability(red: str, tmp_path: Path) -> None:
    shares = [
        share(drawn(red, tmp_path / "s.png", 1, probability=p).pages[0], (47, 109, 181)) for p in (0.25, 0.5, 1.0)
    ]
    assert shares[1] == pytest.approx(2 * shares[0], rel=0.1) and shares[2] == pytest.approx(4 * shares[0], rel=0.1)


@pytest.mark.parametrize("name", ["x" * 300, "naïve café, Ωμέγα", "two\nlines", "犬"])
def test_any_name(name: str, red: str, tmp_path: Path) -> None:
    assert drawn(red, tmp_path / "s.png", 1, name=name).pages


def test_an_image_that_is_gone_by_now_leaves_an_empty_place(tmp_path: Path) -> None:
    assert drawn(str(tmp_path / "gone.png"), tmp_path / "s.png", 1).pages


def test_what_cannot_be_written(red: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="cannot be written"):
        drawn(red, tmp_path / "no" / "s.png", 1)
