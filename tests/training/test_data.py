"""Data sets, augmentation, sampling and mixing: purity, sharding, random states, and every mistake a user can make."""

import csv
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from models.strict_yaml import ConfigError
from training import data as data_module
from training.config import AugmentSection, DataSection
from training.data import (
    BatchMixer,
    DataBundle,
    EpochSampler,
    ImageSpec,
    PartialBatch,
    ReadError,
    SkipList,
    TrainDataset,
    Unreadable,
    ValDataset,
    build_datasets,
    build_train_loader,
    build_val_loader,
    check_images,
    check_same_data,
    class_names_of_data,
    data_difference,
    digits_split,
    lost_worker,
)

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
    monkeypatch.setattr(data_module, "_uniform", lambda streams, count: np.array([draws]))
    return data_module._affine(image[None], augment_section(**augment), np.zeros(1, dtype=np.uint64))[0]


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
    streams = data_module._hash(0, 2, [0] * 20000, np.arange(20000))
    assert len(set(streams.tolist())) == 20000
    draws = data_module._uniform(streams, 9)
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


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_the_validation_folder(image_root: Path, name: str) -> None:
    (image_root / "val").rename(image_root / name)
    assert len(folder(image_root).val) == 6


def test_val_comes_before_other_names(image_root: Path) -> None:
    write_image(image_root / "test" / "other" / "0.jpg")
    assert len(folder(image_root).val) == 6


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
    (image_root / "val").rename(image_root / "valid")
    with fails("no folder for validation", "folders there: 'train', 'valid'", "allowed names: val, validation, test"):
        folder(image_root)


def test_folders_without_classes_or_images_are_refused(image_root: Path, tmp_path: Path) -> None:
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "val").mkdir()
    with fails("train' has no class folders"):
        folder(tmp_path / "bare")
    (image_root / "val" / "poppy").mkdir()
    (image_root / "val" / "poppy" / "notes.txt").write_text("no image")
    with fails(str(image_root / "val" / "poppy"), "has no images", ".jpeg"):
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
    ("policy", "problem"),
    [
        ("randaugment", "unknown policy 'randaugment'"),
        ("orginal", "did you mean 'original'"),
        ("rand-magnitude9", "'magnitude9' is not a setting of rand"),
        ("rand-m", "'m' is not a setting"),
        ("rand-m9.5", "'m9.5' is not a setting"),
        ("rand-n0", "'n0' is not a setting"),
        ("rand-p1.5", "'p1.5' is above 1"),
        ("rand-tfoo", "'tfoo' is not a setting"),
        ("rand-m9-m5", "'m' is given twice"),
        ("augmix-n2", "'n2' is not a setting of augmix"),
        ("v0-m9", "'m9' is not a setting of v0"),
    ],
)
def test_a_bad_policy_is_refused_at_build_time(policy: str, problem: str, image_root: Path) -> None:
    augment = augment_section().model_copy(update={"auto_augment": policy})  # past the section's own check
    for data, spec in ((data_section(), GREY), (data_section(dataset="folder", root=str(image_root)), COLOUR)):
        with fails(f"augment.auto_augment: '{policy}'", problem, "allowed: rand", "augmix", "original"):
            build_datasets(data, augment, spec, seed=0)


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
    monkeypatch.setattr(data_module, "FULL_CHECK_LIMIT", limit)
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
    monkeypatch.setattr(data_module, "FULL_CHECK_LIMIT", 0)
    path = image_root / "train" / "aster" / "0-plain.JPEG"
    path.write_bytes(path.read_bytes() + b"appended by a camera")
    check_images(folder(image_root))


def test_only_doubtful_files_are_decoded_in_a_big_folder(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(data_module, "_damage", decoded.append)
    monkeypatch.setattr(data_module, "FULL_CHECK_LIMIT", 0)
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
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
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
    assert data_module.collate(lost) == PartialBatch(None, lost)


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
