"""Which library decodes images: torchcodec where it is installed, Pillow for all that torchcodec does otherwise or not.

Pillow reads every header. What is a plain JPEG by it (8 bits, grey or RGB, upright) goes to torchcodec, which gives the
same pixels by the same libjpeg-turbo without a copy through an image object. What torchcodec refuses goes back to
Pillow, whose verdict counts: so a damaged file is refused, or read, alike by both.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import IO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from files.errors import ConfigError

DecoderName = Literal["torchcodec", "pillow"]


def decoder_problem() -> str | None:
    """Why torchcodec cannot be used here, or None."""
    try:
        from torchcodec.decoders import decode_jpeg  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # not there, too old, or without a library that it needs
        text = str(error).strip()
        return text.splitlines()[0] if text else type(error).__name__
    return None


def choose_decoder(wanted: Literal["auto", "torchcodec", "pillow"]) -> DecoderName:
    """What decodes images in this process, by `data.decoder`.

    Raises:
        ConfigError: torchcodec is asked for and cannot be used.
    """
    if wanted == "pillow":
        return "pillow"
    problem = decoder_problem()
    if problem is None:
        return "torchcodec"
    if wanted == "torchcodec":
        raise ConfigError(
            f"data.decoder: 'torchcodec' cannot be used: {problem}\ninstall it (pip install -e '.[decode]'), or set auto"
        )
    return "pillow"


def describe_decoder(name: DecoderName) -> str:
    """What decodes images, with versions: on them depend pixels."""
    names = ("torchcodec", "pillow") if name == "torchcodec" else ("pillow",)
    return ", ".join(f"{name} {version(name)}" for name in names)


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether an opened image is a JPEG that torchcodec decodes to the pixels that Pillow gives."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):  # CMYK, several pictures (MPO)
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # a damaged EXIF block, which says nothing
        return True


def decode_plain_jpeg(file: IO[bytes]) -> Tensor | None:
    """The pixels of a plain JPEG, (3, H, W) in uint8; None where torchcodec does not decode it.

    Args:
        file: Opened for reading, anywhere in it.
    """
    from torchcodec.decoders import decode_jpeg

    file.seek(0)
    content = bytearray(file.read())  # no bytes: torch would warn of a buffer that cannot be written
    try:
        pixels = decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), mode="RGB")
    except (RuntimeError, ValueError):
        return None
    assert isinstance(pixels, Tensor)  # a list of files would give a list
    return pixels


def pixels_of(image: Image.Image) -> Tensor:
    """A picture of mode RGB or L as a tensor (C, H, W) in uint8, whose channels lie together in memory."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)


def picture_of(pixels: Tensor) -> Image.Image:
    """A tensor (C, H, W) in uint8 as a picture, of mode RGB or, of one channel, L."""
    array = pixels.permute(1, 2, 0).contiguous().numpy()  # (C, H, W) -> (H, W, C)
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
