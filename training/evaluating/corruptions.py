"""Images made worse on purpose, by torchvision's transforms (JPEG by Pillow): how far does a model's accuracy carry?

Each kind has severities 1 to 5. They are this project's own, not those of ImageNet-C (Hendrycks and Dietterich 2019,
arXiv 1903.12261), whose images were made by other code: figures are not comparable with published ones. As there, the
image that the model would see is what is changed: resized, cropped, in 8 bits per channel.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from files.errors import ConfigError, nearest
from training.data.draws import global_generators_kept, hash_words, seed_global_generators
from training.data.source import Pipeline
from training.data.transforms import ImageSpec

SEVERITIES = 5
DEFAULT_SEVERITY = 3
_STREAM = 0xC0  # of draws, apart from those of training


def _noise(image: Tensor, sigma: float) -> Tensor:
    noisy = v2.GaussianNoise(sigma=sigma)(image.float() / 255)  # kept in [0, 1]
    return noisy.mul(255).round().to(torch.uint8)


def _blur(image: Tensor, sigma: float) -> Tensor:
    sigma *= min(image.shape[-2:]) / 224
    radius = max(1, round(3 * sigma))
    return F.gaussian_blur(image, [2 * min(radius, min(image.shape[-2:]) - 1) + 1] * 2, [sigma, sigma])


def _pixelate(image: Tensor, share: float) -> Tensor:
    small = [max(1, round(side * share)) for side in image.shape[-2:]]
    smaller = F.resize(image, small, v2.InterpolationMode.BILINEAR, antialias=True)
    return F.resize(smaller, list(image.shape[-2:]), v2.InterpolationMode.NEAREST)


def _jpeg(image: Tensor, quality: float) -> Tensor:
    file = io.BytesIO()  # by Pillow: torchvision gives up its own encoder
    F.to_pil_image(image).save(file, "JPEG", quality=int(quality))
    return F.pil_to_tensor(Image.open(file))


def _rotate(image: Tensor, degrees: float) -> Tensor:
    return F.rotate(image, degrees, v2.InterpolationMode.BILINEAR)


@dataclass(frozen=True)
class Kind:
    """A corruption: what it does to an image (C, H, W) of uint8, with a strength for each severity.

    Attributes:
        strength: What the numbers are.
        values: Of severity 1 to 5.
        apply: (image, value) -> image.
        colour: It changes nothing in images of one channel.
    """

    strength: str
    values: tuple[float, ...]
    apply: Callable[[Tensor, float], Tensor]
    colour: bool = False


CORRUPTIONS: dict[str, Kind] = {
    "gaussian_noise": Kind("standard deviation, white being 1", (0.04, 0.08, 0.12, 0.18, 0.26), _noise),
    "gaussian_blur": Kind("sigma in pixels of an image of 224, scaled with the size", (1, 2, 3, 4, 6), _blur),
    "jpeg": Kind("quality", (50, 25, 15, 10, 5), _jpeg),
    "pixelate": Kind("share of the side that is kept", (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8), _pixelate),
    "brightness": Kind("factor", (1.3, 1.6, 2.0, 2.5, 3.0), F.adjust_brightness),
    "darkness": Kind("factor", (0.7, 0.5, 0.35, 0.25, 0.15), F.adjust_brightness),
    "contrast": Kind("factor", (0.6, 0.45, 0.3, 0.2, 0.1), F.adjust_contrast),
    "saturation": Kind("factor", (0.6, 0.4, 0.2, 0.1, 0.0), F.adjust_saturation, colour=True),
    "posterize": Kind("bits per channel", (5, 4, 3, 2, 1), lambda image, value: F.posterize(image, int(value))),
    "rotate": Kind("degrees, against the clock", (5, 10, 15, 25, 40), _rotate),
}
"""By name."""


@dataclass(frozen=True)
class Corruption:
    """A kind at a severity; `str()` gives it as the user writes it."""

    name: str
    severity: int

    def __str__(self) -> str:
        return f"{self.name}:{self.severity}"

    def __call__(self, image: Tensor) -> Tensor:
        """An image (C, H, W) of uint8, changed."""
        kind = CORRUPTIONS[self.name]
        return kind.apply(image, kind.values[self.severity - 1])


def parse_corruptions(words: Sequence[str]) -> list[Corruption]:
    """`NAME[:severity]`, or `all[:severity]`, one or several.

    Raises:
        ConfigError: An unknown name, with the nearest, or a severity outside 1 to 5.
    """
    found = []
    for word in words:
        name, colon, severity = word.partition(":")
        if name != "all" and name not in CORRUPTIONS:
            raise ConfigError(
                f"--corrupt {word}: unknown corruption {name!r}{nearest(name, CORRUPTIONS)}\n"
                f"known: {', '.join(CORRUPTIONS)}, all"
            )
        if colon and severity not in {str(n) for n in range(1, SEVERITIES + 1)}:
            raise ConfigError(f"--corrupt {word}: the severity must be 1 to {SEVERITIES}, got {severity!r}")
        level = int(severity) if colon else DEFAULT_SEVERITY
        found += [Corruption(each, level) for each in (CORRUPTIONS if name == "all" else [name])]
    return list(dict.fromkeys(found))


def with_effect(corruptions: Sequence[Corruption], channels: int) -> tuple[list[Corruption], str]:
    """Those that change images of that many channels, and what is to be said of the others, if there are any.

    Raises:
        ConfigError: None of those given does.
    """
    idle = [c for c in corruptions if channels == 1 and CORRUPTIONS[c.name].colour]
    left = [c for c in corruptions if c not in idle]
    if not idle:
        return left, ""
    told = f"{', '.join(map(str, idle))} has no effect on images of one channel"
    if not left:
        raise ConfigError(f"--corrupt: {told}")
    return left, f"{told}: left out"


class Corrupted:
    """A pipeline whose validation images are corrupted; what is drawn belongs to the sample, as in training.

    Args:
        pipeline: Of the images as they are.
        corruption: What is done to each.
        spec: The model's input.
    """

    def __init__(self, pipeline: Pipeline, corruption: Corruption, spec: ImageSpec) -> None:
        self.pipeline = pipeline
        self.corruption = corruption
        self.mean = torch.tensor(spec.mean).reshape(-1, 1, 1)  # (C, 1, 1)
        self.std = torch.tensor(spec.std).reshape(-1, 1, 1)  # (C, 1, 1)

    def plain(self, indices: Sequence[int]) -> Tensor:
        images = self.pipeline.plain(indices)  # (B, C, H, W)
        raw = images.dtype == torch.uint8
        eight = images if raw else self.mean.add(images * self.std).mul(255).round().clamp(0, 255).to(torch.uint8)
        streams = hash_words(_STREAM, np.asarray(indices)).tolist()
        changed = []
        with global_generators_kept():
            for image, stream in zip(eight, streams, strict=True):
                seed_global_generators(stream)
                changed.append(self.corruption(image))
        bad = torch.stack(changed)
        return bad if raw else (bad.float() / 255).sub(self.mean).div(self.std)

    def augmented(self, indices: Sequence[int], streams: np.ndarray) -> Tensor:
        return self.pipeline.augmented(indices, streams)
