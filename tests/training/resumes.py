"""Runs that are interrupted and go on: what they may be made of, in rows that cover every pair, and how they are compared."""

import csv
import io
import itertools
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from tests.training.parts import build_tiny
from training import loop
from training import setup as building
from training.checkpoint import latest_checkpoint
from training.data.loading import end_workers
from training.report import page
from training.run_folder import RunFolder
from training.state import RunState, Snapshot

# What a run may be made of. A further kind of data, or a further sampler, is an entry here; `{root}` is a folder that
# `write_images` has filled.
FACTORS: Mapping[str, Mapping[str, list[str]]] = {
    "mode": {mode: [f"drop_path.mode={mode}", "drop_path.break_even=0.0"] for mode in ("skip", "batch")}
    | {"mask": ["drop_path.mode=mask"]},
    "schedule": {
        "constant": [],
        "ramp": ["drop_path.schedule={kind: ramp, start: 0.3}"],
        "early": ["drop_path.schedule={kind: early, cutoff_epochs: 1.4}"],
        "late": ["drop_path.schedule={kind: late, cutoff_epochs: 0.7}"],
        "cosine": ["drop_path.schedule={kind: cosine, end: 0.8}"],
        "piecewise": ["drop_path.schedule={kind: piecewise, points: [[0, 0.2], [1, 1.0], [2, 0.5]]}"],
    },
    "accumulate": {"1": [], "2": ["optim.accumulate=2"], "3": ["optim.accumulate=3"]},
    "ema": {"none": [], "ema": ["ema={enabled: true, decay: 0.8}"], "warmup": ["ema={enabled: true, warmup: true}"]},
    "mixing": {"none": [], "mixup": ["augment.mixup=0.4"], "both": ["augment.mixup=0.4", "augment.cutmix=1.0"]},
    "erasing": {"none": [], "erasing": ["augment.random_erasing=0.6"]},
    "workers": {str(count): [f"data.workers={count}"] for count in (0, 1, 2)},
    "data": {
        "digits": [],
        "folder": ["data={dataset: folder, root: {root}, batch_size: 4}"],
        "skipping": ["data={dataset: folder, root: {root}-damaged, batch_size: 4, on_error: skip}"],
        "policy": ["data={dataset: folder, root: {root}, batch_size: 4}", "augment.auto_augment=rand-m9-mstd0.5"],
        "split": ["data={dataset: folder, root: {root}/train, batch_size: 4, val_fraction: 0.1, train_samples: 17}"],
        "csv": ["data={dataset: csv, root: {root}, train_file: {root}/train.csv, val_file: {root}/val.csv, batch_size: 4}"],
        "shards": ["data={dataset: webdataset, root: {root}-shards, batch_size: 4}"],
        "huggingface": ["data={dataset: huggingface, root: {root}-arrow, batch_size: 4}"],
        "mnist5k": ["data={dataset: mnist5k, classes: ['3', '8'], train_samples: 22, batch_size: 4}"],
    },
    "classes": {
        "as they are": [],
        "balanced": ["data.sampler=balanced"],
        "half": ["data.sampler=balanced", "data.balance_power=0.5"],
        "weighted": ["loss.class_weights=auto"],
        "bce": ["loss={name: bce, class_weights: auto}"],
        "focal": ["loss={name: focal, gamma: 1.5}"],
    },
    "saving": {"thread": [], "waiting": ["checkpoint.background=false"]},
    "killed": {name: [] for name in ("in a step", "in a save", "before validation", "in validation", "behind its row")},
}  # fmt: skip
# the data first: a section given as a whole replaces what was said of it before
ORDER = ["data", *(factor for factor in FACTORS if factor != "data")]
LENGTH = ["optim={lr: 3e-3, epochs: 3, warmup_epochs: 1}", "checkpoint={every_epochs: 1, every_steps: 2, keep: 9}"]


