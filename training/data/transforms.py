"""From a decoded image to pixels of the model's size: augmentation in training, the crop in the middle in validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import numpy as np
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
from torch import Tensor
from torchvision.transforms import v2

from files.errors import ConfigError
from training.data.cropping import CROP_DRAWS, crop_box, resized
from training.data.decoding import picture_of, pixels_of
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

    @classmethod
    def of(cls, pretrained_cfg: Mapping[str, Any]) -> Self:
        """That of a model by its `pretrained_cfg`, timm's or ours."""
        return cls(*(pretrained_cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")))


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


class TrainTransform:
    """From a decoded image to one that training sees, in uint8: crop or resize, flip, policy, colour jitter, affine.

    Normalising and erasing follow for the whole batch (`training.data.normalise`). Crop and flip are drawn from the
    sample's stream and done on tensors; the other steps are those of libraries, draw from the global generators, and work
    on PIL images of the model's size. A policy and colour jitter given together are both applied (timm drops the jitter
    then).
    """

    def __init__(self, augment: AugmentSection, spec: ImageSpec) -> None:
        self.size = spec.input_size[1:]
        self.interpolation = spec.interpolation
        self.hflip = augment.hflip
        self.scale = None if augment.crop_scale is None else (augment.crop_scale[0], augment.crop_scale[1])
        self.ratio = (augment.crop_ratio[0], augment.crop_ratio[1])
        steps = recolour_steps(augment, spec)
        if augment.rotate or augment.translate or augment.zoom:
            steps.append(
                v2.RandomAffine(
                    (-augment.rotate, augment.rotate),
                    translate=(augment.translate, augment.translate),
                    scale=(1 - augment.zoom, 1 + augment.zoom),
                    interpolation=v2.InterpolationMode.BILINEAR,
                    fill=list(_mean_colour(spec)[: spec.input_size[0]]),
                )
            )
        self.on_pictures = v2.Compose(steps) if steps else None

    def __call__(self, pixels: Tensor, stream: int, draws: np.ndarray, size: Sequence[int] | None = None) -> Tensor:
        """Transforms one image.

        Args:
            pixels: (C, H, W) in uint8.
            stream: Seeds the global generators; call it inside `global_generators_kept`.
            draws: `TRAIN_DRAWS` numbers in [0, 1) of that stream.
            size: Height and width to give; the model's by default.

        Returns:
            (C, *size) in uint8.
        """
        box = None
        if self.scale is not None:
            box = crop_box(draws[1:], *pixels.shape[1:], scale=self.scale, ratio=self.ratio)
        pixels = resized(pixels, size or self.size, self.interpolation, box=box)
        if draws[0] < self.hflip:
            pixels = pixels.flip(-1)
        if self.on_pictures is not None:
            pixels = pixels_of(apply_seeded(self.on_pictures, picture_of(pixels), stream))
        return pixels


TRAIN_DRAWS = 1 + CROP_DRAWS
"""Numbers that `TrainTransform` takes: of the flip, and of the crop."""


class ValTransform:
    """From a decoded image to one that validation sees, in uint8: resized, and the middle of it.

    A centre crop of the model's size keeps crop_pct of the side that fits more tightly; the aspect is kept. Sides are
    rounded down, as timm does, whose published accuracies are reproduced that way.
    """

    def __init__(self, spec: ImageSpec) -> None:
        self.size = spec.input_size[1:]
        self.height, self.width = (math.floor(side / spec.crop_pct) for side in self.size)
        self.interpolation = spec.interpolation

    def __call__(self, pixels: Tensor) -> Tensor:
        """(C, H, W) in uint8 to the model's size."""
        pixels = _middle(pixels)
        height, width = pixels.shape[1:]
        if self.height * width >= self.width * height:
            size = [self.height, self.height * width // height]
        else:
            size = [self.width * height // width, self.width]
        return v2.functional.center_crop(resized(pixels, size, self.interpolation), list(self.size))


_LONGEST = 64  # times the short side


def _middle(pixels: Tensor) -> Tensor:
    """An image, or the middle of one that is very long: resized as a whole it would take gigabytes to be cropped from."""
    height, width = pixels.shape[1:]
    # as many rows or columns are left out on either side, so that the middle stays where it is
    down = max(0, height - _LONGEST * width) // 2
    right = max(0, width - _LONGEST * height) // 2
    return pixels[:, down : height - down, right : width - right]


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
        if image.mode == "RGB":
            return self.transform(image)
        return self.transform(image.convert("RGB")).convert(image.mode)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"


def posterize_to_any(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's posterize where 0 bits or fewer are kept as well: black, as Pillow gave before version 13 refused it."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **options)
