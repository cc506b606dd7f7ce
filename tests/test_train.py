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
from training.data import images

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


SLOWER = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGKILL, *SLOWER])
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
    idle = ["augment.crop_ratio=[0.5, 2.0]", "augment.mixup_off_epoch=1"]
    two = run(*settings, *idle, "runtime.threads=auto", "--dry-run", cwd=tmp_path, processes=2)
    assert f"{max(1, joblib.cpu_count(only_physical_cores=True) // 2)} CPU thread" in two.stdout, "cores are shared out"
    for done in (result, two):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("classifier of 10 classes replaced by a new one of 5") == 1
    for warning in ("augment.crop_ratio has no effect", "augment.mixup_off_epoch has no effect"):
        assert two.stderr.count(warning) == 1, "the main process alone warns"
    assert summary(tmp_path / "tuned")["steps"] == 2


@pytest.mark.slow
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
    one = run("--resume", stopped, "optim.accumulate=2", cwd=tmp_path)
    assert one.returncode == 0 and "saved by 2 processes, goes on with 1" in one.stderr, one.stderr
    assert "the total batch stays 256" in one.stderr
    assert "step 15 is step 18 of 18" in one.stderr, "a last step of an odd batch, which two processes had to leave out"
    assert summary(stopped)["weights_sha256"] == summary(whole)["weights_sha256"], "nothing was left to train"


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


# ---- the data of a run ----------------------------------------------------------------------------------------------


def write_images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), *, train: int = 6, val: int = 3) -> None:
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), 200 * label + 9 * i).save(root / split / name / f"{i}.png")


