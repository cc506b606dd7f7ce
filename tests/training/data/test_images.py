"""Image files: every kind of picture becomes 8 bits per channel; damage is found before a run."""

import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from tests.training.data.parts import digits, fails, folder, saved, write_image
from training.data import images as images_module
from training.data.images import check_images, read_image, to_rgb
from training.data.source import Source, place


def tiff(pixels: list[int], bits: int, kind: str, *, sample_format: int = 1, photometric: int = 1) -> bytes:
    """A grey or RGB TIFF of one row that Pillow does not write; `kind` is struct's letter, or "raw" for given bytes."""
    data = bytes(pixels) if kind == "raw" else struct.pack(f"<{len(pixels)}{kind}", *pixels)
    samples = 3 if photometric == 2 else 1
    width = 2 if kind == "raw" else len(pixels) // samples
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 12 * 10 + 4 + 6, 277: samples, 278: 1,
            279: len(data), 339: sample_format}  # fmt: skip
    entries = b""
    for tag, value in tags.items():
        if samples == 3 and tag == 258:
            entries += struct.pack("<HHII", tag, 3, 3, 8 + 2 + 12 * 10 + 4)  # three numbers, behind the directory
        elif samples == 3 and tag == 339:
            entries += struct.pack("<HHIHH", tag, 3, 1, value, 0)
        else:
            entries += struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value)
    return (
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + struct.pack("<3H", *[bits] * 3) + data
    )


def array_saved(values: list[float], kind: str, dtype: Any) -> bytes:
    return saved(Image.fromarray(np.array([values], dtype=dtype)), kind)


def turned(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def palette_image(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, *colour])
    return image


def frames(mode: str = "L") -> dict[str, Any]:
    return {"save_all": True, "append_images": [Image.new("L", (8, 8), 50).convert(mode)]}


def read(path: Path, channels: int) -> Image.Image:
    return read_image(path.open("rb"), channels)


HALF_WHITE = Image.new("RGB", (64, 32))
HALF_WHITE.paste((255, 255, 255), (0, 0, 32, 32))

BRIGHT = Image.new("L", (8, 8), 200)

