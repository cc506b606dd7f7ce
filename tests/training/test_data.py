"""Data sets, augmentation, sampling and mixing: purity, sharding, random states, and every mistake a user can make."""

import csv
import errno
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile
from torch.utils.data import DataLoader

from configs import CONFIGS
from files.errors import ConfigError
from training import config as config_module
from training.config import AugmentSection, DataSection, load_config
from training.data import digits as digits_module
from training.data import draws as draws_module
from training.data import images as images_module
from training.data import skipping as skipping_module
from training.data import transforms
from training.data.build import build_datasets, class_names_of_data
from training.data.dataset import DataBundle, ReadError, TrainDataset, Unreadable, ValDataset
from training.data.digits import digits_split
from training.data.identity import check_same_data, data_difference
from training.data.images import check_images, read_image, to_rgb
from training.data.loading import EpochSampler, build_train_loader, build_val_loader
from training.data.mixing import BatchMixer
from training.data.skipping import PartialBatch, SkipList, lost_worker
from training.data.transforms import ImageSpec
from training.distributed import World
from training.loop import train
from training.run_folder import RunFolder
from training.setup import build, describe

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


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """Three classes, 5 training and 2 validation images each, of several sizes, modes and formats."""
    root = tmp_path / "flowers"
    for c, name in enumerate(["aster", "daisy", "tulip"]):
        for i in range(5):
            kind = {3: ("grey.jpg", "L"), 4: ("clear.png", "RGBA")}.get(i, ("plain.JPEG", "RGB"))
            write_image(
                root / "train" / name / f"{i}-{kind[0]}", size=(20 + 3 * i, 26 - c), seed=10 * c + i, mode=kind[1]
            )
        for i in range(2):
            write_image(root / "val" / name / "deeper" / f"{i}.jpg", seed=100 + 10 * c + i)
    (root / "train" / "aster" / "notes.txt").write_text("not an image")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    return root


