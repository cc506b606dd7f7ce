"""What an evaluation leaves: lines, rows, files."""

import csv
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from files.errors import ConfigError
from training.evaluating.corruptions import Corruption
from training.evaluating.mc import MonteCarlo
from training.evaluating.part import WantedData
from training.evaluating.results import (
    COLUMNS,
    DETAILS,
    ResultsFile,
    check_folder,
    check_writable,
    describe,
    folder_of,
    folders_of,
    result_row,
    write_details,
)
from training.evaluating.subject import Choice
from training.evaluating.validation import Compute, Evaluation, Request, validate

TIMMS = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]


@pytest.fixture(scope="module")
def found(digits_run: Path) -> list[Evaluation]:
    """The newest average, and the same corrupted."""
    choice = Choice(checkpoint="last")
    clean = Request([str(digits_run)], choice, compute=Compute("cpu"))
    bad = Request([str(digits_run)], choice, compute=Compute("cpu"), corruptions=[Corruption("contrast", 5)])
    return [*validate(clean), *validate(bad)]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_has_timms_columns_first(found: list[Evaluation]) -> None:
    row = result_row(found[0])
    assert tuple(row) == COLUMNS and list(COLUMNS[:9]) == TIMMS
    assert {"nll", "ece", "macro_f1", "balanced_accuracy", "samples_per_second"} <= row.keys()
    assert row["top1"] + row["top1_err"] == pytest.approx(100) and row["top5"] + row["top5_err"] == pytest.approx(100)
    assert (row["img_size"], row["crop_pct"], row["samples"], row["split"]) == (8, 1.0, 360, "val")
    assert row["samples_per_second"] == pytest.approx(360 / found[0].seconds, rel=1e-3)


