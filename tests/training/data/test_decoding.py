"""Decoders: both give the same pixels and the same verdict on every file, and neither is missed."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from files.errors import ConfigError
from tests.training.data.parts import COLOUR, augment_section, data_section, fails, folder, refused, saved
from tests.training.data.test_images import PICTURES, documented_pictures, turned
from training.data import decoding
from training.data.build import build_datasets
from training.data.decoding import (
    choose_decoder,
    decode_plain_jpeg,
    describe_decoder,
    is_plain_jpeg,
    picture_of,
    pixels_of,
)
from training.data.images import read_pixels

pytest.importorskip("torchcodec")


def picture(width: int = 96, height: int = 80, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours under noise, as a photograph has them."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)).convert(mode)


def decoded(content: bytes, decoder: Any, channels: int = 3) -> np.ndarray | str:
    """The pixels (H, W, C), or why there are none."""
    try:
        return read_pixels(io.BytesIO(content), channels, decoder).permute(1, 2, 0).numpy()
    except Exception as error:
        return str(error)


def same(content: bytes, channels: int = 3) -> np.ndarray | str:
    """What both decoders make of a file, after checking that it is the same."""
    first, second = decoded(content, "pillow", channels), decoded(content, "torchcodec", channels)
    if isinstance(first, str) or isinstance(second, str):
        assert isinstance(first, str) and first == second
    else:
        np.testing.assert_array_equal(first, second)
    return first


@pytest.fixture
def by_torchcodec(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each file handed to torchcodec, whether that decoded it."""
    seen: list[bool] = []

    def watched(file: Any) -> torch.Tensor | None:
        pixels = decode_plain_jpeg(file)
        seen.append(pixels is not None)
        return pixels

    monkeypatch.setattr("training.data.images.decode_plain_jpeg", watched)
    return seen


@pytest.mark.parametrize("name", PICTURES)
def test_the_documented_table_holds_with_torchcodec(name: str) -> None:
    for content in PICTURES[name]:
        for channels in (3, 1):
            pixels = same(content, channels)
            assert isinstance(pixels, np.ndarray)
            if channels == 3:
                tolerance = 2 if b"JFIF" in content[:32] else 0
                np.testing.assert_allclose(pixels[0, 0], documented_pictures()[name], atol=tolerance)


def test_every_plain_jpeg_goes_to_torchcodec_and_has_the_same_pixels(by_torchcodec: list[bool]) -> None:
    options: list[dict[str, Any]] = [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}]
    count = 0
    for size in ((1, 1), (17, 33), (63, 47), (96, 80)):
        for mode in ("RGB", "L"):
            for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
                for option in options:
                    same(saved(picture(*size, mode), "JPEG", quality=90, subsampling=subsampling, **option))
                    count += 1
    same(saved(picture(), "JPEG", keep_rgb=True))
    same(saved(picture(), "JPEG", exif=turned(1)))
    same(saved(picture(), "JPEG", exif=b"Exif\0\0garbage"))
    assert by_torchcodec == [True] * (count + 3)


@pytest.mark.parametrize(
    "content",
    [
        saved(picture(mode="CMYK"), "JPEG"),
        saved(picture(), "JPEG", exif=turned(6)),
        saved(picture(), "JPEG", xmp=b"<x:xmpmeta><rdf:Description tiff:Orientation='1' tiff:Orientation=\"8\"/>"),
        saved(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
        saved(picture(), "PNG"),
        saved(picture(), "WEBP"),
    ],
    ids=["CMYK", "EXIF", "XMP", "MPO", "PNG", "WebP"],
)
def test_all_else_stays_with_pillow(content: bytes, by_torchcodec: list[bool]) -> None:
    assert isinstance(same(content), np.ndarray)
    assert same(saved(picture(), "JPEG"), channels=1) is not None, "a grey image of a coloured one has Pillow's weights"
    assert by_torchcodec == []


def test_pictures_that_a_source_has_decoded_are_taken_as_they_are() -> None:
    pixels = read_pixels(picture(), 3, "torchcodec")
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(picture()))