def global_states() -> list[Any]:
    return [random.getstate(), *[str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()]


@pytest.fixture
def unmoved_random_states() -> Iterator[None]:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = global_states()
    yield
    assert global_states() == before


# --- Purity ---


@pytest.mark.parametrize("augment", [AFFINE, EVERYTHING], ids=["affine", "everything"])
@pytest.mark.parametrize("spec", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("source", ["digits", "folder"])
def test_a_sample_is_a_pure_function_of_seed_epoch_and_index(
    source: str, spec: ImageSpec, augment: dict[str, Any], image_root: Path
) -> None:
    def build(seed: int) -> DataBundle:
        return (
            digits(spec, seed=seed, **augment) if source == "digits" else folder(image_root, spec, seed=seed, **augment)
        )

    train = build(seed=3).train
    positions = [(2, 7), (2, 0), (2, 11), (4, 7), (2, 7)]
    batch: list[Any] = train.__getitems__(positions)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    again = build(seed=3).train
    for position, (image, target, index) in zip(positions, batch, strict=True):
        assert torch.equal(image, again[position][0])
        assert image.shape == spec.input_size and image.dtype == torch.float32 and type(image) is torch.Tensor
        assert (target, index) == (train.targets[position[1]], position[1])
    assert not torch.equal(batch[0][0], batch[3][0]), "epochs 2 and 4 should differ"
    assert not torch.equal(batch[0][0], build(seed=4).train[2, 7][0]), "seeds 3 and 4 should differ"


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_worker_counts_do_not_matter(source: str, image_root: Path) -> None:
    bundle = digits(**EVERYTHING) if source == "digits" else folder(image_root, **EVERYTHING)
    bundle.train.targets = bundle.train.targets[:15]  # fewer digits, for speed

    def epochs(workers: int) -> list[list[torch.Tensor]]:
        loader = train_loader(bundle, batch_size=4, workers=workers)
        batches = []
        for epoch in (0, 1):
            sampler_of(loader).set_position(epoch)
            batches += list(loader)
        return batches

    expected = epochs(0)
    assert len(expected) == 6
    for workers in (1, 2):
        for batch, reference in zip(epochs(workers), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, reference, strict=True))


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_fetching_batches_leaves_the_global_random_states_alone(
    source: str, image_root: Path, unmoved_random_states: None
) -> None:
    bundle = digits(**EVERYTHING) if source == "digits" else folder(image_root, **EVERYTHING)
    loader = train_loader(bundle, batch_size=6)
    next(iter(loader))
    next(iter(build_val_loader(bundle, data_section(), device=CPU)))
    next(iter(train_loader(bundle, batch_size=6, workers=1)))


def test_a_failing_image_leaves_the_global_random_states_alone(image_root: Path, unmoved_random_states: None) -> None:
    bundle = folder(image_root, **EVERYTHING)
    Path(bundle.train.source.paths[1]).write_bytes(b"")
    _, damaged = bundle.train.__getitems__([(0, 0), (0, 1)])
    assert isinstance(damaged, Unreadable)
    with pytest.raises(ReadError):
        bundle.train[0, 1]


# --- Digits ---


def test_the_split_of_digits_is_fixed_and_stratified() -> None:
    train, val = digits_split()
    assert (len(train), len(val)) == (1437, 360)
    assert sorted([*train, *val]) == list(range(1797))
    digest = hashlib.sha256(val.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "b4e1b49bccec4bc4"
    bundle, other = digits(seed=0), digits(seed=1)
    assert bundle.val.targets == other.val.targets and bundle.train.targets == other.train.targets
    every = bundle.train.targets + bundle.val.targets
    for digit in range(10):
        assert abs(bundle.val.targets.count(digit) - 0.2 * every.count(digit)) < 1
    assert bundle.num_classes == 10 and bundle.class_names == list("0123456789")


def test_digits_are_resized_and_normalised() -> None:
    spec = ImageSpec((1, 8, 8), (0.25,), (0.5,))
    bundle = digits(spec)
    from sklearn.datasets import load_digits

    pixels = np.asarray(load_digits(return_X_y=True)[0])[digits_split()[1][5]].reshape(1, 8, 8) / 16
    torch.testing.assert_close(bundle.val[5][0], torch.tensor((pixels - 0.25) / 0.5).float())
    larger = digits(ImageSpec((3, 20, 12), (0.5,) * 3, (0.25,) * 3)).val[5][0]
    assert larger.shape == (3, 20, 12)
    assert larger.mean().item() == pytest.approx((pixels.mean() - 0.5) / 0.25, abs=0.05)


def test_colour_digits_repeat_the_grey_channel() -> None:
    grey = digits(ImageSpec((1, 16, 12), (0.0,), (1.0,)), **AFFINE)
    colour = digits(ImageSpec((3, 16, 12), (0.0,) * 3, (1.0,) * 3), **AFFINE)
    for a, b in ((grey.train[1, 3][0], colour.train[1, 3][0]), (grey.val[3][0], colour.val[3][0])):
        assert a.shape == (1, 16, 12)
        assert torch.equal(a.expand(3, -1, -1), b)


def test_without_augmentation_training_digits_are_plain() -> None:
    spec = ImageSpec((1, 16, 16), (0.3,), (0.35,))
    train = digits(spec).train
    assert torch.equal(train[0, 3][0], train.source.plain([3])[0])
    assert torch.equal(train[0, 3][0], train[9, 3][0])


def affine_of(image: torch.Tensor, draws: list[float], monkeypatch: pytest.MonkeyPatch, **augment: Any) -> torch.Tensor:
    """The affine map of one image, with its nine draws (in [0, 1), 0.5 is the middle) given."""
    monkeypatch.setattr(digits_module, "uniform", lambda streams, count: np.array([draws]))
    return digits_module._affine(image[None], augment_section(**augment), np.zeros(1, dtype=np.uint64))[0]


def test_the_affine_map_does_what_its_draws_say(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    middle = [0.5] * 9

    def draws(**changed: float) -> list[float]:
        names = ["angle", "shift_x", "shift_y", "zoom", "flip", "area", "ratio", "crop_x", "crop_y"]
        return [changed.get(name, value) for name, value in zip(names, middle, strict=True)]

    def close(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)

    close(affine_of(image, middle, monkeypatch, **AFFINE), image)
    close(affine_of(image, draws(flip=0.4), monkeypatch, hflip=0.5), image.flip(-1))
    close(affine_of(image, draws(flip=0.6), monkeypatch, hflip=0.5), image)
    # A right angle; nothing leaves the image, as it is square.
    close(affine_of(image, draws(angle=1.0), monkeypatch, rotate=90.0), torch.rot90(image, 1, (1, 2)))
    # To the right by 2 of 8 pixels, black coming in from the left; then downwards.
    shifted = affine_of(image, draws(shift_x=1.0), monkeypatch, translate=0.25)
    close(shifted[..., 2:], image[..., :-2])
    close(shifted[..., :2], torch.zeros(1, 8, 2))
    close(affine_of(image, draws(shift_y=1.0), monkeypatch, translate=0.25)[:, 2:], image[:, :-2])
    # A crop of the lower right quarter, enlarged: its outermost pixels lie within the quarter.
    block = torch.zeros(1, 8, 8)
    block[:, 4:, 4:] = 1
    cropped = affine_of(block, draws(crop_x=1.0, crop_y=1.0), monkeypatch, crop_scale=[0.25, 0.25])
    assert cropped[:, 1:-1, 1:-1].min() == 1
    # Zooming in by 1.5 pushes a frame of one pixel out of the image, out by 2 leaves a quarter of its area.
    framed = torch.zeros(1, 8, 8)
    framed[:, 1:7, 1:7] = 1
    assert affine_of(framed, draws(zoom=1.0), monkeypatch, zoom=0.5)[:, 1:-1, 1:-1].min() == 1
    small = affine_of(torch.ones(1, 8, 8), draws(zoom=0.0), monkeypatch, zoom=0.5)
    assert small.mean().item() == pytest.approx(0.25, abs=0.02)


def test_rotation_keeps_shapes_on_oblong_images(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(1, 8, 16)
    image[:, 3:5, 4:12] = 1  # a bar of 8 x 2 pixels
    turned = affine_of(image, [1.0, *[0.5] * 8], monkeypatch, rotate=90.0)
    expected = torch.zeros(1, 8, 16)
    expected[:, :, 7:9] = 1  # the bar upright
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_draws_are_spread_evenly_and_differ_between_samples() -> None:
    streams = draws_module.hash_words(0, 2, [0] * 20000, np.arange(20000))
    assert len(set(streams.tolist())) == 20000
    draws = draws_module.uniform(streams, 9)
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=4 * 12**-0.5 / 20000**0.5)
    assert np.abs(np.corrcoef(draws.T) - np.eye(9)).max() < 4.5 / 20000**0.5


# --- Folders ---


def test_a_folder_is_read(image_root: Path) -> None:
    bundle = folder(image_root)
    assert bundle.class_names == ["aster", "daisy", "tulip"] and bundle.num_classes == 3
    assert bundle.train.targets == [0] * 5 + [1] * 5 + [2] * 5
    assert bundle.val.targets == [0, 0, 1, 1, 2, 2]
    images, targets, indices = next(iter(build_val_loader(bundle, data_section(batch_size=4), device=CPU)))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32
    assert targets.tolist() == [0, 0, 1, 1] and indices.tolist() == [0, 1, 2, 3]
    assert targets.dtype == indices.dtype == torch.int64
    check_images(bundle)


@pytest.mark.parametrize("name", ["valid", "validation", "test", "Val", "VALID", "Test"])
def test_other_names_of_the_two_folders(image_root: Path, name: str) -> None:
    (image_root / "val").rename(image_root / name)
    (image_root / "train").rename(image_root / ("Train" if name == "Val" else "TRAIN"))
    bundle = folder(image_root)
    assert (len(bundle.train), len(bundle.val)) == (15, 6)


def test_val_comes_before_other_names(image_root: Path) -> None:
    write_image(image_root / "test" / "other" / "0.jpg")
    assert len(folder(image_root).val) == 6


def test_one_name_in_two_spellings_is_refused(image_root: Path) -> None:
    (image_root / "Val").mkdir()
    if len(list(image_root.glob("[vV]al"))) == 1:
        pytest.skip("this file system does not tell capitals from small letters")
    with fails("has both 'Val', 'val'; keep one"):
        folder(image_root)


@pytest.mark.parametrize(
    "end", ["gif", "avif", "jfif", "JPE", "webp", "tiff", "bmp", "jp2", "ppm", "ico", "tga", "apng"]
)
def test_what_pillow_reads_is_data(image_root: Path, end: str) -> None:
    image = image_root / "train" / "aster" / f"9.{end}"
    Image.new("RGB", (32, 32), (200, 100, 50)).save(image, Image.registered_extensions()[f".{end.lower()}"])
    bundle = folder(image_root)
    assert len(bundle.train) == 16 and str(image) in bundle.train.source.paths
    assert bundle.left_out == "1 file (1 .txt), 1 folder (1 .ipynb_checkpoints)"
    check_images(bundle)


def test_what_is_left_out_is_counted_by_kind(image_root: Path) -> None:
    train = image_root / "train"
    hidden = write_image(train / "daisy" / ".ipynb_checkpoints" / "0-checkpoint.png")
    write_image(train / "daisy" / "__MACOSX" / "._0.jpg.png")
    write_image(train / "__MACOSX" / "daisy" / "0.jpg")
    write_image(image_root / "__MACOSX" / "train" / "daisy" / "0.jpg")
    write_image(image_root / "val" / "tulip" / "@eaDir" / "0.jpg")
    write_image(train / "stray.jpg")
    for name in ("a.HEIC", "b.heic", ".DS_Store", "._0.jpg", "README", "run.eps", "x.jpg.part"):
        (train / "tulip" / name).write_bytes(hidden.read_bytes())
    bundle = folder(image_root)
    assert (len(bundle.train), len(bundle.val)) == (15, 6)
    assert bundle.left_out == (
        "9 files (2 hidden, 2 .heic, 1 .jpg beside the class folders, 1 .txt, 1 without an extension, 1 .eps, 1 .part), "
        "5 folders (2 .ipynb_checkpoints, 2 __MACOSX, 1 @eaDir)"
    )


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target, target_is_directory=True)


LINKS = {  # name -> link in the training folder and where it leads, from the root
    "to its own class": ("aster/again", "train/aster"),
    "to a sibling class": ("aster/again", "train/daisy"),
    "to a folder in a sibling class": ("aster/again", "train/tulip/deep"),
    "to a folder in its own class": ("tulip/again", "train/tulip/deep"),
    "to all classes": ("aster/again", "train"),
    "to the root": ("aster/again", ""),
    "above the root": ("aster/again", ".."),
    "up from below": ("tulip/deep/again", "train/tulip"),
}


@pytest.mark.parametrize("name", LINKS)
def test_no_folder_is_read_twice(name: str, image_root: Path) -> None:
    write_image(image_root / "train" / "tulip" / "deep" / "5.png")
    place, target = LINKS[name]
    link(image_root / "train" / place, image_root / target)
    bundle = folder(image_root)
    assert bundle.train.targets == [0] * 5 + [1] * 5 + [2] * 6
    assert not [path for path in bundle.train.source.paths if "again" in path]
    assert bundle.left_out.endswith(", 1 link to a folder read already")


def test_links_in_a_circle_through_other_folders_end(image_root: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "pool" / "a" / "6.png")
    write_image(tmp_path / "pool" / "b" / "7.png")
    link(tmp_path / "pool" / "a" / "to_b", tmp_path / "pool" / "b")
    link(tmp_path / "pool" / "b" / "to_a", tmp_path / "pool" / "a")
    link(image_root / "train" / "daisy" / "more", tmp_path / "pool" / "a")
    link(image_root / "train" / "daisy" / "most", tmp_path / "pool")
    bundle = folder(image_root)
    assert bundle.train.targets == [0] * 5 + [1] * 7 + [2] * 5
    assert [Path(path).name for path in bundle.train.source.paths[5:12]] == [
        "0-plain.JPEG", "1-plain.JPEG", "2-plain.JPEG", "3-grey.jpg", "4-clear.png", "6.png", "7.png"
    ]  # fmt: skip
    assert bundle.left_out.endswith(", 3 links to folders read already")


def test_links_to_files_and_whole_classes_are_followed(image_root: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (image_root / split / "daisy").rename(tmp_path / split)
        link(image_root / split / "daisy", tmp_path / split)
    (image_root / "train" / "aster" / "9.jpg").symlink_to(tmp_path / "train" / "0-plain.JPEG")
    link(image_root / "train" / "daisy" / "up", tmp_path)  # above a class that lies elsewhere
    bundle = folder(image_root)
    assert bundle.train.targets == [0] * 6 + [1] * 5 + [2] * 5
    assert bundle.train.source.paths[5] == str(image_root / "train" / "aster" / "9.jpg")
    assert bundle.left_out.endswith(", 1 link to a folder read already")


def test_images_of_two_classes_are_refused(image_root: Path, tmp_path: Path) -> None:
    train = image_root / "train"
    link(train / "poppy", train / "daisy")
    with fails("class folder", "poppy' is the same folder as class 'daisy'"):
        folder(image_root)
    (train / "poppy").unlink()
    link(train / "all", train)
    with fails("class folder", "all' is the same folder as one above it"):
        folder(image_root)
    (train / "all").unlink()
    write_image(tmp_path / "pool" / "deep" / "0.png")
    link(train / "aster" / "more", tmp_path / "pool" / "deep")
    link(train / "tulip" / "more", tmp_path / "pool")
    with fails("deep' belongs to two classes", "from 'aster' and from 'tulip'"):
        folder(image_root)


def test_links_that_lead_nowhere(image_root: Path) -> None:
    aster = image_root / "train" / "aster"
    link(aster / "gone", image_root / "nowhere")
    link(aster / "circle", aster / "circle")
    bundle = folder(image_root)
    assert "2 broken link, 1 .txt" in bundle.left_out
    check_images(bundle)
    link(aster / "gone.jpg", image_root / "nowhere.jpg")  # a missing image is no other kind of file
    with fails("1 of 22 images cannot be read", "gone.jpg", "No such file"):
        check_images(folder(image_root))


def test_pipes_are_no_images(image_root: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    os.mkfifo(image_root / "train" / "aster" / "pipe.jpg")  # opening it would wait for ever
    bundle = folder(image_root)
    assert len(bundle.train) == 15 and "1 no regular file" in bundle.left_out


def test_a_folder_that_cannot_be_listed_is_named(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = image_root / "train" / "daisy" / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may list any folder
    with fails(f"'{closed}' cannot be listed: Permission denied"):
        folder(image_root)


def test_validation_images_are_those_of_timm(image_root: Path) -> None:
    from timm.data.transforms_factory import create_transform

    for crop_pct, interpolation in ((0.875, "bicubic"), (0.9, "bilinear"), (1.0, "bicubic")):
        spec = ImageSpec((3, 15, 15), COLOUR.mean, COLOUR.std, interpolation, crop_pct)
        bundle = folder(image_root, spec)
        reference: Any = create_transform(
            spec.input_size, mean=spec.mean, std=spec.std, interpolation=interpolation, crop_pct=crop_pct
        )
        for index in (0, 3, 5):
            with Image.open(bundle.val.source.paths[index]) as image:
                torch.testing.assert_close(bundle.val[index][0], reference(image.convert("RGB")))


def test_oblong_validation_images_are_covered(image_root: Path) -> None:
    for size in ((12, 20), (20, 12)):
        assert folder(image_root, ImageSpec((3, *size), COLOUR.mean, COLOUR.std)).val[0][0].shape == (3, *size)


def test_grey_models_get_grey_images(image_root: Path) -> None:
    bundle = folder(image_root, GREY, **EVERYTHING)
    assert bundle.train[0, 0][0].shape == bundle.val[0][0].shape == (1, 16, 16)


def test_each_augmentation_of_a_folder_changes_images(image_root: Path) -> None:
    plain = folder(image_root).train
    settings: list[dict[str, Any]] = [{key: EVERYTHING[key]} for key in EVERYTHING] + [
        {"auto_augment": p} for p in POLICIES
    ]
    for augment in settings:
        train = folder(image_root, **augment).train
        changed = [not torch.equal(train[e, 0][0], plain[e, 0][0]) for e in range(10)]
        assert any(changed), augment


def test_each_augmentation_of_digits_changes_images() -> None:
    plain = digits().train
    settings: list[dict[str, Any]] = [{key: EVERYTHING[key]} for key in EVERYTHING] + [
        {"auto_augment": p} for p in POLICIES
    ]
    for augment in settings:
        train = digits(**augment).train
        changed = [not torch.equal(train[e, 0][0], plain[e, 0][0]) for e in range(10)]
        assert any(changed), augment


# --- Policies ---


def policy_operations(policy: Any) -> list[Any]:
    transform = policy.transform
    return [op for ops in (transform.policy if hasattr(transform, "policy") else [transform.ops]) for op in ops]


def run_policy(text: str, count: int = 600) -> None:
    """Runs a policy on RGB and grey images, with another draw for each."""
    assert AugmentSection(auto_augment=text).auto_augment == text
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    policy = transforms._Policy(text, COLOUR)
    with draws_module.global_generators_kept():
        for image in (colour, colour.convert("L")):
            for i in range(count // 2):
                draws_module.seed_global_generators(i)
                changed = policy(image)
                assert (changed.mode, changed.size) == (image.mode, image.size)


MAGNITUDES = [f"rand-m{m}{std}{inc}" for m in range(11) for std in ("", "-mstd0.5") for inc in ("", "-inc1")] + [
    f"augmix-m{m}" for m in range(11)
]


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "rand-m30-mmax30-inc1", "v0", "augmix-m10"])
def test_a_policy_runs_on_600_images(text: str) -> None:
    run_policy(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", [*MAGNITUDES, "original", "originalr", "v0", "v0r", "3a", "v0r-mstd3", "rand-m9-t3aw", "rand-tweights-n3"]
)
def test_every_policy_runs_at_every_magnitude(text: str) -> None:
    run_policy(text)


def test_a_policy_runs_at_the_ends_of_every_setting() -> None:
    texts = []
    for name, settings in config_module._POLICIES.items():
        for key, (pattern, low, high) in settings.items():
            values = [f"{low:g}", f"{high:g}"] if np.isfinite(low) else pattern.split("|")
            texts += [f"{name}-{key}{value}" for value in values]
    assert len(texts) == 40 - 3
    for text in [*texts, "rand-n15-tweights", "rand-n14-t3aw", "rand-m100-mmax100-inc1-mstd1000"]:
        run_policy(text, 6)


@pytest.mark.parametrize(
    "name", ["rand-mmax40", "rand-inc1-mmax40", "augmix", "v0", "v0r", "original", "rand-tweights"]
)
def test_posterizing_gives_what_older_pillow_gave(name: str) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    operations = [op for op in policy_operations(transforms._Policy(name, COLOUR)) if op.name.startswith("Posterize")]
    assert operations
    for operation in operations:
        for bits in range(-16, 12):
            # Pillow's own table before it refused 0 bits and fewer; timm leaves 8 and more alone.
            mask = ~(2 ** (8 - bits) - 1) if bits < 8 else 255
            expected = np.asarray(image).astype(int) & mask
            np.testing.assert_array_equal(np.asarray(operation.aug_fn(image, bits, **operation.kwargs)), expected)


# --- Pictures ---


def tiff(pixels: list[int], bits: int, kind: str, *, sample_format: int = 1, photometric: int = 1) -> bytes:
    """A grey or RGB TIFF of one row that Pillow does not write; `kind` is struct's letter, or "raw" for given bytes."""
    data = bytes(pixels) if kind == "raw" else struct.pack(f"<{len(pixels)}{kind}", *pixels)
    samples = 3 if photometric == 2 else 1
    width = 2 if kind == "raw" else len(pixels) // samples
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 12 * 10 + 4 + 6, 277: samples, 278: 1,
            279: len(data), 339: sample_format}  # fmt: skip
    entries = b""
    for tag, value in tags.items():
        if samples == 3 and tag == 258:
            entries += struct.pack("<HHII", tag, 3, 3, 8 + 2 + 12 * 10 + 4)  # three numbers, behind the directory
        elif samples == 3 and tag == 339:
            entries += struct.pack("<HHIHH", tag, 3, 1, value, 0)
        else:
            entries += struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value)
    return (
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + struct.pack("<3H", *[bits] * 3) + data
    )


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def array_saved(values: list[float], kind: str, dtype: Any) -> bytes:
    return saved(Image.fromarray(np.array([values], dtype=dtype)), kind)


def turned(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def palette_image(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, *colour])
    return image


def frames(mode: str = "L") -> dict[str, Any]:
    return {"save_all": True, "append_images": [Image.new("L", (8, 8), 50).convert(mode)]}


HALF_WHITE = Image.new("RGB", (64, 32))
HALF_WHITE.paste((255, 255, 255), (0, 0, 32, 32))
BRIGHT = Image.new("L", (8, 8), 200)

# The rows of docs/data.md; of each file the first pixel is looked at.
PICTURES: dict[str, list[bytes]] = {
    "RGB, 8 bits": [saved(Image.new("RGB", (2, 2), (200, 100, 50)), kind) for kind in ("PNG", "BMP", "TIFF", "TGA")],
    "RGB, 16 bits": [tiff([51400, 25700, 12850] * 2, 16, "H", photometric=2)],
    "grey, 8 bits": [saved(Image.new("L", (2, 2), 128), kind) for kind in ("PNG", "JPEG", "TIFF", "PPM")],
    "grey, 16 bits": [
        *(array_saved([32896, 0], kind, np.uint16) for kind in ("PNG", "TIFF")),
        b"P5 2 1 65535\n" + bytes([128, 128, 0, 0]),
        b"P5 2 1 4095\n" + bytes([8, 8, 0, 0]),  # by its own maximum, as the format has it
        tiff([32896, 0], 16, "H"),
    ],
    "grey, 16 bits, signed": [tiff([16448, -5], 16, "h", sample_format=2)],
    "grey, 12 bits (TIFF)": [tiff([0x80, 0x8F, 0xFF], 12, "raw")],
    "grey, 16 bits, 0 is white (TIFF)": [tiff([32639, 0], 16, "H", photometric=0)],
    "grey, 32 bits, none above 255": [array_saved([128, 255], "TIFF", np.int32), tiff([128, 200], 32, "I")],
    "grey, 32 bits, none above 65535": [array_saved([32896, 65535], "TIFF", np.int32), tiff([32896, 256], 32, "I")],
    "grey, 32 bits, else": [
        array_saved([1078000000, 2**31 - 1], "TIFF", np.int32),
        tiff([1078000000, -5], 32, "i", sample_format=2),
    ],
    "grey, 32 bits, some above 2147483647 (unsigned)": [
        tiff([2156000000, 2**32 - 1], 32, "I"),
        array_saved([2156000000, 2**32 - 1], "TIFF", np.uint32),
    ],
    "float, none above 1.5": [
        array_saved([0.502, 1.5], "TIFF", np.float32),
        array_saved([0.502, np.nan, -3, np.inf], "TIFF", np.float32),
        b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.502, 1),
    ],
    "float, none above 382.5": [array_saved([128, 270], "TIFF", np.float32), array_saved([128, 1.6], "TIFF", np.float64)],
    "float, none above 98302.5": [array_saved([32896, 65535], "TIFF", np.float32)],
    "1 bit": [saved(Image.new("1", (2, 2), 1), kind) for kind in ("PNG", "TIFF", "PPM", "XBM", "BMP")],
    "palette": [saved(palette_image((200, 100, 50)), kind) for kind in ("PNG", "GIF", "BMP", "TIFF")],
    "RGBA, transparent": [
        *(saved(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), kind) for kind in ("PNG", "TIFF", "TGA")),
        saved(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "WEBP", lossless=True, exact=True),
    ],
    "RGBA, half transparent": [saved(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), kind) for kind in ("PNG", "TIFF")],
    "grey and alpha": [saved(Image.new("LA", (2, 2), (0, 128)), kind) for kind in ("PNG", "TIFF", "JPEG2000")],
    "palette with transparency": [
        saved(palette_image((200, 100, 50)), "PNG", transparency=1),
        saved(palette_image((200, 100, 50)), "PNG", transparency=b"\xff\x00"),
        saved(palette_image((200, 100, 50)), "GIF", transparency=1),
    ],
    "grey with a transparent value": [saved(Image.new("L", (2, 2), 7), "PNG", transparency=7)],
    "grey, 16 bits, with a transparent value": [
        saved(Image.fromarray(np.full((2, 2), 7, np.uint16)), "PNG", transparency=7)
    ],
    "RGB with a transparent colour": [saved(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3))],
    "CMYK": [
        saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"),
        saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100),
    ],
    "CIELAB": [saved(Image.new("LAB", (2, 2), (137, 128, 128)), "TIFF")],
    "EXIF orientation 6": [
        saved(HALF_WHITE, kind, exif=turned(), quality=100) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
    ] + [saved(HALF_WHITE, "TIFF", exif=turned(), compression="tiff_lzw")],
    "animated (GIF, WebP, PNG, AVIF)": [
        saved(BRIGHT, "GIF", **frames()),
        saved(BRIGHT, "PNG", **frames()),
        saved(BRIGHT.convert("RGB"), "WEBP", lossless=True, **frames("RGB")),
        saved(BRIGHT.convert("RGB"), "AVIF", quality=100, **frames("RGB")),
    ],
    "several pages (TIFF)": [saved(BRIGHT, "TIFF", **frames())],
}  # fmt: skip


