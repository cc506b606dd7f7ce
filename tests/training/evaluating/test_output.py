"""Predictions on their way out: formats, files, what is said of images that cannot be read."""

import json
from pathlib import Path

import pytest

from files.errors import ConfigError
from training.evaluating.output import Wanted, predict
from training.evaluating.prediction import PredictRequest
from training.evaluating.validation import Compute


def request(weights: Path, *paths: Path) -> PredictRequest:
    return PredictRequest(str(weights), [str(p) for p in paths], compute=Compute("cpu"), topk=2, workers=0)


def test_the_format_is_what_is_asked_for_or_what_the_file_ends_in() -> None:
    chosen = [Wanted(output=Path(name)).chosen for name in ("x.csv", "x.JSON", "x")]
    assert chosen == ["csv", "json", "table"] and Wanted().chosen == "table"
    assert Wanted("table", Path("x.csv")).chosen == "table"


def test_files(timm_weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = Wanted(output=tmp_path / "p.json", contact_sheet=tmp_path / "sheet.png")
    assert predict(request(timm_weights, photos), wanted) == 0
    assert len(json.loads((tmp_path / "p.json").read_text())) == 12
    said = capsys.readouterr()
    assert said.out == "" and f"contact sheet: {tmp_path / 'sheet.png'}" in said.err


def test_what_cannot_be_read_makes_the_exit_code_1(
    timm_weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_text("no image")
    assert predict(request(timm_weights, tmp_path / "bad.png", photos / "aster"), Wanted("csv")) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 5 and "bad.png" not in said.out
    assert f"skipped: '{tmp_path / 'bad.png'}': " in said.err and "1 of 5 images could not be read" in said.err
    assert predict(request(timm_weights, tmp_path / "bad.png"), Wanted("json", contact_sheet=tmp_path / "s.png")) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == [] and "nothing to draw" in said.err and not (tmp_path / "s.png").exists()


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"output": Path("no/p.csv")}, "--output no/p.csv: there is no folder no"),
        ({"contact_sheet": Path("no/s.png")}, "--contact-sheet no/s.png: there is no folder no"),
        ({"contact_sheet": Path("s.jpg")}, "a contact sheet is a .png file"),
        ({"output": Path(".")}, "is a folder; name a file"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(
    wanted: dict, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=told):
        predict(request(Path("no model"), tmp_path), Wanted(**wanted))


def test_an_old_file_survives_a_mistake(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("dear")
    with pytest.raises(ConfigError, match="unknown model"):
        predict(request(Path("convformer_n5"), photos), Wanted(output=tmp_path / "p.csv"))
    assert (tmp_path / "p.csv").read_text() == "dear"
