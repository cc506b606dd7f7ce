"""Images: opened, decoded and transformed one by one; checked before a run."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from files.errors import ConfigError, one_line
from files.words import counted
from training.data.cropping import stacked
from training.data.dataset import DataBundle
from training.data.decoding import DecoderName, decode_plain_jpeg, is_plain_jpeg, pixels_of
from training.data.draws import uniform
from training.data.source import Source, place
from training.data.transforms import TRAIN_DRAWS, ImageSpec, TrainTransform, ValTransform

if TYPE_CHECKING:
    from training.config import AugmentSection

logger = logging.getLogger(__name__)

# Of a damaged EXIF block, which only matters where it hides how an image is turned, Pillow warns without the file's name;
# `check_images` names it. Here, so that the loaders' workers are as quiet, however they are started.
_EXIF_READER = r"PIL\.TiffImagePlugin"
warnings.filterwarnings("ignore", module=_EXIF_READER)

# Images that wait to be looked at at one time: what waits takes 2 kB an image, which a million would multiply.
CHECKED_AT_ONCE = 4096

# Up to here every image is decoded before training (seconds); above, only header and end of file are looked at.
FULL_CHECK_LIMIT = 2000


class ImagePipeline:
    """Images of any source, decoded and transformed one by one; raw, in uint8 (see `training.data.normalise`).

    Args:
        source: The samples.
        augment: How training images are changed.
        spec: The model's input.
        decoder: Of `choose_decoder`.

    Attributes:
        turns: Where it is noted of which images it is not known how they are turned; None: nowhere.
    """

    def __init__(
        self, source: Source, augment: AugmentSection, spec: ImageSpec, *, decoder: DecoderName = "pillow"
    ) -> None:
        self.source = source
        self.channels = spec.input_size[0]
        self.decoder: DecoderName = decoder
        self.train_transform = TrainTransform(augment, spec)
        self.val_transform = ValTransform(spec)
        self.turns: UnknownTurns | None = None

    def plain(self, indices: Sequence[int]) -> Tensor:
        return stacked([self.val_transform(self._load(i)) for i in indices])

    def augmented(self, indices: Sequence[int], streams: np.ndarray, *, size: Sequence[int] | None = None) -> Tensor:
        """Images as training sees them, of the model's size or another (height, width)."""
        draws = uniform(streams, TRAIN_DRAWS)
        return stacked(
            [
                self.train_transform(self._load(index), stream, row, size)
                for index, stream, row in zip(indices, streams.tolist(), draws, strict=True)
            ]
        )

    def _load(self, index: int) -> Tensor:
        try:
            look = None if self.turns is None else partial(self.turns.look, index=index)
            return read_pixels(self.source.open(index), self.channels, self.decoder, look=look)
        except Exception as error:  # Pillow raises half a dozen types for a damaged file
            where = place(self.source, index)
            raise RuntimeError(f"cannot read image '{where}': {error or type(error).__name__}") from error


