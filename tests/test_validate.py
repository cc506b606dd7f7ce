"""validate.py as a user runs it: what it prints and writes, mistakes, several processes."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from configs import CONFIGS
from models.factory import create_model, saved_config
from models.weights import save_weights
from tests.training.data.parts import write_image
from tests.training.data.test_images import damaged_exif
from validate import main

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["aster", "daisy", "tulip"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "small"
    model = create_model("timm/test_resnet", num_classes=3, class_names=NAMES, image_size=32)
    save_weights(folder, model.state_dict(), saved_config(model))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for c, name in enumerate(NAMES):
        for i in range(5 - c):
            write_image(root / name / f"{i}.png", size=(40 + i, 50), seed=10 * c + i)
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measuring(weights: Path, photos: Path, output: Path) -> list[str]:
    """The command line that measures these weights on these photos."""
    places = ["--images", str(photos), "--output", str(output)]
    return [str(weights), *places, "--workers", "0", "--device", "cpu"]


def test_one_model(weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = measuring(weights, photos, tmp_path / "out")
    assert main([*words, "--results", str(tmp_path / "r.csv")]) == 0
    said = capsys.readouterr()
    assert "12 images, 3 classes" in said.out and "top-1 " in said.out
    (row,) = rows(tmp_path / "r.csv")
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert float(row["top1"]) == pytest.approx(facts["metrics"]["top1"], abs=1e-4) and row["model"] == str(weights)
    labels = {row["path"]: row["label"] for row in rows(tmp_path / "out" / "mistakes.csv")}
    assert labels and all(Path(path).parent.name == label and Path(path).exists() for path, label in labels.items())


def test_corruptions_have_a_row_and_a_folder_each(weights: Path, photos: Path, tmp_path: Path) -> None:
    words = measuring(weights, photos, tmp_path / "out")
    assert main([*words, "--corrupt", "jpeg:5", "--corrupt", "contrast", "--results", str(tmp_path / "r.csv")]) == 0
    assert {row["corruption"] for row in rows(tmp_path / "r.csv")} == {"jpeg:5", "contrast:3"}
    assert sum((folder / "metrics.json").exists() for folder in (tmp_path / "out").iterdir()) == 2


def test_blocks_are_dropped(weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*measuring(weights, photos, tmp_path / "out"), "--drop-blocks", "greedy"]) == 0
    said = capsys.readouterr().out
    assert "(whole model)" in said and "1: 1 (layer1.0)" in said and "these figures are optimistic" in said
    assert "stays     2 (layer2.0), 3 (layer3.0), 4 (layer4.0): its output has another shape than its input" in said
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"blocks.json", "blocks.csv", "blocks.png"}


def test_mc_has_a_row_and_a_folder_beside_the_plain_one(weights: Path, photos: Path, tmp_path: Path) -> None:
    words = [*measuring(weights, photos, tmp_path / "out"), "--mc", "3", "--mc-rate", "0.5"]
    assert main([*words, "--results", str(tmp_path / "r.csv")]) == 0
    told = {row["weights"] for row in rows(tmp_path / "r.csv")}
    assert told == {"weights", "weights, mean of 3 passes with drop path, rates up to 0.5 (linear)"}
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out").iterdir()]
    assert sorted(f.get("mc", {}).get("passes", 0) for f in found) == [0, 3]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--drop-blocks", "one", "--results", "r.csv"], "goes to --output"),
        (["--drop-blocks", "one", "--mc", "3", "--mc-rate", "0.1"], "--mc has no effect"),
        (["--mc", "0"], "--mc: must be at least 1 pass, got 0"),
        (["--mc-rate", "0.1"], "--mc-rate: is of --mc K"),
        (["--results", "no/r.csv"], "--results no/r.csv: there is no folder no"),
        (["--corrupt", "jpg"], "did you mean 'jpeg'?"),
        (["--split", "test"], "--split test has no effect"),
        (["data.rot=x"], "did you mean 'data.root'?"),
        (["--crop-pct", "0"], "--crop-pct: must be in [0.01, 1]"),
        (["convformer_n5"], "did you mean 'convformer_n4'?"),
    ],
)
def test_mistakes_cost_a_line_or_three_and_exit_with_2(
    words: list[str], told: str, weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(weights), "--images", str(photos), "--device", "cpu", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and told in said.err and len(said.err.splitlines()) <= 3


def test_what_was_given_is_not_written_over(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*measuring(weights, photos, tmp_path / "out"), "--results", str(tmp_path / "r.csv")]) == 0
    mistakes = tmp_path / "out" / "mistakes.csv"  # a table that data may be read from
    before = mistakes.read_bytes()
    data = ["data.dataset=csv", f"data.train_file={mistakes}", f"data.val_file={mistakes}", f"data.root={photos}"]
    words = [str(weights), *data, "--device", "cpu", "--workers", "0", "--split", "train"]
    for given, told in (
        (
            ["--output", str(tmp_path / "out")],
            f"--output: {mistakes}: is what data.train_file names; name another place",
        ),
        (["--output", str(tmp_path / "out"), "--drop-blocks", "one"], ""),
        (["--results", str(weights / "model.safetensors")], "is a file of the model's weights"),
        (["--results", str(tmp_path / "x" / "metrics.json"), "--output", str(tmp_path / "x")], "of --output as well"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        capsys.readouterr()
        code, said = main([*words, *given]), capsys.readouterr()
        assert (code, mistakes.read_bytes()) == ((2, before) if told else (0, before)), said.err
        assert told in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--drop-blocks", "9"], "there is no block 9: the model's blocks are 1 to 4"),
        (["--drop-blocks", "2"], "block 2 (layer2.0) cannot be removed: its output has another shape"),
        (["--drop-blocks", "greedy:2"], "of the model's 4 blocks 1 can be removed"),
        (["--mc", "3"], "give --mc-rate RATE"),
    ],
)
def test_what_shows_only_in_the_model_exits_with_2_too(
    words: list[str], told: str, weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(weights), "--images", str(photos), "--device", "cpu", *words]) == 2
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert said.out == "" and last.startswith("error: ") and told in last


def test_an_image_that_cannot_be_read_exits_with_1(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        write_image(tmp_path / name / "0.png")
    (tmp_path / "daisy" / "1.png").write_text("no image")
    words = [str(weights), "--images", str(tmp_path), "--workers", "0", "--device", "cpu"]
    assert main(words) == 1
    assert "daisy/1.png" in capsys.readouterr().err
    assert main([*words, "data.on_error=skip"]) == 0
    assert "3 images" in (said := capsys.readouterr().out) and "skipped   1 image that" in said


def test_damaged_exif_data_are_told_once(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        write_image(tmp_path / name / "0.png")
    damaged_exif(tmp_path / "daisy" / "1.jpg", 20)
    damaged_exif(tmp_path / "tulip" / "1.jpg", 20)
    words = ["--images", str(tmp_path), "--workers", "0", "--device", "cpu"]
    other = shutil.copytree(weights, weights.with_name("other"))
    for more in ([str(other)], ["--corrupt", "contrast:1", "--corrupt", "jpeg:1"]):
        assert main([str(weights), *more, *words]) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if "EXIF" in line]
        assert len(told) == 1 and told[0].startswith("warning: damaged EXIF data do not say how an image is turned")
        assert told[0].endswith(f": 2 of 5 images; the first is '{tmp_path / 'daisy' / '1.jpg'}'")


def launched(*words: str, cwd: Path, processes: int) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "validate.py"), *words], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_of_two_processes_the_main_one_warns(tmp_path: Path) -> None:
    model = tmp_path / "small.yaml"
    model.write_text((CONFIGS / "models" / "caformer_n4.yaml").read_text() + "num_classes: 3\nin_chans: 1\n")
    for name in NAMES[:2]:
        damaged_exif(tmp_path / "photos" / name / "1.jpg", 20)
    for name in NAMES:
        write_image(tmp_path / "photos" / name / "0.png")
    data = [
        "--images",
        str(tmp_path / "photos"),
        "--corrupt",
        "saturation:1",
        "--corrupt",
        "contrast:1",
        "--workers",
        "0",
    ]
    done = launched(str(model), *data, "--device", "cpu", cwd=tmp_path, processes=2)
    told = [line for line in done.stderr.splitlines() if line.startswith(("note: ", "warning: "))]
    assert len(told) == 3 and "freshly initialised" in told[0] and "saturation:1 has no effect" in told[1]
    # the images are dealt out: 1 and 3 of 5 are damaged, which the second process reads
    assert "damaged EXIF data" in told[2] and ": 2 of 5 images; the first is" in told[2] and "aster" in told[2]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(weights: Path, photos: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = [str(weights), "--images", str(photos), "--workers", "0", "--device", "cpu", "--output", str(out)]
        done = launched(*words, cwd=tmp_path, processes=processes)
        assert done.stdout.count("top-1 ") == 1, "the main process alone speaks"
        files = {name: (out / name).read_text() for name in ("per_class.csv", "confusion.csv")}
        found.append((json.loads((out / "metrics.json").read_text()), files, rows(out / "mistakes.csv")))
    (one, files, mistakes), (two, files_two, mistakes_two) = found
    assert one["metrics"] == pytest.approx(two["metrics"], abs=1e-6) and files == files_two
    assert [row["path"] for row in mistakes] == [row["path"] for row in mistakes_two]
