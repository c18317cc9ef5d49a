from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit import ImageError
from embedkit.images import read_bytes, read_image, thumbnail

GREYS = np.array([[0, 60, 120], [180, 220, 255]], dtype=np.uint8)


def png(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "PNG", **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(data: Any, **options: Any) -> Any:
    image = read_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values: Any) -> Any:
    return np.repeat(np.asarray(values)[..., None], 3, axis=2)


UPRIGHT: dict[int, Callable[[Any], Any]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_all_eight_orientations_are_set_upright(orientation: int, kind: str) -> None:
    stored = np.zeros((16, 32, 3), dtype=np.uint8)  # four flat corners survive JPEG
    stored[:8, :16], stored[:8, 16:], stored[8:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(stored), kind, exif=exif, **options)
    tolerance = 4 if kind == "JPEG" else 0
    np.testing.assert_allclose(rgb(data).astype(int), UPRIGHT[orientation](stored), atol=tolerance)
    untouched = UPRIGHT[orientation](stored) if kind == "TIFF" else stored  # Pillow turns a TIFF while it decodes it
    np.testing.assert_allclose(rgb(data, exif=False).astype(int), untouched, atol=tolerance)
    np.testing.assert_array_equal(rgb(Image.open(io.BytesIO(data))), rgb(data))


def test_sixteen_bits_are_turned_as_well() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.array([[0, 65535]], dtype=np.uint16)
    assert rgb(png(Image.fromarray(stored), exif=exif)).tolist() == [[[0] * 3], [[255] * 3]]


def test_a_broken_exif_block_does_not_cost_the_image() -> None:
    data = encoded(Image.fromarray(grey(GREYS)), "JPEG", quality=100)
    block = b"\xff\xe1" + struct.pack(">H", 20) + b"Exif\0\0" + b"II*\0\xff\xff\xff\xffgarb"
    assert rgb(data[:2] + block + data[2:]).shape == (2, 3, 3)


def test_grey_and_bilevel_images() -> None:
    assert (rgb(png(Image.fromarray(GREYS))) == grey(GREYS)).all()
    assert (rgb(png(Image.fromarray(GREYS > 100))) == grey((GREYS > 100) * 255)).all()


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bits_become_eight_by_rounding_and_never_by_clipping(dtype: str) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65406, 65407, 65535]], dtype=np.uint16)
    expected = grey([[0, 0, 1, 1], [128, 254, 255, 255]])
    mode = "I;16" if dtype == "<u2" else "I;16B"
    image = Image.frombytes(mode, (4, 2), values.astype(dtype).tobytes())
    assert (rgb(image) == expected).all()
    assert (rgb(encoded(image, "TIFF")) == expected).all()
    assert (rgb(values) == expected).all()
    assert (rgb(Image.fromarray(values.astype(np.int32))) == expected).all()


def test_floats_are_taken_from_zero_to_one_or_to_255_and_refused_elsewhere() -> None:
    unit = np.array([[0, 0.25, 1]], dtype=np.float32)
    assert (rgb(encoded(Image.fromarray(unit), "TIFF")) == grey([[0, 64, 255]])).all()
    beyond = np.array([[-0.01, 0.5, 1.01]], dtype=np.float32)  # As lossy compression leaves them.
    assert (rgb(Image.fromarray(beyond)) == grey([[0, 128, 255]])).all()
    assert (rgb(Image.fromarray(np.array([[0, 9.6, 255]], dtype=np.float32))) == grey([[0, 10, 255]])).all()
    for bad in (256.0, -1.0, np.nan, np.inf):
        with pytest.raises(ImageError, match=r"neither in \[0, 1\] nor in \[0, 255\]"):
            read_image(Image.fromarray(np.array([[0, bad]], dtype=np.float32)))


