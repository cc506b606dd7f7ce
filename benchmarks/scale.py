"""How cost grows: over processes, batch, resolution and depth, and over the number of images of a data set."""

import argparse
import contextlib
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import ROOT, Commands, machine, peak_memory, step_time
from files.errors import Failure
from models.factory import create_model
from stochastic_depth import set_drop_path
from training.config import AugmentSection, DataSection
from training.data.build import build_datasets
from training.data.images import check_images
from training.data.loading import build_train_loader
from training.data.transforms import ImageSpec

PARTS = ("processes", "memory", "depth", "names")

RANKS = {
    "digits": ["data.batch_size=32"],
    "poolformer_s12, 64 px": ["model.name=poolformer_s12", "model.image_size=64", "data.batch_size=32"],
}
"""Settings of the digits' config by name."""

WANTED_NAMES = {"seconds": 20.0, "gigabytes": 1.0}
"""For 1.3 million file names."""


def add_parsers(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Adds `scale` to the command line."""
    parser = commands.add_parser(
        "scale", help="cost over processes, batch, resolution, depth and images", parents=[common]
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="poolformer_s12", help="for memory and depth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="of each run")
    parser.add_argument("--names", type=int, nargs="*", default=[50_000, 1_300_000], help="images of a data set")
    parser.add_argument("--kind", choices=("folder", "csv"), help=argparse.SUPPRESS)  # one measurement, in its process
    parser.set_defaults(run=scale_benchmark)


def scale_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """The parts that are asked for; an existing JSON keeps the others."""
    if args.kind is not None:
        return start_up(args.kind, args.names[0])
    text = args.output.read_text()
    result = json.loads(text).get("parts", {}) if text else {}
    torch.set_num_threads(1)
    for part in args.parts:
        result[part] = {
            "processes": lambda: processes(args.rounds, args.epochs),
            "memory": lambda: memory(args.model),
            "depth": lambda: depth(args.model, args.rounds),
            "names": lambda: names(args.names),
        }[part]()
    return {"machine": machine(1), "parts": result, "wanted_names": WANTED_NAMES}


# ---- processes ----------------------------------------------------------------------------------------------------


def throughput(ranks: int, settings: list[str], epochs: int) -> float:
    """Images per second, of all processes together, of the last epoch of a run on `ranks` processes of one thread.

    Raises:
        Failure: The run fails; with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, "train.py", *settings, "runtime.threads=1", f"optim.epochs={epochs}"]
        command += ["optim.warmup_epochs=0", f"checkpoint.every_epochs={epochs}", "--output", str(output)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"{ranks} processes: {(done.stderr.strip().splitlines() or [''])[-1]}")
        with (output / "metrics.csv").open() as file:
            return float(list(csv.DictReader(file))[-1]["images_per_second"])


def processes(rounds: int, epochs: int) -> list[dict[str, Any]]:
    """Two processes over one, in turns. Weak: each has the batch that one had; strong: they share it."""
    rows = []
    for name, settings in RANKS.items():
        batch = 32
        half = [s.replace(f"batch_size={batch}", f"batch_size={batch // 2}") for s in settings]
        found: dict[str, list[float]] = {"one": [], "weak": [], "strong": []}
        for _ in range(rounds):
            found["one"].append(throughput(1, settings, epochs))
            found["weak"].append(throughput(2, settings, epochs))
            found["strong"].append(throughput(2, half, epochs))
        row: dict[str, Any] = {"setting": name, "batch": batch, "one": round(statistics.median(found["one"]), 1)}
        for kind in ("weak", "strong"):
            ratios = [a / b for a, b in zip(found[kind], found["one"], strict=True)]
            row[kind] = {"over_one": round(statistics.median(ratios), 3), "all": [round(r, 3) for r in ratios]}
        rows.append(row)
        print(row, flush=True)
    return rows


# ---- batch, resolution, depth -------------------------------------------------------------------------------------


def memory(name: str) -> list[dict[str, Any]]:
    """Peak MiB of a training step beside weights and images, masking and skipping at a constant rate of 0.4."""
    rows = []
    for batch, pixels in ((4, 64), (8, 64), (16, 64), (32, 64), (8, 32), (8, 128), (8, 224)):
        row: dict[str, Any] = {"batch": batch, "pixels": pixels}
        for mode in ("mask", "skip"):
            torch.manual_seed(0)
            model = create_model(name, num_classes=10)
            set_drop_path(model, 0.4, profile="constant", mode=mode)  # type: ignore[arg-type]
            row[f"{mode}_mb"] = peak_memory(model.train(), torch.randn(batch, 3, pixels, pixels))
        rows.append(row)
        print(row, flush=True)
    return rows