class UnknownTurns:
    """Which images have an EXIF block so damaged that it does not say how they are turned, noted while they are read.

    Args:
        source: The samples.

    Attributes:
        noted: (len(source),) in uint8, 1 for such an image; in shared memory, so that a loader's workers write to it.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.noted = torch.zeros(len(source), dtype=torch.uint8).share_memory_()

    def look(self, image: Image.Image, index: int) -> None:
        """Notes an opened image, if it is one of them."""
        if not image.info.get("exif"):
            return
        with warnings.catch_warnings():
            _listen()
            self.noted[index] = _turn_is_unknown(image)

    def warn(self, noted: Tensor | None = None) -> None:
        """Says in a line how many there are, if any; `noted`: of all processes that have read their part."""
        found = (self.noted if noted is None else noted).nonzero().flatten().tolist()
        if found:
            _warn_of_turns(len(found), len(self.source), place(self.source, found[0]))


def note_turns(pipeline: object) -> UnknownTurns | None:
    """Lets a pipeline of image files note them; None where it is another, of images that have no EXIF data."""
    if not isinstance(pipeline, ImagePipeline) or not pipeline.source.location:
        return None
    pipeline.turns = UnknownTurns(pipeline.source)
    return pipeline.turns


# Formats that Pillow recognises and cannot decode by itself. EPS would start Ghostscript on whatever a file holds.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.preinit()  # the usual ones first, as Image.open has them
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_DECODED)


@cache
def image_extensions() -> frozenset[str]:
    """Ends of file names that are taken for images: ".jpg", ".avif", ... in lower case."""
    formats = image_formats()
    return frozenset(end for end, name in Image.registered_extensions().items() if name in formats)


@contextmanager
def open_image(raw: IO[bytes] | Image.Image) -> Iterator[Image.Image]:
    """Reads the header of an image, no more; a picture is taken as it is.

    Args:
        raw: Of `Source.open`; closed at the end.

    Raises:
        ValueError: For more pixels than Pillow's limit against decompression bombs, which Pillow itself only warns of
            up to twice that number. Nothing has been decoded then.
        OSError: For a file that is no image.
    """
    limit = Image.MAX_IMAGE_PIXELS or 89_478_485
    if isinstance(raw, Image.Image):
        yield raw
        return
    # A file and no path: what Pillow maps into memory by path, it does not turn (TIFF, orientations 5 to 8).
    with raw as file:
        image = None
        try:
            with suppress(Image.DecompressionBombError):
                image = Image.open(file, formats=image_formats())
        except UnidentifiedImageError:
            raise OSError("cannot identify image file: it has no format that Pillow reads") from None
        if image is None or image.width * image.height > limit:
            raise ValueError(f"it has more than {limit:,} pixels (a decompression bomb?), so it was not decoded")
        with image:
            yield image


def read_image(raw: IO[bytes] | Image.Image, channels: int) -> Image.Image:
    """A raw sample as the data pipeline takes it: `open_image`, then `to_rgb`."""
    with open_image(raw) as image:
        return to_rgb(image, channels)


def read_pixels(
    raw: IO[bytes] | Image.Image,
    channels: int,
    decoder: DecoderName,
    *,
    look: Callable[[Image.Image], object] | None = None,
) -> Tensor:
    """A raw sample as `read_image` gives it, as a tensor (C, H, W) in uint8; by torchcodec where that does the same.

    `look` is shown the opened image, once it is decoded.
    """
    with open_image(raw) as image:
        pixels = None
        if decoder == "torchcodec" and channels == 3 and not isinstance(raw, Image.Image) and is_plain_jpeg(image):
            pixels = decode_plain_jpeg(raw)
        if pixels is None:
            upright = _in_8_bits(image)
            mode = _mode(channels)
            pixels = pixels_of(upright if upright.mode == mode else upright.convert(mode))  # either copies once
        if look is not None:
            look(image)
        return pixels


def to_rgb(image: Image.Image, channels: int = 3) -> Image.Image:
    """An opened image in 8 bits per channel, upright, on white where it is transparent.

    Of several frames or pages the first is taken (an opened image stands there). Colour profiles are not applied, but
    for CIELAB, which has no other meaning.

    Args:
        image: As `open_image` gives it: brightness of more than 8 bits is scaled by what the file says of its range.
        channels: 3 for mode RGB, 1 for mode L.
    """
    return _in_8_bits(image).convert(_mode(channels))


def _mode(channels: int) -> str:
    return "L" if channels == 1 else "RGB"


def _in_8_bits(image: Image.Image) -> Image.Image:
    """As `to_rgb`, in whatever mode of 8 bits that leaves; perhaps the image itself."""
    upright = _upright(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        upright = _to_8_bits(upright, image)
    elif upright.mode == "LAB":
        upright = ImageCms.profileToProfile(
            upright, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        assert upright is not None  # only a conversion in place returns None
    elif upright.has_transparency_data:
        if upright.mode == "La":  # premultiplied: Pillow knows one way out
            upright = upright.convert("LA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
    return upright


def _upright(image: Image.Image) -> Image.Image:
    """Decodes an image and turns it as its EXIF orientation says; one whose EXIF block is damaged stays as it is."""
    image.load()  # a damaged picture fails here, so that only EXIF is left to fail below
    try:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if upright else ImageOps.exif_transpose(image)
    except Exception:  # struct.error, SyntaxError, ... by what is wrong in the block
        return image


def _to_8_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Scales 16-bit, 32-bit and float brightness (modes I;16, I and F) to mode L; `opened` knows what the file says."""
    tags: Any = getattr(opened, "tag_v2", {})  # of TIFF
    values = np.asarray(image)
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    bits = 16 if image.mode.startswith("I;16") or opened.format in ("PNG", "PPM") else 32
    bits = tags.get(_BITS, (bits,))[0]
    # Pillow has no unsigned mode of 32 bits, and writes unsigned arrays as signed TIFFs: no black lies that far down.
    if image.mode == "I" and ((tags and not signed) or values.min(initial=0) < -(2**24)):
        values = values.view(np.uint32)
    white = _white(values) if bits == 32 or image.mode == "F" else 2.0 ** (bits - signed) - 1
    # By way of 16 bits, so that a picture has the same 8 bits, k of k * 257, whatever it is stored in.
    scaled = np.nan_to_num(values.astype(np.float32) / np.float32(white), nan=0.0).clip(0, 1)
    eight = ((scaled * 65535 + 0.5).astype(np.uint16) // 257).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        eight = 255 - eight  # the file says that 0 is white; Pillow turns only up to 8 bits round
    transparent = opened.info.get("transparency")
    if transparent is not None:
        eight[values == transparent] = 255
    return Image.fromarray(eight)


def _white(values: np.ndarray) -> float:
    """What is white in a picture whose type does not say: the smallest usual maximum that no pixel exceeds.

    Floats may exceed it by half, as a resized picture does at its edges.
    """
    floating = values.dtype.kind == "f"
    top = values.max(initial=0, where=np.isfinite(values)) / (1.5 if floating else 1)
    usual = (1.0, 255.0, 65535.0, 2.0**31 - 1) if floating else (255.0, 65535.0, 2.0**31 - 1)
    return next((white for white in usual if top <= white), 2.0**32 - 1)


def check_images(bundle: DataBundle, *, allowed: int = 0) -> None:
    """Looks for images that cannot be read, so that training does not stop on one hours later.

    Up to 2,000 images are decoded in full. Above that only the header is parsed and the end of the file looked at,
    which finds empty files, files that are no images, and truncated ones; a JPEG or PNG without its end marker in
    place, and any other format, is decoded, so that only the decoder calls a file damaged. Damage amid intact data may
    then be found in training only, where the error names the file. Under several processes one of them is enough.

    Images whose EXIF block is so damaged that it does not say how they are turned are warned of, in a line.

    Args:
        bundle: What to look at.
        allowed: So many unreadable images are only warned of: `data.max_skipped`.

    Raises:
        ConfigError: Naming the first unreadable image (training images first) and how many there are.
    """
    sources = [source for source in (bundle.train.source, bundle.val.source) if source.location]
    total = sum(len(source) for source in sources)
    if not total:
        return
    full = total <= FULL_CHECK_LIMIT
    samples = ((source, index) for source in sources for index in range(len(source)))
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what Pillow only warns of is refused here
        _listen()
        look = _damage if full else _obvious_damage
        bar = tqdm(total=total, desc="checking images", unit="", leave=False, disable=full or None)
        damaged, unturned, first_unturned = [], 0, None
        while some := list(itertools.islice(samples, CHECKED_AT_ONCE)):
            for sample, (reason, turn_unknown) in zip(some, pool.map(lambda sample: look(*sample), some), strict=True):
                if reason:
                    damaged.append((sample, reason))
                elif turn_unknown:
                    unturned, first_unturned = unturned + 1, first_unturned or sample
            bar.update(len(some))
        bar.close()
    if first_unturned is not None:
        _warn_of_turns(unturned, total, place(*first_unturned))
    if damaged:
        sample, reason = damaged[0]
        first = one_line(place(*sample))
        count = f"{len(damaged):,} of {counted(total, 'image')}"
        if len(damaged) <= allowed:
            logger.warning(
                "warning: %s cannot be read and will be skipped; the first is '%s': %s", count, first, reason
            )
            return
        advice = "mend or remove the files, or leave them out: data.on_error=skip"
        if allowed:
            advice = f"data.max_skipped is {allowed}; raise it, or mend or remove the files"
        raise ConfigError(f"data.root: {count} cannot be read; the first is '{first}'\n{reason}\n{advice}")


class _Look(NamedTuple):
    """What a look at an image has found: why it cannot be decoded, or None; and whether how it is turned is not known."""

    reason: str | None
    turn_unknown: bool = False


def _damage(source: Source, index: int) -> _Look:
    """Decodes a sample."""
    try:
        raw = source.open(index)
        if not isinstance(raw, Image.Image) and _size(raw) == 0:
            raw.close()
            return _Look("the file is empty")
        with open_image(raw) as image:
            to_rgb(image)
            return _Look(None, _turn_is_unknown(image))
    except Exception as error:  # Pillow raises half a dozen types for a damaged file
        return _Look(one_line(str(error)) or type(error).__name__)


def _obvious_damage(source: Source, index: int) -> _Look:
    """As `_damage`, without decoding JPEG and PNG files that have a valid header and their end marker at the end."""
    try:
        raw = source.open(index)
        if not isinstance(raw, Image.Image):
            with raw:
                raw.seek(max(0, _size(raw) - 64))
                end = raw.read().rstrip(b"\0")  # some writers pad with zeros
                raw.seek(0)
                with open_image(raw) as image:
                    marker = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}.get(image.format or "")
                    if marker and end.endswith(marker):
                        return _Look(None, _turn_is_unknown(image))
    except Exception:
        pass  # what is wrong is for the decoder to say
    return _damage(source, index)


