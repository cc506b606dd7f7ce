"""A run as a callable: from a config to a summary, going on, refusing. tests/test_train.py runs the whole command."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.distributed import is_initialized

from files.errors import ConfigError
from files.lock import is_locked, locked
from layers import fast_cpu
from tests.training.parts import TINY
from training.config import TrainConfig, load_config
from training.data.dataset import ReadError
from training.report import page
from training.report.page import write_report
from training.run import describe_result, dry_run, find_config, find_folder, run
from training.run_folder import COLUMNS, RunFolder

ROOT = Path(__file__).resolve().parents[2]
SHORT = [*TINY, "optim.epochs=1", "optim.warmup_epochs=0"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "write_report", lambda _: None)  # its pictures take longer than all the rest


def short(*overrides: str) -> TrainConfig:
    return load_config(None, [*SHORT, *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_report", lambda _: None)
        return folder, run(short(), folder)


def test_a_config_and_a_folder_give_a_summary(finished: tuple, capsys) -> None:
    folder, summary = finished
    assert summary["folder"] == folder and summary["steps"] == 5 and summary["epochs"] == 1
    assert RunFolder(folder).holds_run() and not is_initialized()
    assert describe_result(summary).startswith(f"final top-1 {summary['final_top1']:.2f}, best ")
    assert describe_result(summary | {"stopped_by": "SIGTERM"}) == describe_result({}) == ""
    assert summary["report_made"] and describe_result(summary).endswith(f"; report: {folder / 'report.html'}")
    skipped = summary | {"skipped_images": {"train": 2, "val": 1}}
    assert "2 for training, replaced, and 1 for validation" in describe_result(skipped).splitlines()[1]


@pytest.mark.parametrize("failing", [True, False])
def test_a_report_that_was_not_made_is_not_named(
    failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(page, "write_report", fail)
    summary = run(short(f"log.report={failing}"), tmp_path / "run")
    assert describe_result(summary).endswith(f" s; run: {tmp_path / 'run'}")
    (tmp_path / "run" / "report.html").write_text("of an earlier time")
    assert describe_result(summary).endswith(f" s; run: {tmp_path / 'run'}, whose report.html is of an earlier time")


def test_without_a_folder_a_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    first = run(short(), None, resume="auto", name="mine")
    assert "no run runs/mine-* yet; starting one" in capsys.readouterr().out
    assert first["folder"].parent == Path("runs") and first["folder"].name.startswith("mine-")
    again = run(short(), None, resume="auto", name="mine")
    assert again["folder"] == first["folder"] and "going on from step 5" in capsys.readouterr().out
    assert again["weights_sha256"] == first["weights_sha256"]


def test_other_settings_are_another_run(finished: tuple, capsys) -> None:
    folder, summary = finished
    for resume in ("auto", folder, folder / "checkpoints" / "step-00000005"):
        with pytest.raises(ConfigError, match=r"--resume: optim.lr is 0.5, but the run in .* has 0.003"):
            run(short("optim.lr=0.5"), folder, resume=resume)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(short(), folder)
    again = run(short("data.eval_batch_size=77"), folder, resume=folder)
    assert again["weights_sha256"] == summary["weights_sha256"], "what is free to change"


def test_the_folder_and_the_config_of_a_run_that_goes_on(finished: tuple, tmp_path: Path) -> None:
    folder, _ = finished
    checkpoint = folder / "checkpoints" / "step-00000005"
    assert find_folder(None, resume=folder, name="x") == folder == find_folder(folder, resume=checkpoint, name="x")
    assert find_folder(tmp_path, resume="auto", name="x") == tmp_path == find_folder(tmp_path, resume=None, name="x")
    assert find_config(None, [], folder, resume=folder).model.overrides["dims"] == [16, 32]
    assert find_config(None, [], folder, resume=None) == load_config(None), "a new run takes nothing from the folder"
    with pytest.raises(ConfigError, match="not a run folder, nor a checkpoint in one"):
        find_folder(None, resume=tmp_path, name="x")
    with pytest.raises(ConfigError, match="name two folders; leave --output out"):
        find_folder(tmp_path, resume=folder, name="x")


@pytest.mark.slow
def test_balanced_classes_and_weights_go_on_where_they_were(tmp_path: Path) -> None:
    """From the middle of an epoch, to the same weights and rows; and another sampler or loss is another run."""
    settings = ["data.sampler=balanced", "data.balance_power=0.7", "data.workers=1", "optim.epochs=2", "augment.mixup=0.2",
                "loss={name: bce, class_weights: [1, 2, 1, 1, 1, 1, 1, 1, 1, 3]}", "optim.accumulate=2", "data.batch_size=64",
                "checkpoint={every_steps: 7, keep: 9}"]  # fmt: skip
    whole = run(short(*settings), tmp_path / "whole")
    shuffled = run(short(*settings, "data.sampler=shuffle", "data.balance_power=null"), tmp_path / "shuffled")
    assert shuffled["weights_sha256"] != whole["weights_sha256"] and shuffled["steps"] == whole["steps"] == 22
    for step in (7, 14):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", folder)
        again = run(short(*settings, "data.workers=0"), folder, resume=folder / "checkpoints" / f"step-{step:08}")
        assert again["weights_sha256"] == whole["weights_sha256"]
        assert rows_of(folder) == rows_of(tmp_path / "whole")
    for other, key in (
        ("data.balance_power=0.6", "data.balance_power"),
        ("loss.bce_sum_classes=true", "loss.bce_sum_cl"),
    ):
        with pytest.raises(ConfigError, match=rf"--resume: {key}"):
            run(short(*settings, other), tmp_path / "whole", resume="auto")


@pytest.mark.skipif(fast_cpu.library() is None, reason="no kernels for this CPU, or no C compiler")
@pytest.mark.parametrize("model", ["poolformer_n4", "convformer_n4"])
def test_kernels_of_the_cpu_resume_exactly(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: set[str] = set()
    start = fast_cpu._start
    monkeypatch.setattr(fast_cpu, "FEWEST", 1)
    monkeypatch.setattr(fast_cpu, "_start", lambda kernel, *args: called.add(kernel) or start(kernel, *args))
    settings = [f"model.name={model}", "checkpoint={every_steps: 3, keep: 9}", "drop_path.rate=0.4"]
    whole = run(short(*settings), tmp_path / "whole")
    used = {
        "poolformer_n4": {"gelu_backward_float", "mean_minus_self_float"},
        "convformer_n4": {"squared_relu_float", "squared_relu_backward_float", "layer_norm_float_float"},
    }
    assert used[model] <= called, "the kernels are what this is about"
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again = run(short(*settings), tmp_path / "again", resume=tmp_path / "again" / "checkpoints" / "step-00000003")
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "whole")


def rows_of(folder: Path) -> list[dict[str, str]]:
    """metrics.csv but for what is timed."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in rows]


