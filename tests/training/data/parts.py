"""What tests of data share: small configs, data sets, images and the form of a mistake's message."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from files.errors import ConfigError
from training.config import AugmentSection, DataSection
from training.data.build import build_datasets
from training.data.dataset import DataBundle, TrainDataset, ValDataset
from training.data.loading import EpochSampler, build_train_loader, build_val_loader
from training.data.skipping import SkipList
from training.data.source import place
from training.data.transforms import ImageSpec

TESTS = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GREY = ImageSpec((1, 16, 16), (0.3,), (0.35,))
COLOUR = ImageSpec((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
AFFINE: dict[str, Any] = {"rotate": 15.0, "translate": 0.1, "zoom": 0.1}

EVERYTHING: dict[str, Any] = {
    **AFFINE,
    "auto_augment": "rand-m9-mstd0.5",
    "random_erasing": 0.7,
    "color_jitter": 0.4,
    "crop_scale": [0.5, 1.0],
    "hflip": 0.5,
}

POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.7-mmax8-t3aw", "augmix-m5-w4-d2", "original", "v0r-mstd0.5", "3a"]


def augment_section(**values: Any) -> AugmentSection:
    section: dict[str, Any] = {"hflip": 0.0, **values}
    return AugmentSection(**section)


def data_section(**values: Any) -> DataSection:
    section: dict[str, Any] = {"dataset": "digits", "batch_size": 8, "workers": 0, **values}
    return DataSection(**section)


def digits(spec: ImageSpec = GREY, *, seed: int = 0, **augment: Any) -> DataBundle:
    return build_datasets(data_section(), augment_section(**augment), spec, seed=seed)


def folder(root: Path, spec: ImageSpec = COLOUR, *, seed: int = 0, **augment: Any) -> DataBundle:
    return build_datasets(data_section(dataset="folder", root=str(root)), augment_section(**augment), spec, seed=seed)


def train_loader(bundle: DataBundle, *, seed: int = 0, rank: int = 0, world_size: int = 1, **data: Any) -> DataLoader:
    section = data_section(**data)
    return build_train_loader(bundle, section, seed=seed, rank=rank, world_size=world_size, device=CPU)


def sampler_of(loader: DataLoader) -> EpochSampler:
    assert isinstance(loader.batch_sampler, EpochSampler)
    return loader.batch_sampler


def write_image(path: Path, *, size: tuple[int, int] = (24, 20), seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target, target_is_directory=True)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def fails(*parts: str) -> Any:
    """The ConfigError's message is up to three lines and has each part."""

    class Check:
        def __enter__(self) -> None:
            self.raises = pytest.raises(ConfigError)
            self.info = self.raises.__enter__()

        def __exit__(self, *error: Any) -> bool:
            caught = self.raises.__exit__(*error)
            message = str(self.info.value)
            assert len(message.splitlines()) <= 3
            assert [part for part in parts if part not in message] == [], message
            return bool(caught)

    return Check()


def paths(dataset: TrainDataset | ValDataset) -> list[str]:
    return [place(dataset.source, index) for index in range(len(dataset))]


def damage(dataset: TrainDataset | ValDataset, *indices: int) -> Path:
    """Cuts these images short; returns the last one's path."""
    path = Path()
    for index in indices:
        path = Path(paths(dataset)[index])
        path.write_bytes(path.read_bytes()[:60])
    return path


def loaders(bundle: DataBundle, **data: Any) -> dict[str, DataLoader]:
    data = {"batch_size": 5, **data}
    return {"train": train_loader(bundle, **data), "val": build_val_loader(bundle, data_section(**data), device=CPU)}


def skipping(root: Path, *, seed: int = 0, **data: Any) -> tuple[DataBundle, SkipList]:
    section = data_section(dataset="folder", root=str(root), on_error="skip", **data)
    return build_datasets(section, augment_section(**EVERYTHING), COLOUR, seed=seed), SkipList(section)


def refused(**values: Any) -> str:
    """Why the section `data` is refused."""
    with pytest.raises(ValidationError) as caught:
        DataSection(**values)
    return str(caught.value)