def test_the_table_holds_the_best_first_and_each_evaluation_once(found: list[Evaluation], tmp_path: Path) -> None:
    table = ResultsFile(tmp_path / "r.csv")
    table.check()
    assert not table.path.exists()
    for evaluation in (found[1], found[0], found[0]):
        table.add(evaluation)
    assert [row["corruption"] for row in rows(table.path)] == ["", "contrast:5"]
    assert [row["top1"] for row in rows(table.path)] == [str(result_row(e)["top1"]) for e in found]
    ResultsFile(table.path).check()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a,b\n1,2\n", "is another table (columns: a, b)"),
        (",".join(TIMMS) + "\n", f"is another table (lacks columns: {COLUMNS[len(TIMMS)]}, "),
        (",".join(reversed(COLUMNS)) + "\n", "is another table (its columns are in another order)"),
        (",".join(f"column {i}" for i in range(99)) + "\n", "[...])"),
        ('"a\nb",c\n', "(columns: a b, c)"),
        (",".join(COLUMNS) + "\nm,1\n", "has a row that is no result"),
        (",".join(COLUMNS) + "\n" + "x," * 20 + "x\n", "has a row that is no result"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_another_file_is_not_overwritten(content: str | bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        ResultsFile(path).check()
    assert told in str(caught.value) and "\n" not in str(caught.value) and path.read_bytes() == before


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, told in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "r.csv", "there is no folder"),
        (tmp_path / "file" / "r.csv", "there is no folder"),
        (tmp_path / ("n" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_writable(path, "--results")
    with pytest.raises(ConfigError, match="cannot be made"):
        check_folder(tmp_path / "file" / "out")
    check_writable(tmp_path / "file", "--results")
    assert (tmp_path / "file").read_text() == "x" and len(list(tmp_path.iterdir())) == 1, "nothing is left behind"


def test_a_link_to_nothing_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to("r.csv")
    check_writable(tmp_path / "link.csv", "--output")
    assert os.readlink(tmp_path / "link.csv") == "r.csv" and not (tmp_path / "r.csv").exists()


def test_a_row_goes_behind_a_link(found: list[Evaluation], tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to("r.csv")
    for evaluation in found:
        ResultsFile(tmp_path / "link.csv").add(evaluation)
    assert (tmp_path / "link.csv").is_symlink() and len(rows(tmp_path / "r.csv")) == len(found)


def test_folders_are_known_before_the_evaluations(found: list[Evaluation], tmp_path: Path) -> None:
    request = Request(["digits", "other"], corruptions=[Corruption("contrast", 5)], mc=MonteCarlo(3, 0.5))
    names = {folder.name for folder in folders_of(tmp_path, request, alone=False)}
    assert names == {f"{model}-contrast_5{mc}" for model in ("digits", "other") for mc in ("", "-mc3")}
    assert folders_of(tmp_path, request, alone=True) == [tmp_path]


def test_the_folder_of_details(found: list[Evaluation], tmp_path: Path) -> None:
    evaluation = found[0]
    out = folder_of(tmp_path / "out", evaluation, alone=True)
    write_details(evaluation, out)
    write_details(evaluation, out)  # again, in place of the first
    assert {path.name for path in out.iterdir()} == set(DETAILS)
    facts = json.loads((out / "metrics.json").read_text())
    targets = evaluation.part.source.targets
    predictions = evaluation.per_sample.table[:, 1].int().tolist()
    hits = sum(a == b for a, b in zip(targets, predictions, strict=True))
    assert facts["metrics"]["top1"] == pytest.approx(100 * hits / 360) and facts["samples"] == 360
    for row in rows(out / "per_class.csv"):
        label = int(row["class"])
        right = sum(a == b == label for a, b in zip(targets, predictions, strict=True))
        recall, precision = right / targets.count(label), right / max(1, predictions.count(label))
        assert float(row["recall"]) == pytest.approx(100 * recall, abs=1e-3) and int(row["samples"]) == targets.count(
            label
        )
        if predictions.count(label):
            assert float(row["precision"]) == pytest.approx(100 * precision, abs=1e-3)
            f1 = 2 * precision * recall / (precision + recall) if right else 0
            assert float(row["f1"]) == pytest.approx(100 * f1, abs=1e-3)
        else:
            assert row["precision"] == ""
    for row in rows(out / "confusion.csv"):
        pairs = [p for t, p in zip(targets, predictions, strict=True) if t == int(row["label"])]
        assert [int(row[str(k)]) for k in range(10)] == [pairs.count(k) for k in range(10)]
    mistakes = rows(out / "mistakes.csv")
    assert list(mistakes[0]) == ["path", "label", "prediction", "probability", "label_probability"]
    assert len(mistakes) == 360 - hits and all(row["label"] != row["prediction"] for row in mistakes)
    assert [float(row["label_probability"]) for row in mistakes] == sorted(
        float(r["label_probability"]) for r in mistakes
    )
    names_of = [evaluation.part.source.name(i) for i in range(360)]
    assert {row["path"] for row in mistakes} == {
        name for name, t, p in zip(names_of, targets, predictions, strict=True) if t != p
    }
    with Image.open(out / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_several_evaluations_have_a_folder_each(found: list[Evaluation], tmp_path: Path) -> None:
    folders = {folder_of(tmp_path, evaluation, alone=False) for evaluation in found}
    assert len(folders) == 2 and all(folder.parent == tmp_path for folder in folders)
    assert any(folder.name.endswith("digits-contrast_5") for folder in folders)


def test_words(found: list[Evaluation], photos: Path, timm_weights: Path) -> None:
    told = describe(found[1])
    for part in (
        "digits, val: 360 images, 10 classes",
        "1 x 8 x 8",
        "corrupted by contrast:5",
        "float32 on cpu",
        "NLL ",
    ):
        assert part in told
    request = Request([str(timm_weights)], data=WantedData(images=photos, workers=0), compute=Compute("cpu"), flip=True)
    (evaluation,) = validate(request)
    assert f"folder, all in {photos}: 12 images" in describe(evaluation)
    assert "mirror images (mean of probabilities)" in describe(evaluation)