def damaged(content: bytes, way: str, rng: np.random.Generator) -> bytes:
    """A file cut short, with or without an end marker put behind, with bits turned, or with a piece missing."""
    place = int(rng.integers(2, len(content)))
    if way == "bits":
        changed = bytearray(content)
        for at in rng.integers(0, len(content), 3):
            changed[at] ^= 1 << int(rng.integers(0, 8))
        return bytes(changed)
    return {
        "cut": content[:place],
        "cut and closed": content[:place] + b"\xff\xd9",
        "a piece missing": content[:place] + content[place + int(rng.integers(1, 300)) :],
    }[way]


@pytest.mark.parametrize("way", ["cut", "cut and closed", "bits", "a piece missing"])
def test_a_damaged_file_gets_one_verdict(way: str, by_torchcodec: list[bool]) -> None:
    rng = np.random.default_rng(0)
    files = [
        saved(picture(), "JPEG", quality=quality, progressive=progressive, subsampling=subsampling)
        for quality in (60, 95)
        for progressive in (False, True)
        for subsampling in (0, 2)
    ]
    results = [same(damaged(files[i % len(files)], way, rng)) for i in range(160)]
    refused_files = [result for result in results if isinstance(result, str)]
    assert refused_files if way == "cut" else len(refused_files) < len(results)
    assert True in by_torchcodec or way == "cut"
    if way == "cut":
        assert any("truncated" in text for text in refused_files)


def test_the_last_bytes_count() -> None:
    content = saved(picture(), "JPEG")
    assert "truncated" in str(same(content[:-2]))
    assert "truncated" in str(same(content[: len(content) // 2]))


def test_without_torchcodec_everything_works(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = folder(image_root, crop_scale=[0.5, 1.0])
    assert with_it.decoder is not None and with_it.decoder.startswith("torchcodec ")
    expected = [with_it.train[1, index][0] for index in range(len(with_it.train))] + [with_it.val[0][0]]
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # as if it were not installed
    without = folder(image_root, crop_scale=[0.5, 1.0])
    assert without.decoder == describe_decoder("pillow") != with_it.decoder
    found = [without.train[1, index][0] for index in range(len(without.train))] + [without.val[0][0]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ConfigError, match=r"data\.decoder: 'torchcodec' cannot be used: .*\n.*decode"):
        choose_decoder("torchcodec")


@pytest.mark.parametrize("error", [OSError("libx.so: cannot open"), RuntimeError(""), ImportError("no decode_jpeg")])
def test_a_torchcodec_that_does_not_load_is_passed_over(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise error

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Broken())
    assert choose_decoder("auto") == "pillow"
    with fails("data.decoder: 'torchcodec' cannot be used", str(error) or "RuntimeError"):
        choose_decoder("torchcodec")


def test_the_decoder_is_the_one_asked_for(image_root: Path, by_torchcodec: list[bool]) -> None:
    assert choose_decoder("pillow") == "pillow" and choose_decoder("auto") == choose_decoder("torchcodec")
    for decoder, count in (("pillow", 0), ("torchcodec", 6)):
        section = data_section(dataset="folder", root=str(image_root), decoder=decoder)
        bundle = build_datasets(section, augment_section(), COLOUR, seed=0)
        list(bundle.val)  # pyright: ignore[reportArgumentType]
        assert len(by_torchcodec) == count and (bundle.decoder or "").startswith(decoder)


def test_a_decoder_for_data_in_memory_is_refused() -> None:
    assert "has no effect with dataset 'digits'" in refused(dataset="digits", decoder="pillow")
    assert "decoder" in refused(dataset="digits", decoder="opencv")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_and_pixels_are_turned_into_each_other(mode: str) -> None:
    image = picture(5, 3, mode)
    pixels = pixels_of(image)
    assert pixels.shape == (len(mode), 3, 5) and pixels.dtype == torch.uint8
    assert picture_of(pixels) == image and picture_of(pixels.contiguous()) == image
    assert is_plain_jpeg(image) is False and decoding.decoder_problem() is None
