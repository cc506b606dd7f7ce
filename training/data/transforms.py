"""From a decoded image to the model's input: augmentation of training images, the crop of validation images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from timm.data.auto_augment import (
    AutoAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    posterize,
    rand_augment_transform,
)
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from files.errors import ConfigError
from training.data.draws import seed_global_generators

if TYPE_CHECKING:
    from training.config import AugmentSection


@dataclass(frozen=True)
class ImageSpec:
    """What a model expects of its input.

    Attributes:
        input_size: (C, H, W); C is 1 or 3.
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].
        interpolation: A name of `torchvision.transforms.InterpolationMode`. Digits are always resized bilinearly.
        crop_pct: Share of the resized image's side that the validation crop keeps, in (0, 1]. Digits are not cropped.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875


def check_spec(spec: ImageSpec) -> None:
    channels = spec.input_size[0]
    if channels not in (1, 3):
        raise ConfigError(f"the model takes {channels} input channels; images here have 1 (grey) or 3 (RGB)")
    if len(spec.mean) != channels or len(spec.std) != channels:
        raise ConfigError(f"mean {spec.mean} and std {spec.std} need one value for each of {channels} input channels")
    modes = [mode.value for mode in v2.InterpolationMode]
    if spec.interpolation not in modes:
        raise ConfigError(f"interpolation {spec.interpolation!r} is not one of {', '.join(modes)}")
    if not 0 < spec.crop_pct <= 1:
        raise ConfigError(f"crop_pct {spec.crop_pct} is not in (0, 1]")


def apply_seeded(transform: Any, image: Any, stream: int) -> Any:
    seed_global_generators(stream)
    return transform(image)


def train_transform(augment: AugmentSection, spec: ImageSpec) -> v2.Compose:
    """Crop or resize, flip, policy, colour jitter, affine, to tensor, normalise, erase.

    A policy and colour jitter given together are both applied (timm drops the jitter then).
    """
    channels, *size = spec.input_size
    interpolation = v2.InterpolationMode(spec.interpolation)
    steps: list[Any] = []
    if augment.crop_scale is not None:
        (smallest, largest), (narrowest, widest) = augment.crop_scale, augment.crop_ratio
        scale, ratio = (smallest, largest), (narrowest, widest)
        steps.append(v2.RandomResizedCrop(size, scale=scale, ratio=ratio, interpolation=interpolation))
    else:
        steps.append(v2.Resize(size, interpolation=interpolation))
    if augment.hflip:
        steps.append(v2.RandomHorizontalFlip(augment.hflip))
    steps += recolour_steps(augment, spec)
    if augment.rotate or augment.translate or augment.zoom:
        steps.append(
            v2.RandomAffine(
                (-augment.rotate, augment.rotate),
                translate=(augment.translate, augment.translate),
                scale=(1 - augment.zoom, 1 + augment.zoom),
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=list(_mean_colour(spec)[:channels]),
            )
        )
    steps += [*to_tensor_steps(), v2.Normalize(list(spec.mean), list(spec.std))]
    if (erase := build_erase(augment)) is not None:
        steps.append(erase)
    return v2.Compose(steps)


def val_transform(spec: ImageSpec) -> v2.Compose:
    size = spec.input_size[1:]
    return v2.Compose(
        [
            _ResizeToCover(size, spec),
            v2.CenterCrop(list(size)),
            *to_tensor_steps(),
            v2.Normalize(list(spec.mean), list(spec.std)),
        ]
    )


class _ResizeToCover:
    """Resizes so that a centre crop of `size` keeps crop_pct of the side that fits more tightly; the aspect is kept.

    Sides are rounded down, as timm does, whose published accuracies are reproduced that way.
    """

    def __init__(self, size: tuple[int, int], spec: ImageSpec) -> None:
        self.height, self.width = (math.floor(side / spec.crop_pct) for side in size)
        self.interpolation = v2.InterpolationMode(spec.interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.height * width >= self.width * height:
            size = [self.height, self.height * width // height]
        else:
            size = [self.width * height // width, self.width]
        return v2.Resize(size, interpolation=self.interpolation)(image)


def to_tensor_steps() -> list[Any]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]


def recolour_steps(augment: AugmentSection, spec: ImageSpec) -> list[Any]:
    """The steps between PIL images: a policy, then brightness, contrast and saturation (no hue, as in timm)."""
    steps: list[Any] = []
    if augment.auto_augment:
        steps.append(_Policy(augment.auto_augment, spec))
    if augment.color_jitter:
        strength = augment.color_jitter
        steps.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
    return steps


def build_erase(augment: AugmentSection) -> RandomErasing | None:
    """Random erasing of a normalised image, filled with noise per pixel as timm's training script does."""
    if not augment.random_erasing:
        return None
    return RandomErasing(augment.random_erasing, mode="pixel", device="cpu")


def _mean_colour(spec: ImageSpec) -> tuple[int, ...]:
    """The colour that normalises to about 0, for RGB images, in 0..255."""
    mean = spec.mean if len(spec.mean) == 3 else spec.mean * 3
    return tuple(min(255, round(255 * value)) for value in mean)


class _Policy:
    """A timm policy for RGB and grey images alike: timm's operations fill with a colour, so they run in RGB.

    Args:
        text: A policy that the config accepts (`training.data.augment.policy_problem` is None).
        spec: The model's input.
    """

    def __init__(self, text: str, spec: ImageSpec) -> None:
        name = text.split("-")[0]
        builder = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(
            name, auto_augment_transform
        )
        hints: dict[str, Any] = {
            "translate_const": int(min(spec.input_size[1:]) * 0.45),
            "img_mean": _mean_colour(spec),
        }
        if name == "augmix":
            hints["translate_pct"] = 0.3  # as timm.data.create_transform
        self.text = text
        self.transform: Any = builder(text, hints)
        chains = self.transform.policy if isinstance(self.transform, AutoAugment) else [self.transform.ops]
        for operation in chain.from_iterable(chains):
            if operation.aug_fn is posterize:
                operation.aug_fn = posterize_to_any

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.transform(image.convert("RGB")).convert(image.mode)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"


def posterize_to_any(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's posterize where 0 bits or fewer are kept as well: black, as Pillow gave before version 13 refused it."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **options)