# The rows of docs/data.md; of each file the first pixel is looked at.
PICTURES: dict[str, list[bytes]] = {
    "RGB, 8 bits": [saved(Image.new("RGB", (2, 2), (200, 100, 50)), kind) for kind in ("PNG", "BMP", "TIFF", "TGA")],
    "RGB, 16 bits": [tiff([51400, 25700, 12850] * 2, 16, "H", photometric=2)],
    "grey, 8 bits": [saved(Image.new("L", (2, 2), 128), kind) for kind in ("PNG", "JPEG", "TIFF", "PPM")],
    "grey, 16 bits": [
        *(array_saved([32896, 0], kind, np.uint16) for kind in ("PNG", "TIFF")),
        b"P5 2 1 65535\n" + bytes([128, 128, 0, 0]),
        b"P5 2 1 4095\n" + bytes([8, 8, 0, 0]),  # by its own maximum, as the format has it
        tiff([32896, 0], 16, "H"),
    ],
    "grey, 16 bits, signed": [tiff([16448, -5], 16, "h", sample_format=2)],
    "grey, 12 bits (TIFF)": [tiff([0x80, 0x8F, 0xFF], 12, "raw")],
    "grey, 16 bits, 0 is white (TIFF)": [tiff([32639, 0], 16, "H", photometric=0)],
    "grey, 32 bits, none above 255": [array_saved([128, 255], "TIFF", np.int32), tiff([128, 200], 32, "I")],
    "grey, 32 bits, none above 65535": [array_saved([32896, 65535], "TIFF", np.int32), tiff([32896, 256], 32, "I")],
    "grey, 32 bits, else": [
        array_saved([1078000000, 2**31 - 1], "TIFF", np.int32),
        tiff([1078000000, -5], 32, "i", sample_format=2),
    ],
    "grey, 32 bits, some above 2147483647 (unsigned)": [
        tiff([2156000000, 2**32 - 1], 32, "I"),
        array_saved([2156000000, 2**32 - 1], "TIFF", np.uint32),
    ],
    "float, none above 1.5": [
        array_saved([0.502, 1.5], "TIFF", np.float32),
        array_saved([0.502, np.nan, -3, np.inf], "TIFF", np.float32),
        b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.502, 1),
    ],
    "float, none above 382.5": [array_saved([128, 270], "TIFF", np.float32), array_saved([128, 1.6], "TIFF", np.float64)],
    "float, none above 98302.5": [array_saved([32896, 65535], "TIFF", np.float32)],
    "1 bit": [saved(Image.new("1", (2, 2), 1), kind) for kind in ("PNG", "TIFF", "PPM", "XBM", "BMP")],
    "palette": [saved(palette_image((200, 100, 50)), kind) for kind in ("PNG", "GIF", "BMP", "TIFF")],
    "RGBA, transparent": [
        *(saved(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), kind) for kind in ("PNG", "TIFF", "TGA")),
        saved(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "WEBP", lossless=True, exact=True),
    ],
    "RGBA, half transparent": [saved(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), kind) for kind in ("PNG", "TIFF")],
    "grey and alpha": [saved(Image.new("LA", (2, 2), (0, 128)), kind) for kind in ("PNG", "TIFF", "JPEG2000")],
    "palette with transparency": [
        saved(palette_image((200, 100, 50)), "PNG", transparency=1),
        saved(palette_image((200, 100, 50)), "PNG", transparency=b"\xff\x00"),
        saved(palette_image((200, 100, 50)), "GIF", transparency=1),
    ],
    "grey with a transparent value": [saved(Image.new("L", (2, 2), 7), "PNG", transparency=7)],
    "grey, 16 bits, with a transparent value": [
        saved(Image.fromarray(np.full((2, 2), 7, np.uint16)), "PNG", transparency=7)
    ],
    "RGB with a transparent colour": [saved(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3))],
    "CMYK": [
        saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"),
        saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100),
    ],
    "CIELAB": [saved(Image.new("LAB", (2, 2), (137, 128, 128)), "TIFF")],
    "EXIF orientation 6": [
        saved(HALF_WHITE, kind, exif=turned(), quality=100) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
    ] + [saved(HALF_WHITE, "TIFF", exif=turned(), compression="tiff_lzw")],
    "animated (GIF, WebP, PNG, AVIF)": [
        saved(BRIGHT, "GIF", **frames()),
        saved(BRIGHT, "PNG", **frames()),
        saved(BRIGHT.convert("RGB"), "WEBP", lossless=True, **frames("RGB")),
        saved(BRIGHT.convert("RGB"), "AVIF", quality=100, **frames("RGB")),
    ],
    "several pages (TIFF)": [saved(BRIGHT, "TIFF", **frames())],
}  # fmt: skip


def documented_pictures() -> dict[str, tuple[int, ...]]:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|[^|]+\|[^|]+\| (\d+) (\d+) (\d+) \|$", page, flags=re.MULTILINE)
    return {name: (int(r), int(g), int(b)) for name, r, g, b in rows}


def test_the_documented_table_is_complete() -> None:
    assert list(documented_pictures()) == list(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_becomes_what_the_documented_table_says(name: str, tmp_path: Path) -> None:
    expected = documented_pictures()[name]
    for content in PICTURES[name]:
        (tmp_path / "picture").write_bytes(content)
        image = read(tmp_path / "picture", 3)
        assert image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image)[0, 0], expected, atol=2 if b"JFIF" in content[:32] else 0)
        if name.startswith("EXIF"):
            assert image.size == (32, 64)
            assert np.asarray(image)[:31].min() > 250 and np.asarray(image)[33:].max() < 5
        grey = read(tmp_path / "picture", 1)
        assert grey.mode == "L" and grey == image.convert("L")


