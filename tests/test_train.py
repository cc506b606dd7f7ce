"""train.py as a user runs it: a run and its folder, mistakes, interruptions, resuming, several processes."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import joblib
import pytest
import torch
from PIL import Image

from models import create_model
from train import main
from training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
# Small and fast: 1,437 digits in batches of 256 are 5 steps per epoch.
TINY = [
    "model.name=caformer_n4",
    "model.image_size=8",
    "model.depths=[1,1]",
    "model.dims=[16,32]",
    "ema.enabled=false",
    "data.batch_size=256",
    "optim.epochs=3",
    "optim.warmup_epochs=1",
    "drop_path.rate=0.4",
    "checkpoint.every_epochs=1",
]
TIMING = ("images_per_second", "seconds")


def command(*arguments: str | Path, processes: int = 1) -> list[str]:
    script = [str(ROOT / "train.py"), *map(str, arguments)]
    if processes == 1:
        return [sys.executable, *script]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    return [sys.executable, *launcher, *script]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments: str | Path, cwd: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """The command's exit code and output. One process runs in this one, which saves importing torch each time."""
    if processes == 1:
        with contextlib.chdir(cwd), redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = main([str(a) for a in arguments])
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    return subprocess.run(
        command(*arguments, processes=processes),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def read_metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def summary(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text())


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until a checkpoint of that step or a later one is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        steps = [int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*")]
        if steps and max(steps) >= step:
            return
        assert process.poll() is None, f"the run ended early: {process.communicate()}"
        time.sleep(0.01)
    raise AssertionError("no checkpoint in time")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny run with everything that has a state: skip mode, a schedule, mixup, an average."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = run(*FULL, "--output", folder, cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    return folder


FULL = [
    *TINY,
    "drop_path.schedule={kind: ramp, start: 0.2}",
    "augment.mixup=0.2",
    "augment.random_erasing=0.2",
    "ema.enabled=true",
    "ema.decay=0.9",
    "optim.accumulate=2",
    "checkpoint.every_steps=1",
    "checkpoint.keep=100",
]


def test_a_run_leaves_its_folder(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.csv", "summary.json", "checkpoints", "best", "tensorboard",
                     "report.html", "drop_path.csv"}  # fmt: skip
    rows = read_metrics(finished)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["3", "6", "9"], "5 batches, 2 accumulated, are 3 steps"
    told = summary(finished)
    assert told["steps"] == 9 and told["epochs"] == 3
    assert told["final_top1"] == pytest.approx(float(rows[-1]["val_top1"]))
    assert told["best_top1"] == pytest.approx(max(float(row["val_top1"]) for row in rows))
    assert float(rows[-1]["drop_path_rate"]) == pytest.approx(0.4), "the ramp ends at the full rate"
    assert float(rows[0]["drop_path_rate"]) == pytest.approx(0.4 * (0.2 + 0.8 * 2 / 8))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_best_weights_build_a_model(finished: Path) -> None:
    model = create_model("caformer_n4", checkpoint=finished / "best", num_classes=10, in_chans=1, image_size=8,
                         depths=[1, 1], dims=[16, 32])  # fmt: skip
    assert model.eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_resumed_equals_uninterrupted(finished: Path, tmp_path: Path, step: int) -> None:
    """From the first step, the middle of an epoch and late in the run: weights, average and metrics are bit-equal."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "metrics.csv"):
        (folder / name).write_bytes((finished / name).read_bytes())
    (folder / "checkpoints").mkdir()
    source = finished / "checkpoints" / f"step-{step:08d}"
    (folder / "checkpoints" / source.name).symlink_to(source)
    result = run("--resume", folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"going on from step {step}" in result.stdout
    for key in ("weights_sha256", "ema_sha256", "best_top1", "final_top1"):
        assert summary(folder)[key] == summary(finished)[key]
    assert read_metrics(folder) == read_metrics(finished)


def test_checkpoints_of_two_steps_differ(finished: Path) -> None:
    """So that the test above can fail."""
    saved = [load_checkpoint(finished / "checkpoints" / f"step-{step:08d}") for step in (9, 4)]
    key = "stages.0.blocks.0.mlp.fc1.weight"
    assert not torch.equal(saved[0].shared["model"][key], saved[1].shared["model"][key])
    assert not torch.equal(saved[0].rank_state["random"]["torch"], saved[1].rank_state["random"]["torch"])


LONGER = [*TINY, "optim.epochs=6", "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are interrupted in, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*LONGER, "--output", folder, cwd=folder.parent).returncode == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_resumed(whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A real signal in mid-run; SIGTERM and Ctrl-C save and exit 0, kill -9 leaves the last checkpoint."""
    settings = LONGER
    folder = tmp_path / "stopped"
    process = subprocess.Popen(
        command(*settings, "--output", folder), cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    wait_for_step(folder, 4, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0, err
        assert f"{number.name}: saved" in out and "--resume auto" in out
    assert not (folder / "summary.json").exists() or summary(folder)["steps"] != 30, "it was stopped before its end"
    again = run(*settings, "--output", folder, "--resume", "auto", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert summary(folder)["weights_sha256"] == summary(whole)["weights_sha256"]
    assert read_metrics(folder) == read_metrics(whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for later in (folder / "checkpoints").glob("step-*"):
        if int(later.name[5:]) > 6:
            shutil.rmtree(later)
    broken = folder / "checkpoints" / "step-00000006" / "shared.pt"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    result = run("--resume", folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "step-00000006" in result.stderr and "going on from step 5" in result.stdout
    assert summary(folder)["weights_sha256"] == summary(finished)["weights_sha256"]


def make_images(root: Path, classes: int) -> None:
    """8 grey images per class and split."""
    for label in range(classes):
        for split in ("train", "val"):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(8):
                Image.new("L", (8, 8), 40 * label + i).save(root / split / str(label) / f"{i}.png")


@pytest.mark.parametrize("name", ["run #2", "1e3", "yes", "'a'", " [1", "\udcff"])
def test_a_folder_of_any_name_is_trained_on_and_resumed(name: str, tmp_path: Path) -> None:
    try:
        make_images(tmp_path / name, 2)
    except OSError:
        pytest.skip("this file system has no such names")
    folder = tmp_path / (f"{name} runs" if name.isprintable() else "runs")
    settings = ["data.dataset=folder", f"data.root={name}", "data.batch_size=16", "optim.epochs=1"]
    result = run(*TINY, *settings, "--output", folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder / "report.html").unlink()
    result = run("--resume", folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "16 training and 16 validation images" in result.stdout and (folder / "report.html").exists()


def test_fine_tuning_replaces_the_head_and_says_so(finished: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "data", 5)
    settings = [*TINY, "data.dataset=folder", f"data.root={tmp_path / 'data'}", "data.batch_size=16", "optim.epochs=1",
                f"model.checkpoint={finished / 'best'}", "model.num_classes=5", "drop_path.rate=0.2"]  # fmt: skip
    result = run(*settings, "--output", tmp_path / "tuned", cwd=tmp_path)
    two = run(*settings, "runtime.threads=auto", "--dry-run", cwd=tmp_path, processes=2)
    assert f"{max(1, joblib.cpu_count(only_physical_cores=True) // 2)} CPU thread" in two.stdout, "cores are shared out"
    for done in (result, two):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("classifier of 10 classes replaced by a new one of 5") == 1
    assert summary(tmp_path / "tuned")["steps"] == 2


def test_two_processes_train_and_resume(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = [*TINY, "data.batch_size=128", "checkpoint.every_steps=3", "checkpoint.keep=100"]
    result = run(*settings, "--output", whole, cwd=tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    assert len(read_metrics(whole)) == 3
    shutil.copytree(whole, stopped)
    for later in (stopped / "checkpoints").glob("step-*"):
        if int(later.name[5:]) > 6:
            shutil.rmtree(later)
    result = run("--resume", stopped, cwd=tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    assert summary(stopped)["weights_sha256"] == summary(whole)["weights_sha256"]
    assert read_metrics(stopped) == read_metrics(whole)
    one = run("--resume", stopped, cwd=tmp_path)
    assert one.returncode == 2 and "2 processes" in one.stderr


def test_print_config_and_dry_run_write_nothing(tmp_path: Path) -> None:
    result = run("--print-config", "optim.lr=1e-2", cwd=tmp_path)
    assert result.returncode == 0 and "lr: 0.01" in result.stdout
    result = run("--dry-run", *TINY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("model", "1437 training", "drop path", "expected depth", "stages.1.blocks.0", "one step: loss"):
        assert word in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_a_run_would(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").touch()
    outputs = {"file": "cannot write to file", "file/run": "cannot write to file/run", "full": "is not empty",
               str(finished): "already holds a run"}  # fmt: skip
    for output, message in outputs.items():
        result = run(*TINY, "--dry-run", "--output", output, cwd=tmp_path)
        assert result.returncode == 2 and message in result.stderr, output
        assert "one step" not in result.stdout
    result = run("--dry-run", "--resume", finished, "optim.lr=0.5", cwd=tmp_path)
    assert result.returncode == 2 and "optim.lr is 0.5" in result.stderr
    result = run(*TINY, "--dry-run", "--output", "new/run", cwd=tmp_path)
    assert result.returncode == 0 and not (tmp_path / "new").exists()


def test_other_threads_are_warned_about(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for arguments in (["runtime.threads=2"], []):
        result = run("--resume", folder, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        before, now = (1, 2) if arguments else (2, 2)  # the run's config now says 2
        assert (f"threads was {before}, is now {now}; the result will not" in result.stderr) == (before != now)
        assert json.loads((folder / "environment.json").read_text())["threads"] == now
    result = run("--resume", folder, "runtime.compile=true", cwd=tmp_path)
    assert result.returncode == 2 and "runtime.compile is True" in result.stderr


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    result = run(*TINY, "optim.lr=1e30", "optim.warmup_epochs=0", "--output", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 1
    assert "is not finite on rank 0" in result.stderr and "training samples" in result.stderr
    assert "Traceback" not in result.stderr


MISTAKES = {
    "model": (["model.name=caformer_n5"], ["caformer_n5", "did you mean 'c"]),
    "key": (["optim.lrr=1"], ["optim.lrr", "did you mean 'optim.lr'"]),
    "model key": (["model.depht=[1,1]"], ["depht", "did you mean 'depths'"]),
    "type": (["optim.epochs=abc"], ["optim.epochs", "abc"]),
    "rate": (["drop_path.rate=1.5"], ["drop_path.rate", "1.5"]),
    "nan": (["drop_path.rate=.nan"], ["drop_path.rate"]),
    "length": (["drop_path.rate=null", "drop_path.profile=[0.1, 0.2]"], ["2 entries", "4 blocks"]),
    "mode": (["drop_path.mode=skp"], ["did you mean 'skip'"]),
    "missing data": (["data.dataset=folder", "data.root=nowhere"], ["nowhere"]),
    "config": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "checkpoint": (["model.checkpoint=nowhere"], ["nowhere"]),
    "device": (["runtime.device=cuda:7"], ["cuda:7"]),
    "resume": (["--resume", "nowhere"], ["nowhere"]),
    "batch": (["data.batch_size=5000"], ["1437"]),
    "threads": (["runtime.threads=0"], ["runtime.threads", "at least 1"]),
    "sizes": (["data.image_size=32"], ["data.image_size=32", "model.image_size is 16"]),
    "sharp sign": (["data.dataset=folder", "data.root=nowhere #2"], ["nowhere #2"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_cost_one_to_three_lines(name: str, tmp_path: Path) -> None:
    arguments, words = MISTAKES[name]
    result = run(*arguments, "--output", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert 1 <= len(result.stderr.strip().splitlines()) <= 3
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "run").exists()


def test_another_run_is_not_overwritten(finished: Path, tmp_path: Path) -> None:
    before = (finished / "metrics.csv").read_bytes()
    result = run(*TINY, "--output", finished, cwd=tmp_path)
    assert result.returncode == 2 and "already holds a run" in result.stderr
    result = run(*FULL, "optim.lr=0.5", "--output", finished, "--resume", "auto", cwd=tmp_path)
    assert result.returncode == 2 and "optim.lr is 0.5" in result.stderr
    (tmp_path / "file").touch()
    result = run(*TINY, "--output", tmp_path / "file" / "run", cwd=tmp_path)
    assert result.returncode == 2 and "cannot write" in result.stderr
    assert (finished / "metrics.csv").read_bytes() == before
