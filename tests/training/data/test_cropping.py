"""Crops: where they lie is distributed as timm's and torchvision's, and what they show is what Pillow shows."""

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import v2

from tests.training.data.test_decoding import picture
from training.data.cropping import CROP_DRAWS, crop_box, resized, stacked
from training.data.decoding import pixels_of
from training.data.draws import hash_words, uniform

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def chance(a: np.ndarray, b: np.ndarray) -> float:
    """How likely two samples of one distribution differ as much (Kolmogorov and Smirnov)."""
    result: Any = stats.ks_2samp(a, b)
    return float(result.pvalue)


def boxes(height: int, width: int, count: int, **options: Any) -> np.ndarray:
    """(count, 4) of our boxes."""
    options = {"scale": SCALE, "ratio": RATIO, **options}
    draws = uniform(hash_words(7, np.arange(count)), CROP_DRAWS)
    return np.array([crop_box(row, height, width, **options) for row in draws])


def figures(found: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    """What is compared of boxes: size and shape, and where they lie in the room that they have."""
    top, left, h, w = found.T.astype(float)
    return {
        "area": h * w / (height * width),
        "aspect": np.log(w / h),
        "top": (top + 0.5) / (height - h + 1),
        "left": (left + 0.5) / (width - w + 1),
    }


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (80, 400)])
def test_boxes_are_distributed_as_those_of_timm_and_torchvision(height: int, width: int) -> None:
    count = 4000
    image = Image.new("L", (width, height))
    random.seed(0)
    of_timm = [RandomResizedCropAndInterpolation.get_params(image, SCALE, RATIO) for _ in range(count)]
    crop = v2.RandomResizedCrop(8, scale=SCALE, ratio=RATIO)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        told = [crop.make_params([image]) for _ in range(count)]
    of_torchvision = [[params[key] for key in ("top", "left", "height", "width")] for params in told]
    mine = figures(boxes(height, width, count), height, width)
    for reference in (np.array(of_timm), np.array(of_torchvision)):
        theirs = figures(reference, height, width)
        for name, values in mine.items():
            assert chance(values, theirs[name]) > 0.01, name
    # the test can fail: another range of areas is told apart
    other = figures(boxes(height, width, count, scale=(0.2, 1.0)), height, width)
    assert chance(other["area"], mine["area"]) < 1e-6


def test_boxes_lie_in_the_image_and_end_with_its_middle() -> None:
    found = boxes(20, 30, 2000, scale=(0.3, 1.0))
    assert (found >= 0).all() and (found[:, 0] + found[:, 2]).max() == 20 and (found[:, 1] + found[:, 3]).max() == 30
    assert found[:, :2].min(axis=0).tolist() == [0, 0]
    # no box fits: the largest in the middle of an allowed ratio
    assert crop_box([0.99] * CROP_DRAWS, 10, 100, scale=(1.0, 1.0), ratio=RATIO) == (0, 43, 10, 13)
    assert crop_box([0.99] * CROP_DRAWS, 100, 10, scale=(1.0, 1.0), ratio=RATIO) == (43, 0, 13, 10)
    assert crop_box([0.0] * CROP_DRAWS, 1, 1, scale=(1e-9, 1e-9), ratio=RATIO) == (0, 0, 1, 1)
    assert crop_box([0.99] * CROP_DRAWS, 9, 1, scale=(1.0, 1.0), ratio=(3, 4)) == (4, 0, 1, 1)
    assert crop_box([0.99] * CROP_DRAWS, 1, 9, scale=(1.0, 1.0), ratio=(0.2, 0.3)) == (0, 4, 1, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resizing_is_that_of_torchvision(interpolation: str, mode: str) -> None:
    pixels, box = pixels_of(picture(96, 80, mode)), (10, 20, 41, 53)
    for size in ([16, 24], [80, 96], [120, 60], [41, 53]):
        expected = v2.functional.resized_crop(
            pixels, *box, size=size, interpolation=v2.InterpolationMode(interpolation), antialias=True
        )
        assert torch.equal(resized(pixels, size, interpolation, box=box), expected)
        whole = v2.functional.resize(pixels, size, interpolation=v2.InterpolationMode(interpolation), antialias=True)
        assert torch.equal(resized(pixels, size, interpolation), whole)
        assert torch.equal(resized(pixels.contiguous(), size, interpolation, box=box), expected)


# The rows of docs/data.md: mean and largest difference from Pillow's pixels, in levels of 255.
INTERPOLATIONS = [mode.value for mode in v2.InterpolationMode]


def documented_differences() -> dict[str, tuple[float, float]]:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| \w+ \| ([\d.]+) \| (\d+) \|$", page, flags=re.MULTILINE)
    return {name: (float(mean), float(most)) for name, mean, most in rows}


def differences(interpolation: str) -> tuple[float, float]:
    """Mean and largest difference between our crops of photographs and Pillow's."""
    crop: Any = v2.functional.resized_crop
    mode = v2.InterpolationMode(interpolation)
    found = []
    for seed in range(6):
        image = picture(500, 375, seed=seed)
        for top, left, height, width in boxes(375, 500, 8):
            expected = crop(image, top, left, height, width, [224, 224], interpolation=mode)
            mine = resized(pixels_of(image), [224, 224], interpolation, box=(top, left, height, width))
            found.append((mine.int() - pixels_of(expected).int()).abs().float())
    difference = torch.stack(found)
    return difference.mean().item(), difference.max().item()


def test_pixels_are_those_of_pillow_as_documented() -> None:
    documented = documented_differences()
    assert list(documented) == INTERPOLATIONS
    for name, (mean, most) in documented.items():
        found = differences(name)
        assert found[0] == pytest.approx(mean, abs=0.003) and found[1] <= most, (name, found)
        assert found[0] <= 2


def test_a_batch_keeps_channels_together() -> None:
    images = [pixels_of(picture(9, 7, seed=i)) for i in range(3)]
    batch = stacked(images)
    assert batch.shape == (3, 3, 7, 9) and batch.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(batch, images, strict=True))
    assert math.prod(batch.shape) == batch.untyped_storage().nbytes()
