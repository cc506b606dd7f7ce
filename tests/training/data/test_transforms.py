"""Transforms: validation as timm has it, each augmentation, every policy at every magnitude."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.training.data.parts import COLOUR, EVERYTHING, GREY, POLICIES, augment_section, folder, paths
from training.config import AugmentSection
from training.data import augment as augment_module
from training.data import draws as draws_module
from training.data import transforms
from training.data.cropping import crop_box, resized
from training.data.transforms import TRAIN_DRAWS, ImageSpec, TrainTransform, ValTransform


def test_validation_images_are_those_of_timm(image_root: Path) -> None:
    from timm.data.transforms_factory import create_transform

    for crop_pct, interpolation in ((0.875, "bicubic"), (0.9, "bilinear"), (1.0, "bicubic")):
        spec = ImageSpec((3, 15, 15), COLOUR.mean, COLOUR.std, interpolation, crop_pct)
        bundle = folder(image_root, spec)
        reference: Any = create_transform(
            spec.input_size, mean=spec.mean, std=spec.std, interpolation=interpolation, crop_pct=crop_pct
        )
        for index in (0, 3, 5):
            with Image.open(paths(bundle.val)[index]) as image:
                expected = reference(image.convert("RGB"))
            # Torch resizes bytes by Pillow's method; the passes over rows and columns round otherwise.
            level = 1 / 255 / torch.tensor(spec.std).reshape(3, 1, 1)
            difference = (bundle.normalise(bundle.val[index][0][None])[0] - expected).abs() / level
            assert difference.max() < 1.01 and difference.mean() < 0.3


def test_oblong_validation_images_are_covered(image_root: Path) -> None:
    for size in ((12, 20), (20, 12)):
        assert folder(image_root, ImageSpec((3, *size), COLOUR.mean, COLOUR.std)).val[0][0].shape == (3, *size)


@pytest.mark.parametrize(("height", "width"), [(5, 331), (6, 400), (331, 5), (7, 700)])
def test_of_a_very_long_image_the_middle_is_resized(height: int, width: int) -> None:
    spec = ImageSpec((3, 14, 14), COLOUR.mean, COLOUR.std)
    pixels = (torch.arange(height * width * 3).reshape(3, height, width) * 37 % 251).to(torch.uint8)
    scale = 16 / min(height, width)
    whole = resized(pixels, [int(scale * height), int(scale * width)], spec.interpolation)
    found = ValTransform(spec)(pixels)
    assert (found.int() - v2.functional.center_crop(whole, [14, 14]).int()).abs().max() <= 2
    line = torch.zeros(1, 1, 80_000_000, dtype=torch.uint8).expand(3, -1, -1)  # 61 GB as a whole, 16 pixels high
    assert ValTransform(spec)(line).shape == (3, 14, 14)


def test_grey_models_get_grey_images(image_root: Path) -> None:
    bundle = folder(image_root, GREY, **EVERYTHING)
    assert bundle.train[0, 0][0].shape == bundle.val[0][0].shape == (1, 16, 16)


def test_each_augmentation_of_a_folder_changes_images(image_root: Path) -> None:
    plain = folder(image_root).train
    settings: list[dict[str, Any]] = [{"auto_augment": p} for p in POLICIES]
    settings += [{key: EVERYTHING[key]} for key in EVERYTHING if key != "random_erasing"]  # done by the batch
    for augment in settings:
        train = folder(image_root, **augment).train
        changed = [not torch.equal(train[e, 0][0], plain[e, 0][0]) for e in range(10)]
        assert any(changed), augment


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
    for name, settings in augment_module._POLICIES.items():
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


def test_crop_and_flip_are_those_drawn_and_move_no_generator(image_root: Path, unmoved_random_states: None) -> None:
    """The box, resized as torchvision does it, and turned round where the first number says so."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 40, 50), dtype=np.uint8))
    draws = draws_module.uniform(draws_module.hash_words(np.arange(20)), TRAIN_DRAWS)
    flipped = []
    for interpolation in ("bilinear", "bicubic", "lanczos"):
        spec = ImageSpec((3, 16, 16), COLOUR.mean, COLOUR.std, interpolation)
        transform = TrainTransform(augment_section(crop_scale=[0.2, 0.9], hflip=0.5), spec)
        for row in draws:
            found = transform(pixels, 0, row)
            top, left, height, width = crop_box(row[1:], 40, 50, scale=(0.2, 0.9), ratio=(3 / 4, 4 / 3))
            part = pixels[:, top : top + height, left : left + width]
            expected = resized(part, (16, 16), interpolation)
            flipped.append(row[0] < 0.5)
            assert torch.equal(found, expected.flip(-1) if flipped[-1] else expected)
    assert 0.2 < np.mean(flipped) < 0.8


def test_a_pipeline_crops_to_another_size_where_it_is_told_to(image_root: Path) -> None:
    pipeline: Any = folder(image_root, **EVERYTHING).train.pipeline
    streams = draws_module.hash_words(1, np.arange(2))
    with draws_module.global_generators_kept():
        assert pipeline.augmented([0, 1], streams).shape == (2, 3, 16, 16)
        assert pipeline.augmented([0, 1], streams, size=(24, 20)).shape == (2, 3, 24, 20)