def on_folder(root: Path, *more: str) -> list[str]:
    return [*TINY, "data.dataset=folder", f"data.root={root}", "data.batch_size=4", "data.workers=0", *more]


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images` and, in `run`, one epoch of three of a run on them: what is resumed on other data."""
    folder = tmp_path_factory.mktemp("pets")
    write_images(folder / "images")
    assert run(*on_folder(folder / "images"), "--output", folder / "run", cwd=folder).returncode == 0
    for later in (folder / "run" / "checkpoints").glob("step-*"):
        if int(later.name[5:]) > 6:
            shutil.rmtree(later)
    return folder


def rename_class(root: Path, old: str, new: str) -> None:
    for split in ("train", "val"):
        (root / split / old).rename(root / split / new)


CHANGES = {
    "labels swapped": (lambda root: rename_class(root, "cat", "zebra"), "classes gone: 'cat', new: 'zebra'"),
    "third class": (lambda root: write_images(root, ("bird",)), "classes new: 'bird'"),
    "fewer": (lambda root: [(root / f"train/{c}/{i}.png").unlink() for c in ("cat", "dog") for i in range(1, 6)],
              "class 'cat' had 6 training images, has 1 (and 1 more classes changed)"),
    "more": (lambda root: (root / "val/dog/9.png").write_bytes((root / "val/dog/0.png").read_bytes()),
             "class 'dog' had 3 validation images, has 4"),
    "renamed file": (lambda root: (root / "train/cat/0.png").rename(root / "train/cat/7.png"), "other names"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_on_other_data_is_refused(pets: Path, tmp_path: Path, change: str) -> None:
    act, words = CHANGES[change]
    shutil.copytree(pets, tmp_path / "pets")
    act(tmp_path / "pets" / "images")
    before = {p: p.read_bytes() for p in (tmp_path / "pets" / "run").rglob("*") if p.is_file()}
    result = run("--resume", tmp_path / "pets" / "run", f"data.root={tmp_path / 'pets' / 'images'}", cwd=tmp_path)
    assert result.returncode == 2 and words in result.stderr, result.stderr
    assert 1 <= len(result.stderr.strip().splitlines()) <= 3
    assert {p: p.read_bytes() for p in (tmp_path / "pets" / "run").rglob("*") if p.is_file()} == before


def test_the_root_may_move(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets / "run", tmp_path / "run")
    shutil.copytree(pets / "images", tmp_path / "elsewhere")
    result = run("--resume", tmp_path / "run", f"data.root={tmp_path / 'elsewhere'}", cwd=tmp_path)
    assert result.returncode == 0 and "going on from step 6" in result.stdout, result.stderr
    assert summary(tmp_path / "run")["weights_sha256"] == summary(pets / "run")["weights_sha256"]


def test_a_run_that_was_killed_before_its_first_checkpoint_knows_its_data_too(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets / "run", tmp_path / "run")
    for name in ("checkpoints", "best"):
        shutil.rmtree(tmp_path / "run" / name)
    for name in ("summary.json", "metrics.csv"):
        (tmp_path / "run" / name).unlink()
    write_images(tmp_path / "other", ("hen", "pig"))
    result = run("--resume", tmp_path / "run", f"data.root={tmp_path / 'other'}", cwd=tmp_path)
    assert result.returncode == 2 and "classes gone: 'cat', 'dog', new: 'hen', 'pig'" in result.stderr


def test_fine_tuning_on_other_classes_of_the_same_number_replaces_the_head(pets: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "farm", ("cow", "pig"))
    from_pets = f"model.checkpoint={pets / 'run' / 'best'}"
    result = run(*on_folder(tmp_path / "farm", from_pets), "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    words = "classifier of 2 classes replaced by a new one of 2, though of as many: classes gone: 'cat', 'dog', new: "
    assert result.stdout.count(f"{words}'cow', 'pig'") == 1
    result = run(*on_folder(pets / "images", from_pets), "--dry-run", cwd=tmp_path)
    assert result.returncode == 0 and "replaced" not in result.stdout


def test_print_config_names_the_classes(pets: Path, tmp_path: Path) -> None:
    assert "class_names: [cat, dog]" in run(*on_folder(pets / "images"), "--print-config", cwd=tmp_path).stdout
    assert "class_names: [cat, dog]" in run("--resume", pets / "run", "--print-config", cwd=tmp_path).stdout
    assert 'class_names: ["0"' in run("--print-config", cwd=tmp_path).stdout.replace("'", '"')
    result = run(*on_folder(tmp_path / "nowhere"), "--print-config", cwd=tmp_path)
    assert result.returncode == 0 and "class_names: null" in result.stdout and "nowhere" in result.stderr


# ---- data that cannot be read ---------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Damages a PNG amid its pixels, where only decoding finds it."""
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "workers"), [("train/cat/3.png", 2), ("val/dog/1.png", 0), ("val/dog/1.png", 2)])
def test_an_unreadable_image_costs_three_lines(tmp_path: Path, monkeypatch, name: str, workers: int) -> None:
    monkeypatch.setattr(images, "FULL_CHECK_LIMIT", 0)  # as in a folder of many images
    write_images(tmp_path / "images")
    flip(tmp_path / "images" / name)
    settings = on_folder(tmp_path / "images", f"data.workers={workers}")
    result = run(*settings, "--output", tmp_path / "run", cwd=tmp_path)
    lines = result.stderr[result.stderr.index("error: ") :].splitlines()  # behind the bars
    assert result.returncode == 1 and len(lines) <= 3, result.stderr
    assert lines[0].startswith(f"error: cannot read image '{tmp_path / 'images' / name}': ")
    if name.startswith("val"):
        assert lines[-1] == "the run is saved at step 3: go on with --resume"
    skipped = run(*settings, "data.on_error=skip", "--output", tmp_path / "run", "--resume", "auto", cwd=tmp_path)
    assert skipped.returncode == 0, skipped.stderr
    part = name.partition("/")[0]
    assert summary(tmp_path / "run")["skipped_images"] == {"train": int(part == "train"), "val": int(part == "val")}
    assert f"1 for {'training, replaced' if part == 'train' else 'validation, left out'}" in skipped.stdout
    assert f"{part},{name}," in (tmp_path / "run" / "skipped.csv").read_text()
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.slow
def test_all_processes_stop_where_one_cannot_read(tmp_path: Path) -> None:
    write_images(tmp_path / "images", train=8)
    script = (
        "from training.data import images; images.FULL_CHECK_LIMIT = 0; import train; raise SystemExit(train.main())"
    )
    (tmp_path / "unchecked.py").write_text(script)
    flip(tmp_path / "images" / "val" / "cat" / "0.png")  # of rank 0
    settings = [*on_folder(tmp_path / "images"), "--output", tmp_path / "run"]
    launch = [str(a) for a in command(*settings, processes=2)]
    launch[launch.index(str(ROOT / "train.py"))] = str(tmp_path / "unchecked.py")
    result = subprocess.run(launch, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.count("error: cannot read image") == 1
    assert result.stderr.count("error: stopped, because another process could not read its data") == 1
    assert "loop.py" not in result.stderr, "the launcher has a traceback of its own, the processes have none"
    flip(tmp_path / "images" / "val" / "cat" / "0.png")  # mends it
    result = run("--resume", tmp_path / "run", cwd=tmp_path, processes=2)
    assert result.returncode == 0 and "going on from step 2" in result.stdout, result.stderr
    assert len(read_metrics(tmp_path / "run")) == 3


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
    "batch": (["data.batch_size=5000"], ["1,437"]),
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