def documented_pictures() -> dict[str, tuple[int, ...]]:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|[^|]+\|[^|]+\| (\d+) (\d+) (\d+) \|$", page, flags=re.MULTILINE)
    return {name: (int(r), int(g), int(b)) for name, r, g, b in rows}


def test_the_documented_table_is_complete() -> None:
    assert list(documented_pictures()) == list(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_becomes_what_the_documented_table_says(name: str, tmp_path: Path) -> None:
    expected = documented_pictures()[name]
    for content in PICTURES[name]:
        (tmp_path / "picture").write_bytes(content)
        image = read_image(tmp_path / "picture", 3)
        assert image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image)[0, 0], expected, atol=2 if b"JFIF" in content[:32] else 0)
        if name.startswith("EXIF"):
            assert image.size == (32, 64)
            assert np.asarray(image)[:31].min() > 250 and np.asarray(image)[33:].max() < 5
        grey = read_image(tmp_path / "picture", 1)
        assert grey.mode == "L" and grey == image.convert("L")


def test_a_model_of_one_channel_gets_grey(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "red.png")
    assert read_image(tmp_path / "red.png", 1).getpixel((0, 0)) == 76
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 1).getpixel((0, 0)) == 255


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "RGBX", "YCbCr", "HSV", "I;16B", "I;16L"])
def test_every_mode_of_pillow_is_converted(mode: str) -> None:
    image = Image.new("RGB", (3, 2), (204, 204, 204))
    if mode.startswith("I;16"):
        image = Image.new(mode, (3, 2), 204 * 257)
    elif mode in ("La", "PA", "RGBa"):
        image = image.convert({"La": "LA", "PA": "P", "RGBa": "RGBA"}[mode]).convert(mode)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    np.testing.assert_allclose(np.asarray(to_rgb(image)), 204, atol=1)


