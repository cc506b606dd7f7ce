"""Small images, transformed a batch at a time: the affine map, and the other augmentations."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.training.data.parts import AFFINE, EVERYTHING, POLICIES, augment_section, digits
from training.data import small_images
from training.data.transforms import ImageSpec


def test_colour_digits_repeat_the_grey_channel() -> None:
    grey = digits(ImageSpec((1, 16, 12), (0.0,), (1.0,)), **AFFINE)
    colour = digits(ImageSpec((3, 16, 12), (0.0,) * 3, (1.0,) * 3), **AFFINE)
    for a, b in ((grey.train[1, 3][0], colour.train[1, 3][0]), (grey.val[3][0], colour.val[3][0])):
        assert a.shape == (1, 16, 12)
        assert torch.equal(a.expand(3, -1, -1), b)


def test_without_augmentation_training_digits_are_plain() -> None:
    spec = ImageSpec((1, 16, 16), (0.3,), (0.35,))
    train = digits(spec).train
    assert torch.equal(train[0, 3][0], train.pipeline.plain([3])[0])
    assert torch.equal(train[0, 3][0], train[9, 3][0])


def affine_of(image: torch.Tensor, draws: list[float], monkeypatch: pytest.MonkeyPatch, **augment: Any) -> torch.Tensor:
    """The affine map of one image, with its nine draws (in [0, 1), 0.5 is the middle) given."""
    monkeypatch.setattr(small_images, "uniform", lambda streams, count: np.array([draws]))
    return small_images._affine(image[None], augment_section(**augment), np.zeros(1, dtype=np.uint64))[0]


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


def test_each_augmentation_of_digits_changes_images() -> None:
    plain = digits().train
    settings: list[dict[str, Any]] = [{key: EVERYTHING[key]} for key in EVERYTHING] + [
        {"auto_augment": p} for p in POLICIES
    ]
    for augment in settings:
        train = digits(**augment).train
        changed = [not torch.equal(train[e, 0][0], plain[e, 0][0]) for e in range(10)]
        assert any(changed), augment