def test_a_model_of_one_channel_gets_grey(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "red.png")
    assert read(tmp_path / "red.png", 1).getpixel((0, 0)) == 76
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read(tmp_path / "clear.png", 1).getpixel((0, 0)) == 255


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "RGBX", "YCbCr", "HSV", "I;16B", "I;16L"])
def test_every_mode_of_pillow_is_converted(mode: str) -> None:
    image = Image.new("RGB", (3, 2), (204, 204, 204))
    if mode.startswith("I;16"):
        image = Image.new(mode, (3, 2), 204 * 257)
    elif mode in ("La", "PA", "RGBa"):
        image = image.convert({"La": "LA", "PA": "P", "RGBa": "RGBA"}[mode]).convert(mode)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    np.testing.assert_allclose(np.asarray(to_rgb(image)), 204, atol=1)


def test_the_same_picture_in_any_depth_is_the_same(tmp_path: Path) -> None:
    levels = np.arange(256).reshape(16, 16)
    stored = {"8.png": levels.astype(np.uint8), "16.png": (levels * 257).astype(np.uint16),
              "16.tif": (levels * 257).astype(np.uint16), "32.tif": (levels * 257).astype(np.int32),
              "float.tif": (levels / 255).astype(np.float32)}  # fmt: skip
    for name, pixels in stored.items():
        Image.fromarray(pixels).save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(read(tmp_path / name, 1)), levels, err_msg=name)
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for name, pixels in {"16.png": ramp.astype(np.uint16), "float.tif": (ramp / 65535).astype(np.float32)}.items():
        Image.fromarray(pixels).save(tmp_path / name)
        assert np.asarray(read(tmp_path / name, 1)).mean() / 255 == pytest.approx(0.498, abs=1e-3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned(orientation))
    # As EXIF defines them: where the 0th row and the 0th column of what is stored lie in the picture.
    across = pixels.transpose(1, 0, 2)
    expected = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: across, 6: across[:, ::-1],
                7: across[::-1, ::-1], 8: across[::-1]}[orientation]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(read(tmp_path / "a.png", 3)), expected)


def test_deep_pictures_are_turned_as_well(tmp_path: Path) -> None:
    values = np.zeros((32, 64), np.uint16)
    values[:, :32] = 65535
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name, exif=turned())
        turned_pixels = np.asarray(read(tmp_path / name, 1))
        assert turned_pixels.shape == (64, 32) and turned_pixels[:32].min() == 255 and turned_pixels[32:].max() == 0


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0garbage and more of it", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_a_damaged_exif_block_is_passed_over(block: bytes, tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.webp"):
        HALF_WHITE.save(tmp_path / name, exif=block)
        assert read(tmp_path / name, 3).size == HALF_WHITE.size


def damaged_exif(path: Path, keep: int) -> None:
    """A JPEG whose EXIF block ends after so many bytes: of 24 or fewer its first tag, how it is turned, is lost."""
    exif = turned()
    exif[ExifTags.Base.DateTime] = "2020:01:01 00:00:00"
    exif[ExifTags.Base.Artist] = "somebody"
    path.parent.mkdir(parents=True, exist_ok=True)
    HALF_WHITE.save(path, exif=exif.tobytes()[:keep])