def test_the_same_picture_in_any_depth_is_the_same(tmp_path: Path) -> None:
    levels = np.arange(256).reshape(16, 16)
    stored = {"8.png": levels.astype(np.uint8), "16.png": (levels * 257).astype(np.uint16),
              "16.tif": (levels * 257).astype(np.uint16), "32.tif": (levels * 257).astype(np.int32),
              "float.tif": (levels / 255).astype(np.float32)}  # fmt: skip
    for name, pixels in stored.items():
        Image.fromarray(pixels).save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / name, 1)), levels, err_msg=name)
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for name, pixels in {"16.png": ramp.astype(np.uint16), "float.tif": (ramp / 65535).astype(np.float32)}.items():
        Image.fromarray(pixels).save(tmp_path / name)
        assert np.asarray(read_image(tmp_path / name, 1)).mean() / 255 == pytest.approx(0.498, abs=1e-3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned(orientation))
    # As EXIF defines them: where the 0th row and the 0th column of what is stored lie in the picture.
    across = pixels.transpose(1, 0, 2)
    expected = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: across, 6: across[:, ::-1],
                7: across[::-1, ::-1], 8: across[::-1]}[orientation]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png", 3)), expected)


def test_deep_pictures_are_turned_as_well(tmp_path: Path) -> None:
    values = np.zeros((32, 64), np.uint16)
    values[:, :32] = 65535
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name, exif=turned())
        turned_pixels = np.asarray(read_image(tmp_path / name, 1))
        assert turned_pixels.shape == (64, 32) and turned_pixels[:32].min() == 255 and turned_pixels[32:].max() == 0


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0garbage and more of it", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_a_damaged_exif_block_is_passed_over(block: bytes, tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.webp"):
        HALF_WHITE.save(tmp_path / name, exif=block)
        assert read_image(tmp_path / name, 3).size == HALF_WHITE.size