def rows_of_pairs(factors: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows with a value of each factor, such that every two values of two factors stand together in one; greedily few."""
    draw = random.Random(0)
    open_pairs = {
        ((a, x), (b, y)) for a, b in itertools.combinations(factors, 2) for x in factors[a] for y in factors[b]
    }
    rows = []
    while open_pairs:
        row = dict(draw.choice(sorted(open_pairs)))
        for factor in sorted(factors, key=lambda f: -len(factors[f])):
            if factor not in row:
                values = list(factors[factor])
                draw.shuffle(values)
                row[factor] = max(values, key=lambda v: len(pairs_in({**row, factor: v}, factors) & open_pairs))
        open_pairs -= pairs_in(row, factors)
        rows.append({factor: row[factor] for factor in factors})
    return rows


def pairs_in(row: Mapping[str, str], factors: Mapping[str, Any]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    there = [(factor, row[factor]) for factor in factors if factor in row]
    return set(itertools.combinations(there, 2))


def settings(row: Mapping[str, str], root: Path) -> list[str]:
    """The overrides of a row."""
    chosen = [text for factor in ORDER if factor in row for text in FACTORS[factor][row[factor]]]
    return [*LENGTH, *(text.replace("{root}", str(root)) for text in chosen)]


def write_images(root: Path) -> None:
    """22 training and 6 validation images of two classes, 5 batches of 4; beside them a copy with two damaged ones.

    In the folder stand tables of them, and beside it they are as shards and as a data set of Hugging Face.
    """
    for folder, damaged in ((root, ()), (root.with_name(f"{root.name}-damaged"), ("train/dog/3", "val/cat/1"))):
        for part, count in (("train", 11), ("val", 3)):
            for label, name in enumerate(("cat", "dog")):
                for i in range(count):
                    path = folder / part / name / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (9, 8), (100 * label + 9 * i, 40, 9 * i)).save(path)
                    if f"{part}/{name}/{i}" in damaged:
                        path.write_bytes(b"")
    parts = {part: sorted((root / part).rglob("*.png")) for part in ("train", "val")}
    for part, files in parts.items():
        rows = [f"{path.relative_to(root).as_posix()},{path.parent.name}\n" for path in files]
        (root / f"{part}.csv").write_text("path,label\n" + "".join(rows))
        shard = root.with_name(f"{root.name}-shards") / part / "0.tar"
        shard.parent.mkdir(parents=True)
        with tarfile.open(shard, "w") as tar:
            for number, path in enumerate(files):
                for end, content in (("png", path.read_bytes()), ("cls", path.parent.name.encode())):
                    member = tarfile.TarInfo(f"{number:03d}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    tables: dict[Any, Any] = {
        part: datasets.Dataset.from_dict(
            {"image": [str(path) for path in files], "label": [path.parent.name for path in files]}, features=features
        )
        for part, files in (("train", parts["train"]), ("validation", parts["val"]))
    }
    datasets.DatasetDict(dict(tables)).save_to_disk(str(root.with_name(f"{root.name}-arrow")))


def train(folder: Path, overrides: list[str], *, resume: bool = False) -> dict[str, Any]:
    """Trains in this process, as a new one would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_report", lambda _: None)  # its pictures take longer than all the rest
        patch.setattr(building, "check_images", lambda *_, **__: None)  # as in a folder of more images
        setup = build_tiny(*overrides)
        run_folder = RunFolder(folder)
        run_folder.make(fresh=not resume)
        checkpoint = latest_checkpoint(run_folder.checkpoints) if resume else None
        try:
            return loop.train(setup, run_folder, checkpoint)
        finally:
            for loader in (setup.train_loader, setup.val_loader):
                end_workers(loader)


def result(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted run and one that nobody interrupted have to have in common: all but the times."""
    with (folder / "metrics.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in csv.DictReader(file)
        ]
    keys = ("weights_sha256", "ema_sha256", "best_top1", "final_top1", "steps", "epochs", "skipped_images")
    best = (folder / "best" / "model.safetensors").read_bytes()
    told = {"metrics": rows, "best": best, "drop_path": (folder / "drop_path.csv").read_text()}
    told["rates"] = (folder / "rates.csv").read_text()
    return {**told, **{key: summary[key] for key in keys}}


class KilledError(Exception):
    """Stands for the end of a process; what it leaves on disk is what a kill there would."""


@contextmanager
def killed(where: str, count: int) -> Iterator[None]:
    """The `count`-th time that a run in this block comes to `where`, from 1, it ends."""
    came = itertools.count(1)

    def ending(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(came) == count:
                raise KilledError(where)
            return real(*arguments, **options)

        return call

    owner, name = {
        "in a step": (loop, "train_step"),
        "in a save": (Snapshot, "write"),
        "before validation": (loop, "validate"),
        "in validation": (loop, "evaluate"),
        "behind its row": (loop, "save_text"),
    }[where]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, ending(getattr(owner, name)))
        yield


def interrupted(folder: Path, overrides: list[str], stops: list[tuple[str, int]], last: list[str]) -> dict[str, Any]:
    """Trains, ended at each of the stops in turn and resumed; the last time with further settings and to the end."""
    for number, (where, count) in enumerate(stops):
        with killed(where, count), pytest.raises(KilledError):
            train(folder, overrides, resume=number > 0)
    return result(folder, train(folder, [*overrides, *last], resume=True))


@contextmanager
def without_state(name: str) -> Iterator[None]:
    """Runs in this block neither save nor restore that state."""
    real = RunState.__init__

    def make(state: RunState, setup: Any) -> None:
        real(state, setup)
        del state.table[name]
        state.per_rank = tuple(n for n in state.per_rank if n != name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "__init__", make)
        yield