def depth(name: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a training step over depth, masking and skipping, in turns."""
    images, rows = torch.randn(8, 3, 64, 64), []
    for factor in (1, 2, 4, 8):
        depths = [factor, factor, 3 * factor, factor]
        models = {}
        for mode in ("mask", "skip"):
            models[mode] = create_model(name, num_classes=10, depths=depths).train()
            set_drop_path(models[mode], 0.4, profile="constant", mode=mode)  # type: ignore[arg-type]
            step_time(models[mode], images)
        times: dict[str, list[float]] = {mode: [] for mode in models}
        for _ in range(2 * rounds + 1):
            for mode, model in models.items():
                times[mode].append(step_time(model, images))
        row: dict[str, Any] = {"depths": depths, "blocks": sum(depths)}
        rows.append(row | {f"{mode}_ms": round(1000 * statistics.median(t), 1) for mode, t in times.items()})
        print(rows[-1], flush=True)
    return rows


# ---- the number of images -----------------------------------------------------------------------------------------


def names(counts: list[int]) -> list[dict[str, Any]]:
    """Start-up on data sets of so many images, each in a fresh process, whose peak memory is its own."""
    rows = []
    for count in counts:
        for kind in ("folder", "csv"):
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "row.json"
                command = [sys.executable, "benchmark.py", "scale", "--kind", kind, "--names", str(count)]
                done = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    raise Failure(f"{kind}: {(done.stderr.strip().splitlines() or [''])[-1]}")
                row = json.loads(output.read_text())
            rows.append({key: row[key] for key in ("kind", "images", "seconds", "peak_mb", "libraries_mb")})
            print(rows[-1], flush=True)
    return rows


def peak_mb() -> float:
    """Peak resident memory of this process in MB, what its libraries take included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


@contextlib.contextmanager
def image_tree(images: int, classes: int = 1000) -> Iterator[Path]:
    """A folder of so many training images and up to 50 validation images a class: links to one small JPEG per class."""
    memory = Path("/dev/shm")  # a folder of such a size is made in seconds there
    classes = min(classes, max(2, images // 50))
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as root:
        rng = np.random.default_rng(0)
        for number in range(classes):
            picture = Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8))
            for part, count in (("train", images // classes), ("val", 50)):
                folder = Path(root) / part / f"n{number:08d}"
                folder.mkdir(parents=True)
                stem = f"{folder}/n{number:08d}_"
                picture.save(f"{stem}0.JPEG")
                for i in range(1, count):
                    os.link(f"{stem}0.JPEG", f"{stem}{i}.JPEG")
        yield Path(root)


def write_table(root: Path, part: str) -> Path:
    """A table of one part of an image tree: path, label."""
    file = root / f"{part}.csv"
    with file.open("w") as table:
        table.write("path,label\n")
        for folder in sorted((root / part).iterdir()):
            table.writelines(f"{part}/{folder.name}/{name},{folder.name}\n" for name in os.listdir(folder))
    return file


def start_up(kind: str, images: int) -> dict[str, Any]:
    """Seconds of what a run does with the data before its first step, and the peak memory of this process.

    `data`: from the folder or table to training and validation parts and their identity. `batch`: the first batch. `check`:
    looking at the ends of the files, of 50,000 at most.
    """
    spec = ImageSpec((3, 48, 48), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    with image_tree(images) as root:
        section = DataSection(dataset="folder", root=str(root), workers=0, batch_size=32)
        if kind == "csv":
            files = {f"{part}_file": str(write_table(root, part)) for part in ("train", "val")}
            section = DataSection(dataset="csv", workers=0, batch_size=32, **files)  # type: ignore[arg-type]
        libraries, start = peak_mb(), time.perf_counter()
        bundle = build_datasets(section, AugmentSection(), spec, seed=0)
        seconds = {"data": time.perf_counter() - start}
        start = time.perf_counter()
        next(iter(build_train_loader(bundle, section, seed=0, device=torch.device("cpu"))))
        seconds["batch"] = time.perf_counter() - start
        if len(bundle.train) <= 50_000:
            start = time.perf_counter()
            check_images(bundle)
            seconds["check"] = time.perf_counter() - start
    return {
        "kind": kind,
        "images": len(bundle.train) + len(bundle.val),
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
        "peak_mb": peak_mb(),
        "libraries_mb": libraries,
    }