def test_decompression_bombs_are_refused_before_decoding(
    image_root: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    load = PngImageFile.load

    def guarded(image: PngImageFile) -> Any:
        assert image.width < 1000, "it was decoded"
        return load(image)

    monkeypatch.setattr(PngImageFile, "load", guarded)
    # Pillow refuses from twice its limit on, and only warns of the other.
    for size in ((20_000, 20_000), (9_500, 9_500)):
        bomb = image_root / "train" / "aster" / "bomb.png"
        header = struct.pack(">II5B", *size, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
        idat = struct.pack(">I", 4) + b"IDAT" + b"bomb" + struct.pack(">I", zlib.crc32(b"IDATbomb"))
        bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + idat + end)
        for limit in (0, 2000):
            monkeypatch.setattr(images_module, "FULL_CHECK_LIMIT", limit)
            with fails("1 of 22 images cannot be read", "bomb.png", "more than 89,478,485 pixels", "not decoded"):
                check_images(folder(image_root))
        assert not recwarn.list
        with pytest.raises(RuntimeError, match=r"cannot read image '.*bomb\.png': it has more than 89,478,485 pixels"):
            folder(image_root).train[0, 5]
        recwarn.clear()


def test_no_other_program_is_started_for_a_picture(image_root: Path) -> None:
    path = image_root / "train" / "aster" / "0-plain.JPEG"
    path.write_bytes(saved(Image.new("RGB", (8, 8)), "EPS"))  # Pillow would hand it to Ghostscript
    with fails("0-plain.JPEG", "cannot identify image file"):
        check_images(folder(image_root))


# --- Shipped configs ---


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_trains_three_steps_on_a_folder(path: Path, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2)):
        for c in range(2):
            for i in range(count):
                write_image(tmp_path / "data" / split / f"class{c}" / f"{i}.jpg", size=(48, 40), seed=10 * c + i)
    (tmp_path / "data" / "val" / "class0" / "notes.txt").write_text("no image")
    overrides = ["data.dataset=folder", f"data.root={tmp_path / 'data'}", "data.image_size=32", "data.batch_size=4",
                 "data.workers=0", "optim.epochs=1", "optim.warmup_epochs=0", "runtime.device=cpu"]  # fmt: skip
    if load_config(path).model.overrides.get("image_size"):
        overrides.remove("data.image_size=32")
    config = load_config(path, overrides)
    world = World(rank=0, local_rank=0, size=1, device=CPU)
    setup = build(config, world)
    assert "\nleft out  1 file (1 .txt)\n" in describe(setup)
    run = RunFolder(tmp_path / "run")
    run.make(fresh=True)
    summary = train(setup, run, None)
    assert summary["steps"] == setup.steps_per_epoch == 3
    (row,) = csv.DictReader(run.metrics.read_text().splitlines())
    assert math.isfinite(float(row["train_loss"])) and math.isfinite(float(row["val_loss"]))


# --- Mistakes in what the user gives ---


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


def test_a_missing_root_is_named_with_its_neighbour(image_root: Path) -> None:
    with fails("data.root: ", "flowrs' does not exist", "did you mean 'flowers'", "ROOT/train/CLASS"):
        folder(image_root.with_name("flowrs"))
    with fails("does not exist"):
        folder(image_root / "nowhere" / "at-all")
    with fails("data.root: is needed"):
        build_datasets(DataSection.model_construct(dataset="folder"), augment_section(), COLOUR, seed=0)
    with fails("is a file, not a folder"):
        folder(image_root / "train" / "aster" / "notes.txt")


def test_a_root_without_train_or_val_is_refused(image_root: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with fails("no folder 'train'", "it has no folders"):
        folder(empty)
    with fails("no folder 'train'", "folders there: 'aster', 'daisy', 'tulip'"):
        folder(image_root / "train")
    (image_root / "val").rename(image_root / "held-out")
    allowed = "allowed names: val, valid, validation, test"
    with fails("no folder for validation", "folders there: 'held-out', 'train'", allowed):
        folder(image_root)


def test_folders_without_classes_or_images_are_refused(image_root: Path, tmp_path: Path) -> None:
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "val").mkdir()
    with fails("train' has no class folders"):
        folder(tmp_path / "bare")
    (image_root / "val" / "poppy").mkdir()
    (image_root / "val" / "poppy" / "notes.txt").write_text("no image")
    with fails(str(image_root / "val" / "poppy"), "has no images; left out: 1 file (1 .txt)", ".jpeg"):
        folder(image_root)
    (image_root / "val" / "rose").mkdir()
    with fails("poppy' has no images (and 1 more such folders)"):
        folder(image_root)


