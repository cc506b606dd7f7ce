"""What is read of damaged run folders."""

import math
from pathlib import Path

import pytest

from training.report import runs


@pytest.mark.parametrize("rest", ["5,55,0.4", "5,55,0.4,0.3,99.99,100,0.001,0.4,500,2"])
def test_cut_off_row_is_left_out_and_said(run: Path, rest: str, page_of) -> None:
    with (run / "metrics.csv").open("a") as file:
        file.write(rest)  # no newline: the last number may have lost digits
    data = runs.read_run(run)
    assert data.epochs == 4
    assert "metrics.csv holds an incomplete row, which was left out." in page_of(run).text


def test_epoch_written_twice_counts_once(run: Path) -> None:
    with (run / "metrics.csv").open("a") as file:
        file.write("4,44,0.5,0.4,98.5,100,98,98,2,0.001,0.4,500,10\n")
    data = runs.read_run(run)
    assert data.metrics["epoch"] == [1, 2, 3, 4]
    assert data.metrics["val_top1"][-1] == 98.5


@pytest.mark.parametrize("text", ["", '{"best_top1": 9', "[1]", "\udcff"])
def test_damaged_summary_is_left_out_and_said(run: Path, text: str, page_of) -> None:
    (run / "summary.json").write_bytes(text.encode(errors="surrogateescape"))
    text = page_of(run).text
    assert "summary.json is damaged and was left out." in text
    assert "latest top-1 97.25 %, best 98.75 %" in text


@pytest.mark.parametrize("none", ["null", "NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_finite_are_unknown_whoever_wrote_them(run: Path, none: str, page_of) -> None:
    (run / "summary.json").write_text(
        f'{{"epochs": 4, "final_top1": {none}, "best_top1": {none}, "seconds": {none}, "images_per_second": {none},'
        f' "train_seconds": {none}, "data_share": {none}, "peak_memory_mb": {none}, "steps": 44}}'
    )
    text = page_of(run).text
    assert "Finished 4 epochs in" in text and "final top-1 97.25 %, best 98.75 %" in text
    assert "Peak memory \u2013" in text and "damaged" not in text
    told = (run / "evaluation.json").read_text()
    told = told.replace('"probability": 0.875', f'"probability": {none}').replace("0.38]", f"{none}]")
    told = told.replace("[0.0, 0.0, 0.0]", f"[1.0, 0.0, {none}]")
    (run / "evaluation.json").write_text(told)
    page = page_of(run)
    assert "damaged" not in page.text and "nan" not in page.text.lower() and "inf %" not in page.text
    assert "Calibration in %" not in page.text and "Confusion matrix" in page.text


def test_numbers_that_are_none(run: Path, page_of, write_csv) -> None:
    metrics = run / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("98.75", "").replace("91.5", "nan").replace("0.375", "inf"))
    write_csv(
        run / "drop_path.csv", ("block", "name", "nominal_rate", "mode", "realised_rate"), [[0, "b", 0.1, "skip", ""]]
    )
    (run / "summary.json").write_text('{"epochs": 4, "final_top1": null, "peak_memory_mb": null}')
    data = runs.read_run(run)
    assert [math.isnan(v) for v in data.metrics["val_top1"]] == [False, True, True, False]
    assert math.isnan(data.metrics["val_loss"][-1])
    text = page_of(run).text
    assert "best 97.25 % at epoch 4" in text
    assert "Peak memory \u2013" in text
    assert "0 b skip 0.100 \u2013 \u2013" in text
    assert "No sample has been drawn for yet." in text