@pytest.mark.parametrize("limit", [0, 2000], ids=["end of file", "decoded"])
def test_pillow_s_words_on_exif_are_said_once_with_the_file_where_they_matter(
    limit: int,
    image_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    warnings.filterwarnings(
        "ignore", module=images_module._EXIF_READER
    )  # as on import; tests have filters of their own
    monkeypatch.setattr(images_module, "FULL_CHECK_LIMIT", limit)
    lost, mended = (image_root / "train" / "aster" / f"{name}.jpg" for name in ("z-lost", "z-mended"))
    damaged_exif(lost, 20)
    damaged_exif(image_root / "val" / "aster" / "z-other.jpg", 20)
    damaged_exif(mended, 80)
    check_images(folder(image_root))
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("warning: damaged EXIF data do not say how an image is turned") and "2 of 24 images" in told
    assert told.endswith(f"the first is '{lost}'")
    assert read(lost, 3).size == (64, 32), "as it lies"
    assert read(mended, 3).size == (32, 64), "what is damaged is another tag"
    assert not [w for w in recwarn if "EXIF" in str(w.message) or "Truncated" in str(w.message)]
    for path in (lost, mended):
        warnings.filterwarnings("always", module=images_module._EXIF_READER)
        with pytest.warns(UserWarning, match=r"Corrupt EXIF data|Truncated File Read"):
            read(path, 3)


def test_decompression_bombs_are_refused_before_decoding(
    image_root: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    load = PngImageFile.load

    def guarded(image: PngImageFile) -> Any:
        assert image.width < 1000, "it was decoded"
        return load(image)

    monkeypatch.setattr(PngImageFile, "load", guarded)
    # Pillow refuses from twice its limit on, and only warns of the other.
    for size in ((20_000, 20_000), (9_500, 9_500)):
        bomb = image_root / "train" / "aster" / "bomb.png"
        header = struct.pack(">II5B", *size, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
        idat = struct.pack(">I", 4) + b"IDAT" + b"bomb" + struct.pack(">I", zlib.crc32(b"IDATbomb"))
        bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + idat + end)
        for limit in (0, 2000):
            monkeypatch.setattr(images_module, "FULL_CHECK_LIMIT", limit)
            with fails("1 of 22 images cannot be read", "bomb.png", "more than 89,478,485 pixels", "not decoded"):
                check_images(folder(image_root))
        assert not recwarn.list
        with pytest.raises(RuntimeError, match=r"cannot read image '.*bomb\.png': it has more than 89,478,485 pixels"):
            folder(image_root).train[0, 5]
        recwarn.clear()


def test_no_other_program_is_started_for_a_picture(image_root: Path) -> None:
    path = image_root / "train" / "aster" / "0-plain.JPEG"
    path.write_bytes(saved(Image.new("RGB", (8, 8)), "EPS"))  # Pillow would hand it to Ghostscript
    with fails("0-plain.JPEG", "cannot identify image file"):
        check_images(folder(image_root))


@pytest.mark.parametrize("limit", [0, 2000], ids=["end of file", "decoded"])
@pytest.mark.parametrize("kind", ["empty", "truncated jpg", "truncated png", "text", "truncated bmp"])
def test_a_damaged_image_is_found_before_training(
    kind: str, limit: int, image_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(images_module, "FULL_CHECK_LIMIT", limit)
    suffix = kind.split()[-1] if "truncated" in kind else "jpg"
    path = write_image(image_root / "train" / "daisy" / f"zz.{suffix}", size=(200, 200))
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"<html>not found</html>"}.get(kind, content[: len(content) * 2 // 3]))
    bundle = folder(image_root)
    with fails("data.root: 1 of 22 images cannot be read", str(path), "the file is empty" if kind == "empty" else ""):
        check_images(bundle)
    (image_root / "val" / "aster" / "deeper" / "0.jpg").write_bytes(b"")
    with fails("2 of 22 images cannot be read", f"the first is '{path}'", "data.on_error=skip"):
        check_images(bundle)
    with fails("2 of 22 images cannot be read", "data.max_skipped is 1"):
        check_images(bundle, allowed=1)
    check_images(bundle, allowed=2)
    assert f"2 of 22 images cannot be read and will be skipped; the first is '{path}'" in caplog.text


def test_an_image_with_an_unusual_end_is_not_called_damaged(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "FULL_CHECK_LIMIT", 0)
    path = image_root / "train" / "aster" / "0-plain.JPEG"
    path.write_bytes(path.read_bytes() + b"appended by a camera")
    check_images(folder(image_root))


def test_only_doubtful_files_are_decoded_in_a_big_folder(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    damage = images_module._damage

    def noted(source: Source, index: int) -> Any:
        decoded.append(place(source, index))
        return damage(source, index)

    monkeypatch.setattr(images_module, "_damage", noted)
    monkeypatch.setattr(images_module, "FULL_CHECK_LIMIT", 0)
    odd = write_image(image_root / "val" / "tulip" / "odd.bmp")
    check_images(folder(image_root))
    assert decoded == [str(odd)]


def test_digits_have_no_files_to_check() -> None:
    check_images(digits())