def test_classes_that_differ_are_named(image_root: Path) -> None:
    write_image(image_root / "train" / "poppy" / "0.jpg")
    (image_root / "val" / "aster").rename(image_root / "val" / "Aster")
    with fails("differ", "only in train: 'aster', 'poppy'", "only in val: 'Aster'"):
        folder(image_root)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "all" / "0.jpg")
    write_image(tmp_path / "val" / "all" / "0.jpg")
    with fails("one class folder, 'all'", "at least two"):
        folder(tmp_path)


def test_too_few_images_for_one_batch_everywhere(image_root: Path) -> None:
    bundle = folder(image_root)
    with fails("data.batch_size: 16 is more than the 15 training images", "at most 15"):
        train_loader(bundle, batch_size=16)
    with fails("data.batch_size: 8 x 2 processes = 16", "15 training images", "at most 7"):
        train_loader(bundle, batch_size=8, world_size=2)
    with fails("15 training images", "at most 15 processes"):
        train_loader(bundle, batch_size=1, world_size=16)
    assert len(train_loader(bundle, batch_size=15)) == 1


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (ImageSpec((4, 8, 8), (0.0,) * 4, (1.0,) * 4), "4 input channels"),
        (ImageSpec((3, 8, 8), (0.0,), (1.0,)), "one value for each of 3"),
        (ImageSpec((1, 8, 8), (0.0,), (1.0,), interpolation="cubic"), "'cubic' is not one of nearest"),
        (ImageSpec((1, 8, 8), (0.0,), (1.0,), crop_pct=0.0), "crop_pct 0.0"),
    ],
)
def test_a_spec_that_cannot_be_met_is_refused(spec: ImageSpec, problem: str) -> None:
    with fails(problem):
        digits(spec)


def test_an_unknown_data_set_is_refused() -> None:
    with fails("data.dataset: 'cifar'", "'digits', 'folder'"):
        build_datasets(DataSection.model_construct(dataset="cifar"), augment_section(), GREY, seed=0)


def test_settings_without_effect_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="crop_ratio has no effect"):
        digits(crop_ratio=[1.0, 1.0])
    with pytest.warns(UserWarning, match="mixup_off_epoch has no effect"):
        BatchMixer(augment_section(mixup_off_epoch=3), 10, seed=0)


# --- Damaged images ---


