"""torchvision's data sets, in folders laid out as torchvision has them; nothing is downloaded."""

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from tests.training.data.parts import (
    COLOUR,
    augment_section,
    data_section,
    fails,
    paths,
    refused,
    train_loader,
    write_image,
)
from training.data.build import build_datasets, class_names_of_data
from training.data.dataset import DataBundle
from training.data.images import check_images
from training.data.torchvision_sets import NAMES


def built(name: str, root: Path | None, *, seed: int = 0, **data: Any) -> DataBundle:
    section = data_section(dataset=f"torchvision/{name}", root=None if root is None else str(root), **data)
    bundle = build_datasets(section, augment_section(), COLOUR, seed=seed)
    assert class_names_of_data(section) == bundle.class_names
    return bundle


def mnist(root: Path, *, name: str = "MNIST") -> Path:
    """30 training and 10 test digits as idx files, pixel 0 is the index."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 10)):
        pixels = np.zeros((count, 28, 28), dtype=np.uint8)
        pixels[:, 0, 0] = np.arange(count)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    return root


def test_mnist_has_train_and_test(tmp_path: Path) -> None:
    bundle = built("MNIST", mnist(tmp_path))
    assert (len(bundle.train), len(bundle.val), bundle.test) == (30, 10, None)
    assert bundle.class_names[:2] == ["0 - zero", "1 - one"] and bundle.val.targets == list(range(10))
    raw = bundle.train.source.open(7)
    assert isinstance(raw, Image.Image) and raw.size == (28, 28) and raw.getpixel((0, 0)) == 7
    assert bundle.train.source.name(7) == "7" and bundle.train.source.location == "", "in memory"
    check_images(bundle)
    (images, *_), *_ = train_loader(bundle, workers=1, batch_size=4)
    assert images.shape == (4, 3, 16, 16)


def test_a_test_part_is_left_alone_where_training_is_split(tmp_path: Path) -> None:
    bundle = built("FashionMNIST", mnist(tmp_path, name="FashionMNIST"), val_fraction=0.4, train_samples=10)
    assert bundle.test is not None and (len(bundle.train), len(bundle.val), len(bundle.test)) == (10, 10, 10)
    assert bundle.class_names[0] == "T-shirt/top" and bundle.identity["dataset"] == "torchvision/FashionMNIST"


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two training batches of 20 and a test batch of 10, with their digests where torchvision keeps them."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: Any) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(count: int) -> dict[str, Any]:
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [i % 10 for i in range(count)]}

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write(f"data_batch_{i}", batch(20)) for i in (1, 2)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", batch(10))])
    name, digest = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    return root


def test_cifar10_from_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = cifar10(tmp_path, monkeypatch)
    bundle = built("CIFAR10", root)
    assert (len(bundle.train), len(bundle.val)) == (40, 10) and bundle.class_names == list("abcdefghij")
    raw = bundle.train.source.open(3)
    assert isinstance(raw, Image.Image) and raw.size == (32, 32) and raw.mode == "RGB"
    copy = pickle.loads(pickle.dumps(bundle.train.source))
    assert copy.open(3).tobytes() == raw.tobytes() and copy.targets == bundle.train.targets
    kept = built("CIFAR10", root, classes=["c", "a"], folds=2, fold=1)
    assert kept.class_names == ["a", "c"] and (len(kept.train), len(kept.val)) == (4, 4)
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"cut")
    with fails("data.root: 'torchvision/CIFAR10' cannot be read from", "corrupted", "data.download=true downloads it"):
        built("CIFAR10", root)


def test_folders_by_class_have_one_part(tmp_path: Path) -> None:
    for name in ("Forest", "River"):
        for i in range(5):
            write_image(tmp_path / "eurosat" / "2750" / name / f"{name}_{i}.jpg", seed=i)
    with fails("data.val_fraction: dataset 'torchvision/EuroSAT' has no part for validation"):
        built("EuroSAT", tmp_path)
    bundle = built("EuroSAT", tmp_path, val_fraction=0.2)
    assert (len(bundle.train), len(bundle.val)) == (8, 2) and bundle.class_names == ["Forest", "River"]
    names = [bundle.val.source.name(i) for i in range(2)]
    assert names[0].startswith("eurosat/2750/Forest/Forest_"), "known by their files, from the root"
    check_images(bundle)
    Path(paths(bundle.train)[0]).write_bytes(b"no image")
    with fails("1 of 10 images cannot be read", "Forest_"):
        check_images(bundle)


def gtsrb(root: Path) -> None:
    folder = root / "gtsrb" / "GTSRB"
    for sign in (0, 1):
        for i in range(3):
            write_image(folder / "Training" / f"0000{sign}" / f"{i}.ppm", seed=i)
            write_image(folder / "Final_Test" / "Images" / f"{sign}{i}.ppm", seed=i)
    rows = [f"{sign}{i}.ppm;{sign}" for i in (2, 0, 1) for sign in (1, 0)]
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(["Filename;ClassId", *rows]))


def test_signs_have_numbers_for_names(tmp_path: Path) -> None:
    gtsrb(tmp_path)
    bundle = built("GTSRB", tmp_path)
    assert bundle.class_names == ["0", "1"] and bundle.val.targets == [0, 0, 0, 1, 1, 1]
    assert [Path(path).name for path in paths(bundle.val)] == [
        "00.ppm",
        "01.ppm",
        "02.ppm",
        "10.ppm",
        "11.ppm",
        "12.ppm",
    ]
    with (file := bundle.val.source.open(4)):  # type: ignore[union-attr]
        assert Path(file.name).name == "11.ppm"  # type: ignore[union-attr]


def dtd(root: Path, parts: dict[str, str]) -> None:
    """Textures: `parts` are the classes of each part by a letter an image."""
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for part, letters in parts.items():
        names = [f"{letter}/{letter}_{part}{i}.jpg" for i, letter in enumerate(letters)]
        for i, name in enumerate(names):
            write_image(folder / "images" / name, seed=i)
        (folder / "labels" / f"{part}1.txt").write_text("\n".join(names))


def test_three_parts_by_split(tmp_path: Path) -> None:
    dtd(tmp_path, {"train": "aabbc", "val": "ac", "test": "bc"})
    bundle = built("DTD", tmp_path)
    assert bundle.test is not None and bundle.class_names == ["a", "b", "c"]
    assert bundle.val.targets == [0, 2] and bundle.test.targets == [1, 2], "by name, though the part counts only two"
    with fails("data.val_fraction: has no effect, the data have a part for validation"):
        built("DTD", tmp_path, val_fraction=0.5)


def test_a_test_part_that_is_of_no_use_stops_no_training(tmp_path: Path) -> None:
    dtd(tmp_path, {"train": "aabb", "val": "ab", "test": "ax"})
    bundle = built("DTD", tmp_path)
    assert bundle.test is None
    assert bundle.left_out == "the test part (test of 'torchvision/DTD' has a class that train has not: 'x')"
    dtd(tmp_path / "other", {"train": "aabb", "val": "ax", "test": "ab"})
    with fails("val of 'torchvision/DTD' has a class that train has not: 'x'"):
        built("DTD", tmp_path / "other")


def test_a_training_part_of_another_name(tmp_path: Path) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for part in ("trainval", "test"):
        lines = []
        for label, kind in enumerate(["Abyssinian", "great_pyrenees"], start=1):
            write_image(folder / "images" / f"{kind}_{part}.jpg")
            lines.append(f"{kind}_{part} {label} {label} 1")
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(lines))
    bundle = built("OxfordIIITPet", tmp_path)
    assert bundle.class_names == ["Abyssinian", "Great Pyrenees"] and (len(bundle.train), len(bundle.val)) == (2, 2)


def test_fake_data_need_no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(datasets.FakeData):
        def __init__(self) -> None:
            super().__init__(size=40, image_size=(3, 8, 8), num_classes=3)

    monkeypatch.setattr(datasets, "FakeData", Small)
    before = torch.get_rng_state()
    bundle = built("FakeData", None, val_fraction=0.25)
    assert torch.equal(torch.get_rng_state(), before)
    assert bundle.class_names == ["0", "1", "2"] and len(bundle.train) + len(bundle.val) == 40
    assert torch.equal(bundle.train[0, 2][0], built("FakeData", None, val_fraction=0.25).train[0, 2][0])


def test_names_that_are_not_read(tmp_path: Path) -> None:
    with fails("data.dataset: torchvision has no data set 'cifar10'; did you mean 'CIFAR10'?", "known are CIFAR10, "):
        built("cifar10", tmp_path)
    with fails("has no data set 'Flower102'; did you mean 'Flowers102'?"):
        built("Flower102", tmp_path)
    for name in ("VOCDetection", "Kinetics", "CelebA", "CocoCaptions", "Cityscapes", "VisionDataset"):
        with fails(f"data.dataset: torchvision's {name} is not read", "read are CIFAR10"):
            built(name, tmp_path)
    with fails("'torchvision/ImageFolder' is data.dataset=folder here"):
        built("ImageFolder", tmp_path)
    assert "torchvision/NAME" in refused(dataset="torchvision")
    assert "has no effect with dataset 'digits'" in refused(dataset="digits", download=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_one_of_torchvision_and_says_when_it_is_not_there(name: str, tmp_path: Path) -> None:
    if name == "FakeData":
        return
    with fails(f"data.root: dataset 'torchvision/{name}' needs a root"):
        built(name, None)
    with fails("data.root: ", f"'torchvision/{name}' cannot be read from '{tmp_path / 'none'}'"):
        built(name, tmp_path / "none")
    assert not (tmp_path / "none").exists() or not [p for p in (tmp_path / "none").rglob("*") if p.is_file()]


def refusing(*args: Any, **kwargs: Any) -> Any:
    raise OSError("network is unreachable")


def test_downloading_is_asked_for_and_fails_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Callable[..., Any]] = []

    def download(self: Any) -> None:
        calls.append(self)
        mnist(tmp_path / "fetched")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    with fails("Dataset not found", "data.download=true downloads it"):
        built("MNIST", tmp_path / "fetched")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with fails("data.download: ", "several processes would download it at once", "--dry-run"):
        built("MNIST", tmp_path / "fetched", download=True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not calls
    section = data_section(dataset="torchvision/MNIST", root=str(tmp_path / "fetched"), download=True)
    with fails("Dataset not found"):
        class_names_of_data(section)  # names alone download nothing
    bundle = build_datasets(section, augment_section(), COLOUR, seed=0)
    assert len(bundle.train) == 30 and len(calls) == 1, "what is there is not downloaded again"
    monkeypatch.setattr(datasets.MNIST, "download", refusing)
    with fails("cannot be read from", "network is unreachable", "the download failed"):
        build_datasets(data_section(dataset="torchvision/MNIST", root=str(tmp_path / "x"), download=True),
                       augment_section(), COLOUR, seed=0)  # fmt: skip
    with fails("torchvision cannot download it"):
        built("FER2013", tmp_path, download=True)


def test_labels_are_read_from_samples_where_no_list_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(datasets.MNIST):
        """Gives other labels than its list says."""

        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return image, torch.tensor(label // 5)

    Odd.__name__ = "MNIST"  # a folder is called so
    monkeypatch.setattr(datasets, "MNIST", Odd)
    bundle = built("MNIST", mnist(tmp_path))
    assert bundle.val.targets == [0] * 5 + [1] * 5
    monkeypatch.setattr(Odd, "__getitem__", lambda self, index: (Image.new("L", (8, 8)), None if index == 3 else 1))
    with fails("a label of 'torchvision/MNIST' is no number of a class: None"):
        built("MNIST", tmp_path)