class _Heard(threading.local):
    """Whether Pillow has warned of EXIF data in this thread."""

    exif = False


_heard = _Heard()


def _listen() -> None:
    """Lets `_heard` know of Pillow's warnings, until `warnings.catch_warnings` ends."""
    warnings.filterwarnings("always", module=_EXIF_READER)
    warnings.showwarning = _note_exif(warnings.showwarning)


def _warn_of_turns(unturned: int, total: int, first: str) -> None:
    logger.warning(
        "warning: damaged EXIF data do not say how an image is turned, so that it is taken as it lies: %s of %s; the "
        "first is '%s'", f"{unturned:,}", counted(total, "image"), one_line(first),
    )  # fmt: skip


def _note_exif(others: Callable[..., None]) -> Callable[..., None]:
    """For `warnings.showwarning`: notes what is said of EXIF data, and passes on what else there is."""

    def note(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if Path(filename).stem == "TiffImagePlugin":
            _heard.exif = True
        else:
            others(message, category, filename, *rest)

    return note


def _turn_is_unknown(image: Image.Image) -> bool:
    """Whether an opened image has an EXIF block so damaged that how it is turned cannot be read there."""
    block = image.info.get("exif")
    if not block:
        return False
    exif, _heard.exif = Image.Exif(), False
    try:
        exif.load(block)
        return ExifTags.Base.Orientation not in exif and _heard.exif
    except Exception:  # as in `_upright`
        return True


def _size(file: IO[bytes]) -> int:
    """Bytes of an opened file, which stands at its beginning afterwards."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size
