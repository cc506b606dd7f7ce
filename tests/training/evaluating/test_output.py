"""Predictions on their way out: formats, files, what is said of images that cannot be read."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from files.errors import ConfigError, Failure, LastingStream
from training.evaluating.output import Wanted, predict
from training.evaluating.prediction import Prediction, Predictor, PredictRequest
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
    assert f"skipped: '{tmp_path / 'bad.png'}': " in said.err and "1 of 5 images have no prediction" in said.err
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


@pytest.fixture
def image(photos: Path, tmp_path: Path) -> Path:
    """One of its own, and other names of it."""
    path = tmp_path / "images" / "a.png"
    path.parent.mkdir()
    shutil.copy(photos / "aster" / "0.png", path)
    (tmp_path / "link.png").symlink_to(path)
    os.link(path, tmp_path / "hard.png")
    return path


@pytest.mark.parametrize("name", ["images/a.png", "images/../images/a.png", "link.png", "hard.png"])
@pytest.mark.parametrize("option", ["output", "contact_sheet"])
def test_an_image_is_not_written_over(name: str, option: str, image: Path, timm_weights: Path, tmp_path: Path) -> None:
    before, path = image.read_bytes(), tmp_path / name
    wanted = Wanted(output=path) if option == "output" else Wanted(contact_sheet=path)
    for given in (image, image.parent):
        with pytest.raises(ConfigError, match=r"--\S+ .*: is one of the images; name another place"):
            predict(request(timm_weights, given), wanted)
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("model", "name", "told"),
    [
        ("", "config.yaml", "is the run's own file, of "),
        ("", "metrics.csv", "is the run's own file, of "),
        ("", "best/model.safetensors", "is the run's own file, of "),
        ("best", "summary.json", "is the run's own file, of "),
        ("checkpoints/{step}", "checkpoints/{step}/manifest.json", "is the run's own file, of "),
        ("best", "best/config.json", "is a file of the model's weights"),
        ("best/model.safetensors", "best/config.json", "is a file of the model's weights"),
    ],
)
def test_the_model_is_not_written_over(model: str, name: str, told: str, digits_run: Path, image: Path) -> None:
    step = max((digits_run / "checkpoints").iterdir()).name
    path = digits_run / name.format(step=step)
    before = path.read_bytes()
    for wanted in (Wanted("csv", path), Wanted(output=path)):
        with pytest.raises(ConfigError, match=f"--output .*{path.name}: {told}"):
            predict(request(digits_run / model.format(step=step), image), wanted)
    assert path.read_bytes() == before


def test_predictions_may_lie_in_the_run_folder(digits_run: Path, image: Path, tmp_path: Path) -> None:
    run = shutil.copytree(digits_run, tmp_path / "run")
    for _ in range(2):  # the second time in place of the first
        assert predict(request(run, image), Wanted(output=run / "predictions.csv")) == 0


def test_no_page_of_a_contact_sheet_is_written_over_an_image(
    image: Path, timm_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluating.contact_sheet.PER_PAGE", 1)
    image.rename(tmp_path / "s-2.png")
    images = [tmp_path / "s-2.png", tmp_path / "hard.png"]
    before = images[0].read_bytes()
    with pytest.raises(ConfigError, match=r"--contact-sheet .*s-2\.png: is one of the images"):
        predict(request(timm_weights, *images), Wanted(contact_sheet=tmp_path / "s.png"))
    assert images[0].read_bytes() == before and not (tmp_path / "s.png").exists()


def test_table_and_contact_sheet_are_two_files(photos: Path, timm_weights: Path, tmp_path: Path) -> None:
    wanted = Wanted(output=tmp_path / "one.png", contact_sheet=tmp_path / "." / "one.png")
    with pytest.raises(ConfigError, match="is a page of the contact sheet as well; name two files"):
        predict(request(timm_weights, photos), wanted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(24, "Too many open files")])
def test_an_old_table_survives_a_run_that_fails(
    error: BaseException, photos: Path, timm_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What images are read with may fail too: that is not said of the table."""

    def fail(_: Predictor) -> Iterator[Prediction]:
        yield Prediction("a.png", ["aster", "daisy"], [0.9, 0.1])
        raise error

    (tmp_path / "p.csv").write_text("dear")
    monkeypatch.setattr(Predictor, "predictions", fail)
    with pytest.raises(type(error)) as raised:
        predict(request(timm_weights, photos), Wanted(output=tmp_path / "p.csv"))
    assert raised.value is error
    assert (tmp_path / "p.csv").read_text() == "dear" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(type(error)):
        predict(request(timm_weights, photos), Wanted(output=tmp_path / "new.csv"))
    assert "a.png" in (tmp_path / "new.csv").read_text(), "where there was none, what was done is kept"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_with_the_table(photos: Path, timm_weights: Path) -> None:
    with pytest.raises(Failure, match="--output /dev/full: cannot be written: No space left on device"):
        predict(request(timm_weights, photos), Wanted("csv", Path("/dev/full")))


def test_nothing_is_computed_for_a_reader_that_has_left(
    photos: Path, timm_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `predict.py ... | head -1`; a table in a file, or a contact sheet, is another matter."""
    asked = []

    def rows(_: Predictor) -> Iterator[Prediction]:
        for i in range(100):
            asked.append(i)
            yield Prediction(f"{i}.png", ["aster", "daisy"], [0.9, 0.1])

    monkeypatch.setattr(Predictor, "predictions", rows)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as pipe:
        stream = LastingStream(pipe)
        monkeypatch.setattr(sys, "stdout", stream)
        assert predict(request(timm_weights, photos), Wanted("csv")) == 0
        assert len(asked) == 1
        assert predict(request(timm_weights, photos), Wanted(output=tmp_path / "p.csv")) == 0
        assert len(asked) == 101 and len((tmp_path / "p.csv").read_text().splitlines()) == 101


def test_a_table_that_is_there_is_replaced_behind_its_link(photos: Path, timm_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("old")
    (tmp_path / "p.csv").chmod(0o640)
    (tmp_path / "link.csv").symlink_to("p.csv")
    assert predict(request(timm_weights, photos), Wanted(output=tmp_path / "link.csv")) == 0
    assert (tmp_path / "link.csv").is_symlink() and len((tmp_path / "p.csv").read_text().splitlines()) == 13
    assert (tmp_path / "p.csv").stat().st_mode & 0o777 == 0o640 and len(list(tmp_path.iterdir())) == 2