@pytest.mark.parametrize("limit", [0, 2000], ids=["end of file", "decoded"])
@pytest.mark.parametrize("kind", ["empty", "truncated jpg", "truncated png", "text", "truncated bmp"])
def test_a_damaged_image_is_found_before_training(
    kind: str, limit: int, image_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(images_module, "FULL_CHECK_LIMIT", limit)
    suffix = kind.split()[-1] if "truncated" in kind else "jpg"
    path = write_image(image_root / "train" / "daisy" / f"zz.{suffix}", size=(200, 200))
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"<html>not found</html>"}.get(kind, content[: len(content) * 2 // 3]))
    bundle = folder(image_root)
    with fails("data.root: 1 of 22 images cannot be read", str(path), "the file is empty" if kind == "empty" else ""):
        check_images(bundle)
    (image_root / "val" / "aster" / "deeper" / "0.jpg").write_bytes(b"")
    with fails("2 of 22 images cannot be read", f"the first is '{path}'", "data.on_error=skip"):
        check_images(bundle)
    with fails("2 of 22 images cannot be read", "data.max_skipped is 1"):
        check_images(bundle, allowed=1)
    check_images(bundle, allowed=2)
    assert f"2 of 22 images cannot be read and will be skipped; the first is '{path}'" in caplog.text


def test_an_image_with_an_unusual_end_is_not_called_damaged(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "FULL_CHECK_LIMIT", 0)
    path = image_root / "train" / "aster" / "0-plain.JPEG"
    path.write_bytes(path.read_bytes() + b"appended by a camera")
    check_images(folder(image_root))


def test_only_doubtful_files_are_decoded_in_a_big_folder(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(images_module, "_damage", decoded.append)
    monkeypatch.setattr(images_module, "FULL_CHECK_LIMIT", 0)
    odd = write_image(image_root / "val" / "tulip" / "odd.bmp")
    check_images(folder(image_root))
    assert decoded == [str(odd)]


def test_digits_have_no_files_to_check() -> None:
    check_images(digits())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_that_breaks_during_training_is_named(part: str, workers: int, image_root: Path) -> None:
    bundle = folder(image_root)
    path = damage(getattr(bundle, part), 4)
    with pytest.raises(ReadError) as caught:
        list(SkipList(data_section()).read(loaders(bundle, workers=workers)[part]))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"cannot read image '{path}': ") and lines[1].endswith("data.on_error=skip")
    assert len(lines) == 2
    traceback.clear_frames(caught.tb)  # they hold the loader in a cycle, from which its worker takes 5 s to stop


def test_an_image_that_a_transform_cannot_take_is_named(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = folder(image_root)
    (target,) = [p for p in bundle.train.source.paths if p.endswith("daisy/3-grey.jpg")]

    def transform(image: Image.Image) -> torch.Tensor:
        if image.size == (29, 25):  # only that one
            raise ZeroDivisionError("division\nby zero")
        return torch.zeros(3, 16, 16)

    monkeypatch.setattr(bundle.train.source, "train_transform", transform)
    index = bundle.train.source.paths.index(target)
    with pytest.raises(ReadError) as caught:
        bundle.train[0, index]
    assert str(caught.value) == f"cannot read image '{target}': ZeroDivisionError: division by zero"


def test_a_worker_that_dies_is_told_in_words() -> None:
    loader = train_loader(digits(), batch_size=16, workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError) as caught:  # torch's signal handler may raise it anywhere from here on
        os.kill(worker.pid, signal.SIGKILL)
        list(batches)
    told = lost_worker(caught.value)
    assert told is not None and told.startswith("DataLoader worker (pid") and len(told.splitlines()) == 2
    assert "data.workers" in told and "--resume" in told
    assert lost_worker(RuntimeError("another error")) is None


# --- Skipping what cannot be read ---


def damage(dataset: TrainDataset | ValDataset, *indices: int) -> Path:
    """Cuts these images short; returns the last one's path."""
    path = Path()
    for index in indices:
        path = Path(dataset.source.paths[index])
        path.write_bytes(path.read_bytes()[:60])
    return path


def loaders(bundle: DataBundle, **data: Any) -> dict[str, DataLoader]:
    data = {"batch_size": 5, **data}
    return {"train": train_loader(bundle, **data), "val": build_val_loader(bundle, data_section(**data), device=CPU)}


def skipping(root: Path, *, seed: int = 0, **data: Any) -> tuple[DataBundle, SkipList]:
    section = data_section(dataset="folder", root=str(root), on_error="skip", **data)
    return build_datasets(section, augment_section(**EVERYTHING), COLOUR, seed=seed), SkipList(section)


def test_a_replacement_is_a_pure_function_of_the_address(image_root: Path, unmoved_random_states: None) -> None:
    bundle, _ = skipping(image_root)
    damage(bundle.train, 3, 8)
    positions = [(epoch, index) for epoch in range(4) for index in (3, 5, 8)]
    batch = bundle.train.__getitems__(positions)
    samples, replaced = batch[:12], batch[12:]
    assert all(isinstance(sample, tuple) for sample in samples)
    assert len(replaced) >= 8 and all(isinstance(r, Unreadable) and r.replaced for r in replaced)
    stand_ins = [sample[2] for sample in samples]  # pyright: ignore[reportIndexIssue]
    assert stand_ins[1::3] == [5] * 4 and not {3, 8} & set(stand_ins)
    assert len(set(stand_ins)) > 4, "another one in each epoch"
    again, _ = skipping(image_root)
    for position, sample in zip(positions, samples, strict=True):
        assert isinstance(sample, tuple)
        image, target, index = again.train[position]
        assert torch.equal(image, sample[0]) and (target, index) == sample[1:]
        assert target == bundle.train.targets[index]
    other, _ = skipping(image_root, seed=1)
    assert [other.train[position][2] for position in positions] != stand_ins


@pytest.mark.parametrize("part", ["train", "val"])
def test_what_is_skipped_does_not_depend_on_workers(part: str, image_root: Path, tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        bundle, skips = skipping(image_root)
        damage(getattr(bundle, part), 1, 4)
        skips.path = tmp_path / f"skipped-{workers}.csv"
        loader = loaders(bundle, workers=workers)[part]
        found.append(([part for batch in skips.read(loader) for part in batch], skips.path.read_text()))
    assert found[0][1] == found[1][1] and found[0][1].count("\n") == 3
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


def test_validation_leaves_out_what_it_cannot_read(image_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, skips = skipping(image_root)
    whole = {
        int(i): image for images, _, indices in loaders(bundle)["val"] for image, i in zip(images, indices, strict=True)
    }
    damage(bundle.val, 2, 5)  # 5 is alone in the last batch
    batches = list(skips.read(loaders(bundle)["val"]))
    assert [batch[2].tolist() for batch in batches] == [[0, 1, 3, 4]]
    assert all(torch.equal(image, whole[i]) for image, i in zip(batches[0][0], [0, 1, 3, 4], strict=True))
    assert (skips.count("train"), skips.count("val")) == (0, 2)
    assert capsys.readouterr().err.count("left out of validation") == 2


def test_the_list_of_a_run_counts_a_file_once(image_root: Path, tmp_path: Path) -> None:
    bundle, skips = skipping(image_root)
    damage(bundle.train, 7)
    damage(bundle.val, 0)
    other, later = skipping(image_root)[1], skipping(image_root)[1]
    for number, skip_list in enumerate((skips, other, later)):  # two processes, and one after a resume
        skip_list.path = tmp_path / "skipped.csv"
        for _ in range(2):
            for loader in loaders(bundle, batch_size=15).values():
                list(skip_list.read(loader))
        assert (skip_list.count("train"), skip_list.count("val")) == (1, 1), number
    with (tmp_path / "skipped.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["part", "name", "reason"]
    names = [os.path.relpath(s.source.paths[i], image_root) for s, i in ((bundle.train, 7), (bundle.val, 0))]
    assert [row[:2] for row in rows[1:]] == [["train", names[0]], ["val", names[1]]]
    assert all(row[2] for row in rows[1:])


def test_the_ceiling_is_of_the_whole_run(image_root: Path, tmp_path: Path) -> None:
    bundle, skips = skipping(image_root, max_skipped=2)
    damage(bundle.train, 1, 2)
    skips.path = tmp_path / "skipped.csv"
    list(skips.read(loaders(bundle)["train"]))
    damage(bundle.val, 3)
    again = skipping(image_root, max_skipped=2)[1]
    again.path = skips.path
    with pytest.raises(
        ReadError, match=r"has skipped 3 images, data.max_skipped is 2; .*skipped.csv lists them"
    ) as caught:
        list(again.read(loaders(bundle)["val"]))
    assert bundle.val.source.paths[3] in str(caught.value) and len(str(caught.value).splitlines()) == 2
    assert "val/" in skips.path.read_text(), "the list names that one as well"


def test_nothing_left_to_replace_with(image_root: Path) -> None:
    bundle, skips = skipping(image_root)
    damage(bundle.train, *range(15))
    with pytest.raises(ReadError, match="nor can any of 100 images drawn to replace it"):
        list(skips.read(loaders(bundle)["train"]))


def test_a_batch_of_nothing() -> None:
    lost = [Unreadable("val", "a.png", "empty"), Unreadable("val", "b.png", "empty")]
    assert skipping_module.collate(lost) == PartialBatch(None, lost)


# --- What a data set is known by ---


def identity(root: Path) -> dict[str, Any]:
    return folder(root).identity


def test_a_data_set_is_known_wherever_it_lies(image_root: Path, tmp_path: Path) -> None:
    before = identity(image_root)
    assert before["class_names"] == ["aster", "daisy", "tulip"] and before["dataset"] == "folder"
    assert before["train"]["samples_per_class"] == [5, 5, 5] and before["val"]["samples_per_class"] == [2, 2, 2]
    moved = image_root.rename(tmp_path / "moved to")
    (moved / "val").rename(moved / "validation")
    assert identity(moved) == before
    check_same_data(before, identity(moved), root=str(moved))
    write_image(moved / "train" / "aster" / "0-plain.JPEG", seed=99)
    assert identity(moved) == before, "files are known by name"
    assert digits().identity == digits(COLOUR, seed=3).identity
    assert digits().identity["train"]["samples"] == 1437 and sum(digits().identity["val"]["samples_per_class"]) == 360
    assert json.loads(json.dumps(before)) == before


def rename_class(root: Path, old: str, new: str) -> None:
    for part in ("train", "val"):
        (root / part / old).rename(root / part / new)


def add_class(root: Path) -> None:
    for part in ("train", "val"):
        write_image(root / part / "rose" / "0.jpg")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "renamed": (lambda r: rename_class(r, "aster", "zinnia"), "classes gone: 'aster', new: 'zinnia'"),
    "capital": (lambda r: rename_class(r, "tulip", "Tulip"), "classes gone: 'tulip', new: 'Tulip'"),
    "added": (add_class, "classes new: 'rose'"),
    "gone": (lambda r: [shutil.rmtree(r / p / "daisy") for p in ("train", "val")], "classes gone: 'daisy'"),
    "fewer": (lambda r: (r / "train/daisy/0-plain.JPEG").unlink(), "class 'daisy' had 5 training images, has 4"),
    "more": (lambda r: write_image(r / "val/tulip/x.png"), "class 'tulip' had 2 validation images, has 3"),
    "file": (lambda r: (r / "train/aster/0-plain.JPEG").rename(r / "train/aster/9.JPEG"),
             "as many training images as before, but files have other names"),
    "validation file": (lambda r: (r / "val/aster/deeper/0.jpg").rename(r / "val/aster/0.jpg"),
                        "as many validation images as before, but files have other names"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_is_refused_by_what_differs(change: str, image_root: Path) -> None:
    before = identity(image_root)
    act, words = CHANGES[change]
    act(image_root)
    assert data_difference(before, identity(image_root)) == words
    with fails("--resume", str(image_root), words):
        check_same_data(before, identity(image_root), root=str(image_root))


def test_several_changed_classes_are_counted(image_root: Path) -> None:
    before = identity(image_root)
    for name in ("aster", "tulip"):
        write_image(image_root / "train" / name / "new.png")
    assert data_difference(before, identity(image_root)) == (
        "class 'aster' had 5 training images, has 6 (and 1 more classes changed)"
    )
    assert data_difference(digits().identity, before) == "data.dataset was 'digits', is 'folder'"
    assert data_difference({"dataset": "digits"}, digits().identity) is not None, "of an identity that is cut short"


def test_class_names_without_building(image_root: Path) -> None:
    section = data_section(dataset="folder", root=str(image_root))
    assert class_names_of_data(section) == folder(image_root).class_names
    assert class_names_of_data(data_section()) == digits().class_names == [str(i) for i in range(10)]


# --- Sampling ---


def batches_of(sampler: EpochSampler, epoch: int, batch: int = 0) -> list[list[tuple[int, int]]]:
    sampler.set_position(epoch, batch)
    return list(sampler)


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    sampler = EpochSampler(100, 8, seed=1)
    first = batches_of(sampler, 0)
    assert len(first) == len(sampler) == sampler.batches_per_epoch == 12
    assert all(len(batch) == 8 and {e for e, _ in batch} == {0} for batch in first)
    assert [i for batch in first for _, i in batch] != sorted(i for batch in first for _, i in batch)

    def indices(batches: list[list[tuple[int, int]]]) -> list[int]:
        return [i for batch in batches for _, i in batch]

    assert batches_of(sampler, 1)[0][0][0] == 1
    assert indices(batches_of(sampler, 1)) != indices(first)
    assert batches_of(EpochSampler(100, 8, seed=2), 0) != first
    torch.manual_seed(7)
    assert batches_of(EpochSampler(100, 8, seed=1), 0) == first


def test_ranks_share_an_epoch_without_duplicates() -> None:
    for length in (96, 103):
        ranks = [batches_of(EpochSampler(length, 8, seed=0, rank=r, world_size=3), 5) for r in range(3)]
        assert [len(batches) for batches in ranks] == [4, 4, 4]
        indices = [i for batches in ranks for batch in batches for _, i in batch]
        assert len(indices) == len(set(indices)) == 96
    one = batches_of(EpochSampler(103, 24, seed=0), 5)
    together = [sorted(position for batches in ranks for position in batches[b]) for b in range(4)]
    assert together == [sorted(batch) for batch in one], "a step covers the same samples at any number of ranks"


def test_starting_in_mid_epoch_gives_the_tail_of_the_epoch() -> None:
    sampler = EpochSampler(100, 8, seed=0, rank=1, world_size=2)
    full = batches_of(sampler, 3)
    for start in range(len(full) + 1):
        assert batches_of(sampler, 3, start) == full[start:]
        assert len(sampler) == len(full) - start
    started = iter(sampler)
    sampler.set_position(4)
    assert list(started) == [], "an iterator keeps the position it was made at"


@pytest.mark.parametrize(("epoch", "batch"), [(-1, 0), (0, -1), (0, 13)])
def test_a_position_outside_the_epoch_is_refused(epoch: int, batch: int) -> None:
    with pytest.raises(ValueError, match="outside an epoch of 12 batches"):
        EpochSampler(100, 8, seed=1).set_position(epoch, batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_starts_in_mid_epoch(workers: int) -> None:
    loader = train_loader(digits(**AFFINE), batch_size=200, workers=workers)
    sampler = sampler_of(loader)
    full = list(loader)
    assert len(full) == 7
    for start in (5, 2):  # the second time round, persistent workers have run ahead already
        sampler.set_position(0, start)
        tail = list(loader)
        assert len(tail) == len(full) - start
        for batch, reference in zip(tail, full[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, reference, strict=True))
    sampler.set_position(1, 6)
    assert not torch.equal(next(iter(loader))[2], full[6][2])


def test_validation_samples_are_dealt_out_without_duplicates(image_root: Path) -> None:
    bundle = folder(image_root)

    def indices(rank: int, world_size: int, **data: Any) -> list[list[int]]:
        section = data_section(**data)
        loader = build_val_loader(bundle, section, rank=rank, world_size=world_size, device=CPU)
        assert len(loader) == len(list(loader))
        return [batch[2].tolist() for batch in loader]

    assert indices(0, 1, batch_size=4) == [[0, 1, 2, 3], [4, 5]]
    assert indices(0, 1, batch_size=4, eval_batch_size=5) == [[0, 1, 2, 3, 4], [5]]
    assert [indices(r, 4, batch_size=4) for r in range(4)] == [[[0, 4]], [[1, 5]], [[2]], [[3]]]
    assert indices(7, 8, workers=2) == [], "more ranks than images"
    assert indices(1, 2, batch_size=2, workers=2) == [[1, 3], [5]]


# --- Mixup and cutmix ---


def mixing_batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, 3, 8, 8, generator=generator), torch.arange(size) % 5


def test_a_disabled_mixer_passes_the_batch_through() -> None:
    mixer = BatchMixer(augment_section(label_smoothing=0.1), 5, seed=0)
    images, targets = mixing_batch()
    mixed, same = mixer(images, targets, 3)
    assert not mixer.enabled and mixed is images and same is targets


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_say_what_was_mixed(kind: str, unmoved_random_states: None) -> None:
    mixer = BatchMixer(augment_section(**{kind: 1.0}), 5, seed=0)
    images, targets = mixing_batch()
    for step in range(10):
        mixed, soft = mixer(images.clone(), targets, step)
        assert mixer.enabled and soft.shape == (6, 5)
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        share = soft[0, 0].item()  # image 0 (class 0) is mixed with image 5 (class 0), 1 (class 1) with 4 (class 4)
        assert share == pytest.approx(1)
        share = soft[1, 1].item()
        if kind == "mixup":
            torch.testing.assert_close(mixed[1], share * images[1] + (1 - share) * images[4])
        else:
            kept = (mixed[1] == images[1]).all(0)
            assert kept.float().mean().item() == pytest.approx(share, abs=1e-6)
            assert torch.equal(mixed[1][:, ~kept], images[4][:, ~kept])


def test_mixing_is_a_pure_function_of_seed_rank_and_step() -> None:
    section = augment_section(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    images, targets = mixing_batch()

    def mix(step: int, **address: int) -> tuple[torch.Tensor, torch.Tensor]:
        return BatchMixer(section, 5, **({"seed": 0, "rank": 0} | address))(images.clone(), targets, step)

    np.random.seed(1)
    reference = mix(4)
    np.random.seed(2)
    assert all(torch.equal(a, b) for a, b in zip(mix(4), reference, strict=True))
    for other in (mix(5), mix(4, seed=1), mix(4, rank=1)):
        assert not torch.equal(other[0], reference[0])


@pytest.mark.parametrize("size", [1, 5])
def test_the_last_sample_of_an_odd_batch_is_not_mixed(size: int) -> None:
    mixer = BatchMixer(augment_section(mixup=1.0, label_smoothing=0.1), 5, seed=0)
    images, targets = mixing_batch(size)
    mixed, soft = mixer(images.clone(), targets, 0)
    assert mixed.shape == images.shape and soft.shape == (size, 5)
    assert torch.equal(mixed[-1], images[-1])
    expected = torch.full((5,), 0.02)
    expected[targets[-1]] = 0.92
    torch.testing.assert_close(soft[-1], expected)
    assert size == 1 or not torch.equal(mixed[0], images[0])


def test_mixing_ends_at_its_epoch_with_targets_still_soft() -> None:
    mixer = BatchMixer(augment_section(mixup=1.0, label_smoothing=0.1, mixup_off_epoch=3), 5, seed=0)
    images, targets = mixing_batch()
    assert not torch.equal(mixer(images.clone(), targets, 0, epoch=2)[0], images)
    mixed, soft = mixer(images.clone(), targets, 0, epoch=3)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(soft, 0.9 * torch.nn.functional.one_hot(targets, 5) + 0.02)
