"""predict.py as a user runs it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.factory import create_model, saved_config
from models.weights import save_weights
from predict import main
from tests.training.data.parts import write_image
from tests.training.data.test_images import damaged_exif

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights") / "small"
    model = create_model("timm/test_resnet", num_classes=2, class_names=["cat", "dog"], image_size=32)
    save_weights(folder, model.state_dict(), saved_config(model))
    return str(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(3):
        write_image(tmp_path / "photos" / f"{i}.png", seed=i)
    return tmp_path / "photos"


def test_a_folder(weights: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([weights, str(photos), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == [
        "image",
        *(str(photos / f"{i}.png") for i in range(3)),
    ]
    assert "--topk 5: the model has 2 classes, so that 2 are given" in said.err


@pytest.mark.parametrize("workers", ["0", "2"])
def test_damaged_exif_data_are_told_once(
    workers: str, weights: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        damaged_exif(photos / f"{name}.jpg", 20)
    damaged_exif(photos / "another-tag.jpg", 80)
    words = [weights, str(photos), "--device", "cpu", "--workers", workers, "--batch-size", "2"]
    assert main(words) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "EXIF" in line]
    assert told == [
        "warning: damaged EXIF data do not say how an image is turned, so that it is taken as it lies: 2 of 6 images; "
        f"the first is '{photos / 'a.jpg'}'"
    ]


def test_standard_input_with_a_path_that_is_gone(
    weights: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos}/1.png\n{photos}/gone.png\n"))
    assert main([weights, "-", "--topk", "1", "--format", "csv", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("path,class_1,probability_1\n") and said.out.count("\n") == 2
    assert "gone.png': No such file or directory\n" in said.err and said.err.endswith(
        "1 of 2 images have no prediction\n"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--topk", "0"], "--topk: must be at least 1, got 0"),
        (["nowhere.png"], "nowhere.png: no such file or folder"),
        (["-"], "standard input has no paths"),
        (["--output", "no/p.csv"], "there is no folder no"),
        (["--no-ema"], "--no-ema has no effect"),
    ],
)
def test_mistakes_cost_a_line_or_three_and_exit_with_2(
    words: list[str],
    told: str,
    weights: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main([weights, str(photos), *words, "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and told in said.err and len(said.err.splitlines()) <= 3


@pytest.mark.slow
def test_who_reads_it_may_stop_early(weights: str, photos: Path) -> None:
    """As `predict.py ... | head -1` does: no traceback."""
    write_image(photos / "many.png")
    command = [
        sys.executable,
        str(ROOT / "predict.py"),
        weights,
        "-",
        "--format",
        "csv",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command, cwd=photos, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("many.png\n" * 5000)
    process.stdin.close()
    assert process.stdout.readline().startswith("path,")
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=60)
