"""Shards for tests, written with Python's tarfile."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from training.config import DataSection

Member = tuple[str, bytes]


def picture(seed: int, size: tuple[int, int] = (20, 18), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def samples(labels: Sequence[object], *, seed: int = 0, json_key: str | None = None) -> list[Member]:
    """Members KEY.png and KEY.cls; with a key, KEY.json in the place of the latter."""
    members = []
    for number, label in enumerate(labels):
        key = f"{seed + number:05d}"
        about = (f"{key}.cls", str(label).encode())
        if json_key is not None:
            about = (f"{key}.json", json.dumps({json_key: label, "width": 20}).encode())
        members += [(f"{key}.png", picture(seed + number)), about]
    return members


def write_shard(path: Path, members: Sequence[Member], *, kind: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def write_shards(root: Path, labels: Sequence[object] = (0, 1, 2), *, train: int = 2, per_shard: int = 6) -> Path:
    """ROOT/train/000.tar, 001.tar, ... and ROOT/val/000.tar with labels in turn."""
    every = [labels[i % len(labels)] for i in range((train + 1) * per_shard)]
    for number in range(train + 1):
        start = number * per_shard
        part, name = ("train", f"{number:03d}.tar") if number < train else ("val", "000.tar")
        write_shard(root / part / name, samples(every[start : start + per_shard], seed=start))
    return root


def section(root: Path | None = None, **values: object) -> DataSection:
    given: dict = {"dataset": "webdataset", "batch_size": 4, "workers": 0, "root": root and str(root), **values}
    return DataSection(**given)
