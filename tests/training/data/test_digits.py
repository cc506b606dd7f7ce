"""Digits: the split, and what they become."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.training.data.parts import GREY, augment_section, digits
from training.data.digits import digits_split
from training.data.images import ImagePipeline, read_image
from training.data.transforms import ImageSpec


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
    pixels = np.asarray(load_digits(return_X_y=True)[0])[digits_split()[1][5]].reshape(1, 8, 8) / 16
    torch.testing.assert_close(bundle.val[5][0], torch.tensor((pixels - 0.25) / 0.5).float())
    larger = digits(ImageSpec((3, 20, 12), (0.5,) * 3, (0.25,) * 3)).val[5][0]
    assert larger.shape == (3, 20, 12)
    assert larger.mean().item() == pytest.approx((pixels.mean() - 0.5) / 0.25, abs=0.05)


def test_the_raw_sample_is_the_picture() -> None:
    """Whoever does not want the batches of training gets a picture, as of any other data."""
    source = digits().val.source
    raw = source.open(7)
    assert isinstance(raw, Image.Image) and raw.size == (8, 8)
    pixels = np.asarray(load_digits(return_X_y=True)[0])[int(source.name(7))].reshape(8, 8) / 16
    assert source.name(7) == str(digits_split()[1][7])
    np.testing.assert_allclose(np.asarray(read_image(raw, 1)), pixels * 255, atol=1)
    assert ImagePipeline(source, augment_section(), GREY).plain([7, 8]).shape == (2, 1, 16, 16)