def test_transparency_lies_over_white() -> None:
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    expected = [[[200, 0, 0], [255, 255, 255], [127, 127, 127]]]
    assert rgb(png(Image.fromarray(pixels))).tolist() == expected
    assert rgb(pixels).tolist() == expected
    levels = np.array([[[0, 255], [0, 0]]], dtype=np.uint8)
    assert rgb(png(Image.frombytes("LA", (2, 1), levels.tobytes()))).tolist() == [[[0] * 3, [255] * 3]]
    assert rgb(png(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))).tolist() == [[[255] * 3]]
    assert rgb(png(Image.new("RGB", (1, 1), (1, 2, 4)), transparency=(1, 2, 3))).tolist() == [[[1, 2, 4]]]
    assert rgb(png(Image.new("L", (1, 1), 7), transparency=7)).tolist() == [[[255] * 3]]


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for column in range(3):
        image.putpixel((column, 0), column)
    colours = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert rgb(png(image)).tolist() == [colours]
    assert rgb(png(image, transparency=1)).tolist() == [[colours[0], [255] * 3, colours[2]]]
    assert rgb(png(image, transparency=b"\xff\x00\xff")).tolist() == [[colours[0], [255] * 3, colours[2]]]
    assert rgb(image.convert("PA")).tolist() == [colours]


def test_cmyk_ycbcr_lab_and_hsv() -> None:
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(rgb(encoded(inks, "JPEG", quality=100))[4, 4], [255, 0, 0], atol=6)
    assert rgb(encoded(inks, "TIFF"))[0, 0].tolist() == [255, 0, 0]
    for mode in ("YCbCr", "HSV"):
        image = Image.new("RGB", (2, 2), (0, 200, 40)).convert(mode)
        np.testing.assert_allclose(rgb(image)[0, 0].astype(int), [0, 200, 40], atol=3)
    np.testing.assert_allclose(rgb(Image.new("LAB", (2, 2), (255, 128, 128)))[0, 0], [255] * 3, atol=3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert rgb(data)[0, 0].tolist() == [255, 0, 0]


def test_path_bytes_image_and_array_are_one_and_the_same(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    path = tmp_path / "x.png"
    for source in (path, str(path), path.read_bytes(), Image.open(path), pixels, pixels / 255):
        np.testing.assert_array_equal(rgb(source), pixels)
    np.testing.assert_array_equal(rgb(pixels[..., :1]), grey(pixels[..., 0]))


def test_the_callers_image_is_left_as_it_is() -> None:
    image = Image.new("RGB", (2, 2), "red")
    read_image(image).putpixel((0, 0), (0, 0, 0))
    assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2, 3), dtype=np.int64),
        np.zeros((2, 2, 2), dtype=np.uint8),
        np.zeros(4, dtype=np.uint8),
        np.zeros((0, 2), dtype=np.uint8),
        np.full((2, 2), 1.5),
        np.full((2, 2), np.nan),
    ],
)
def test_an_array_that_is_no_image_is_refused(array: Any) -> None:
    with pytest.raises(ImageError, match="array"):
        read_image(array)


def broken_files() -> dict[str, tuple[bytes, str]]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg, lossless = encoded(noise, "JPEG"), png(noise)
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (lossless[: len(lossless) // 2], "truncated"),
        "header.jpg": (jpeg[:20], "cannot be decoded|not an image|truncated"),
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"this is a text", "not an image"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "a PostScript drawing"),
        "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        "noise.png": (lossless[:100] + bytes(50) + lossless[150:], "cannot be decoded|truncated"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_file_is_named_with_its_reason(name: str, tmp_path: Path) -> None:
    data, reason = broken_files()[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(tmp_path / name)
    assert caught.value.id == str(tmp_path / name)
    assert "\n" not in caught.value.reason
    with pytest.raises(ImageError) as caught:
        read_image(data, id="the/id.jpg")
    assert caught.value.id == "the/id.jpg"


def test_what_is_not_there_or_no_file_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="the file is missing"):
        read_bytes(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match=r"a folder, not an image"):
        read_bytes(tmp_path)


def bomb(width: int, height: int) -> bytes:
    """Return a PNG whose header promises more pixels than its data holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(ImageError, match="100000 x 100000 pixels are more than the limit"):
        read_image(bomb(100_000, 100_000))


def test_a_large_image_below_the_limit_warns_nobody() -> None:
    code = "import sys; from embedkit.images import read_image; read_image(sys.stdin.buffer.read())"
    data = bomb(12_000, 12_000)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], input=data, capture_output=True)
    assert b"ImageError" in done.stderr
    assert b"DecompressionBomb" not in done.stderr  # refused for its data, not for its size


def test_a_thumbnail_is_a_small_jpeg() -> None:
    image = Image.open(io.BytesIO(thumbnail(Image.new("RGB", (400, 200)), 100)))
    assert (image.format, image.size) == ("JPEG", (100, 50))