def test_another_loss_is_another_run(finished: tuple) -> None:
    folder, _ = finished
    for override, key in (("loss.class_weights=auto", "loss.class_weights"), ("data.sampler=balanced", "data.sampler")):
        with pytest.raises(ConfigError, match=f"--resume: {key} is "):
            run(short(override), folder, resume="auto")


def test_an_unknown_column_is_refused_in_one_line_before_anything_is_written(tmp_path: Path) -> None:
    run(short(), tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("val_top5", "val_top6"))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(
        ConfigError, match=r"metrics\.csv: unknown column 'val_top6'; did you mean 'val_top5'\?"
    ) as caught:
        run(short(), tmp_path / "run", resume="auto")
    assert len(str(caught.value).splitlines()) == 1 and all(column in str(caught.value) for column in COLUMNS)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_dry_run_says_that_more_is_accumulated_than_an_epoch_has(tmp_path: Path) -> None:
    assert "warning: optim.accumulate: 9 is more than the" in dry_run(short("optim.accumulate=9"), tmp_path / "run")


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    told = dry_run(short(), tmp_path / "run")
    assert "1437 training" in told and "one step: loss" in told
    assert not list(tmp_path.iterdir())


def test_a_batch_too_small_for_batch_norm_is_one_line(tmp_path: Path) -> None:
    model = "model={name: timm/resnet10t, image_size: 16}"
    config = load_config(None, [*SHORT, model, "data.batch_size=1", "drop_path.rate=0", "drop_path.mode=mask"])
    with pytest.raises(ConfigError, match=r"data\.batch_size: too small for this model") as caught:
        dry_run(config, tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_lost_worker_is_a_read_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr("training.loop.train", lose)
    with pytest.raises(ReadError, match=r"use fewer data\.workers"):
        run(short(), tmp_path / "run")


def test_pictures_and_boards_are_imported_where_they_are_used() -> None:
    script = "import sys, train; print(sorted({'matplotlib', 'jinja2', 'tensorboard'} & sys.modules.keys()))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["torchcodec", "pillow"])
def test_both_decoders_resume_exactly(decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{i}.jpg")
    settings = ["model.in_chans=3", "model.image_size=16", f"data.root={tmp_path / 'data'}", "data.dataset=folder",
                "data.batch_size=4", "augment.random_erasing=0.5", "augment.crop_scale=[0.3, 1]", "optim.epochs=2",
                "augment.auto_augment=rand-m9-mstd0.5", "checkpoint={every_steps: 1, keep: 9}"]  # fmt: skip

    def config(decoder: str, workers: int) -> TrainConfig:
        return short(*settings, f"data.decoder={decoder}", f"data.workers={workers}")

    whole = run(config(decoder, 0), tmp_path / "run")
    assert whole["steps"] == 6
    told = json.loads((tmp_path / "run" / "environment.json").read_text())["decoder"]
    assert told.startswith(decoder)
    capsys.readouterr()
    for step, workers in ((4, 1), (2, 2)):
        resumed = run(
            config(decoder, workers), tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / f"step-{step:08}"
        )
        assert resumed["weights_sha256"] == whole["weights_sha256"] and resumed["steps"] == 6
    assert "decoder" not in capsys.readouterr().err
    other = {"torchcodec": "pillow", "pillow": "torchcodec"}[decoder]
    run(config(other, 0), tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / "step-00000006")
    assert f"decoder was {told}, is now {other}" in capsys.readouterr().err


def test_validation_every_few_epochs_changes_what_is_measured_and_nothing_else(tmp_path: Path) -> None:
    short = ["optim.epochs=3", "log.report=false"]
    every = run(load_config(None, [*TINY, *short]), tmp_path / "every")
    some = run(load_config(None, [*TINY, *short, "log.validate_every=2"]), tmp_path / "some")
    assert some["weights_sha256"] == every["weights_sha256"]
    assert some["final_top1"] == every["final_top1"]
    first, second, third = (row["val_top1"] for row in rows_of(tmp_path / "some"))
    assert (first, second, third) == ("nan", *(row["val_top1"] for row in rows_of(tmp_path / "every")[1:]))
    assert all(row["train_loss"] != "nan" for row in rows_of(tmp_path / "some"))
    assert not (tmp_path / "some" / "report.html").exists()
    assert write_report(tmp_path / "some").exists()  # a page can be made later, from rows without a validation too


def test_early_stopping_needs_every_validation() -> None:
    with pytest.raises(ConfigError, match=r"early_stopping\.patience.*log\.validate_every=1"):
        load_config(None, [*TINY, "early_stopping.patience=3", "log.validate_every=2"])


def test_a_caller_may_hold_the_folder_s_lock(tmp_path: Path) -> None:
    """From before the run to behind it, so that nobody comes between."""
    config = load_config(None, [*TINY, "optim.epochs=1", "optim.warmup_epochs=0", "log.report=false"])
    with locked(tmp_path):
        with pytest.raises(ConfigError, match="a run goes on here"):
            run(config, tmp_path, resume="auto")
        assert run(config, tmp_path, resume="auto", claimed=True)["steps"] == 5
        assert is_locked(tmp_path)
