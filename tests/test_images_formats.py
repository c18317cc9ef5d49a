"""What is read, what is refused with which words, and what a hostile file may cost: nothing but itself."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit import ImageError, Preprocessing
from embedkit.errors import FAILURE_KINDS
from embedkit.images import DECODERS, FORMATS, read_bytes, read_crop, read_image
from embedkit.images.headers import boxes, sizes_in

pillow_heif = pytest.importorskip("pillow_heif")
pillow_heif.register_heif_opener()
pytest.importorskip("pillow_jxl")

CORNERS = np.zeros((64, 128, 3), dtype=np.uint8)
CORNERS[:32, :64], CORNERS[:32, 64:], CORNERS[32:, :64] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
UPRIGHT: dict[int, Callable[[Any], Any]] = {
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2), 6: lambda p: np.rot90(p, -1), 7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}  # fmt: skip


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(data: bytes, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_image(data, id="it", **options)
    assert caught.value.kind in FAILURE_KINDS and "\n" not in caught.value.reason
    return caught.value


@pytest.mark.parametrize("kind", [*sorted(set(FORMATS) & Image.SAVE.keys()), "HEIF", "JXL", "MPO"])
def test_every_format_that_can_be_written_can_be_read(kind: str) -> None:
    options = {"sizes": [(128, 128)]} if kind == "ICO" else {}
    picture = Image.fromarray(CORNERS).resize((1024, 1024) if kind == "ICNS" else (128, 128))
    picture = picture.convert({"MSP": "1", "XBM": "1", "BLP": "P"}.get(kind, "RGB"))
    found = np.asarray(read_image(encoded(picture, kind, **options)))
    expected = np.asarray(picture.convert("RGB"))
    assert np.abs(found.astype(int) - expected).mean() < (40 if kind in ("BLP", "GIF") else 2)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "JXL", "JXL of a JPEG", "MPO"])
def test_images_of_newer_formats_are_turned_once_and_not_twice(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, expected = Image.fromarray(CORNERS), UPRIGHT[orientation](CORNERS)
    if kind.startswith("JXL"):
        image.save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
        data = encoded(Image.open(tmp_path / "a.jpg"), "JXL", lossless_jpeg=True)
        if kind == "JXL":  # Without what would make the JPEG again, the pixels themselves are decoded.
            data = b"".join(data[start - 8 : end] for kind, start, end in boxes(data) if kind != b"jbrd")
    else:
        data = encoded(image, kind, quality=100, subsampling="4:4:4", exif=exif.tobytes())
    found = np.asarray(read_image(data)).astype(int)
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 3
    lying = np.asarray(read_image(data, exif=False)).astype(int)
    turned_by_its_reader = kind in ("HEIF", "JXL")
    assert lying.shape == (expected if turned_by_its_reader else CORNERS).shape
    assert np.abs(lying - (expected if turned_by_its_reader else CORNERS)).mean() < 3


@pytest.mark.parametrize("twelve", [False, True])
def test_ten_and_twelve_bits_of_heic_and_sixteen_of_jpeg_xl(twelve: bool) -> None:
    wide = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    pillow_heif.options.SAVE_HDR_TO_12_BIT = twelve
    try:
        buffer = io.BytesIO()
        pillow_heif.from_bytes("I;16", (64, 64), wide.tobytes()).save(buffer, quality=-1)
        colours = np.ascontiguousarray(np.stack([wide, wide[::-1], wide.T], axis=-1))
        coloured = io.BytesIO()
        heic = pillow_heif.from_bytes("RGB;16", (64, 64), colours.tobytes())
        heic.save(coloured, quality=-1, chroma=444, matrix_coefficients=0)
    finally:
        pillow_heif.options.SAVE_HDR_TO_12_BIT = False
    rounded = np.rint(wide / 257)
    np.testing.assert_allclose(np.asarray(read_image(buffer.getvalue()))[..., 0], rounded, atol=1)
    np.testing.assert_array_equal(np.asarray(read_image(coloured.getvalue())), colours >> 8)
    lossless = encoded(Image.fromarray(wide), "JXL", lossless=True)
    np.testing.assert_array_equal(np.asarray(read_image(lossless))[..., 0], rounded)


def test_of_an_icon_the_largest_picture_and_of_two_views_the_first() -> None:
    icon = Image.new("RGBA", (64, 64), (10, 200, 30, 255))
    for form in ("png", "bmp"):
        data = encoded(icon, "ICO", sizes=[(16, 16), (64, 64), (32, 32)], bitmap_format=form)
        assert read_image(data).size == (64, 64)
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    data = encoded(first.copy(), "MPO", save_all=True, append_images=[second.copy()])
    assert read_image(data).getpixel((3, 3)) == (254, 0, 0)
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "HEIF", "AVIF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(first.copy(), kind, save_all=True, append_images=[second.copy()], **options)
        np.testing.assert_allclose(read_image(data).getpixel((3, 3)), (255, 0, 0), atol=4)


SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
REFUSED: dict[str, tuple[bytes, str, str]] = {
    "svg": (SVG, "unsupported", "an SVG drawing, which has no pixels of its own; convert it first"),
    "svg with a prolog": (
        b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- by <hand> -->\n"
        b"<!DOCTYPE svg PUBLIC '-//W3C' 'x.dtd' [<!ENTITY a 'b'>]>\n" + SVG, "unsupported", "an SVG drawing"),
    "svg in a namespace": (b"<svg:svg xmlns:svg='http://www.w3.org/2000/svg'/>", "unsupported", "an SVG drawing"),
    "svg in utf-16": (SVG.decode().encode("utf-16"), "unsupported", "an SVG drawing"),
    "svgz": (gzip.compress(b"<?xml version='1.0'?>" + SVG), "unsupported", "an SVG drawing"),
    "gzip": (gzip.compress(bytes(99)), "not-an-image", "a gzip archive"),
    "gzip bomb": (gzip.compress(bytes(10**7)), "not-an-image", "a gzip archive"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\n", "unsupported", "a PDF document"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported", "a PostScript drawing"),
    "mp4": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(40), "not-an-image", "a video"),
    "mov": (b"\0\0\0\x14ftypqt  \0\0\2\0qt  " + bytes(40), "not-an-image", "a video"),
    "webm": (b"\x1a\x45\xdf\xa3" + bytes(40), "not-an-image", "a video"),
    "avi": (b"RIFF\x24\0\0\0AVI LIST" + bytes(40), "not-an-image", "a video"),
    "cr3": (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "unsupported", "a camera's raw file"),
    "cr2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), "unsupported", "a camera's raw file"),
    "raf": (b"FUJIFILMCCD-RAW 0201" + bytes(40), "unsupported", "a camera's raw file"),
    "html": (b"\n<!DOCTYPE html>\n<html><title>404 Not Found</title></html>", "not-an-image", "a web page"),
    "html in capitals": (b"<HTML><BODY>Forbidden", "not-an-image", "a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "not-an-image", "an XML document"),
    "json": (b'{"error": "rate limit exceeded"}', "not-an-image", "a text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "not-an-image", "git lfs pull"),
    "zip": (b"PK\x03\x04" + bytes(40), "not-an-image", "a ZIP archive"),
    "zeros": (bytes(5000), "not-an-image", "zero bytes only"),
    "noise": (np.random.default_rng(1).bytes(5000), "not-an-image", "not an image, or of a format"),
    "exr": (b"\x76\x2f\x31\x01" + bytes(40), "unsupported", "an OpenEXR image"),
    "fits": (b"SIMPLE  =                    T", "unsupported", "a FITS file"),
    "dicom": (bytes(128) + b"DICM" + bytes(40), "unsupported", "a DICOM file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_told_by_its_content(name: str) -> None:
    data, kind, words = REFUSED[name]
    error = refused(data)
    assert error.kind == kind and words in error.reason
    for way in DECODERS.values():
        with pytest.raises(ImageError) as caught:
            read_crop(data, Preprocessing(decoder=way, icc=True, truncated="pad"), id="it")
        assert (caught.value.kind, caught.value.reason) == (error.kind, error.reason)


def test_a_raw_file_is_never_taken_for_its_preview() -> None:
    preview = Image.new("RGB", (16, 12), "red")
    assert read_image(encoded(preview, "TIFF")).size == (16, 12)
    assert "raw file" in refused(encoded(preview, "TIFF", tiffinfo={50706: b"\1\4\0\0"})).reason
    from PIL import TiffImagePlugin

    nef = TiffImagePlugin.ImageFileDirectory_v2()
    nef[254], nef[330] = 1, 8
    assert refused(encoded(preview, "TIFF", tiffinfo=nef)).kind == "unsupported"


@pytest.mark.parametrize(("kind", "package"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_without_its_plugin_a_format_is_unsupported_and_the_extra_is_named(kind: str, package: str) -> None:
    code = f"""if True:
        import sys
        sys.modules[{package!r}] = None  # As where it is not installed.
        from embedkit import ImageError
        from embedkit.images import read_image
        try:
            read_image(sys.stdin.buffer.read(), id="it")
        except ImageError as error:
            print(error.kind, error)"""
    data = encoded(Image.fromarray(CORNERS), kind)
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout.startswith(b"unsupported it: ") and b"pip install 'embedkit[formats]'" in done.stdout


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", b"x\x9c\x03\0\0\0\0\1") + chunk(b"IEND", b"")
    )


def patched(kind: str, old: bytes, new: bytes, **options: Any) -> bytes:
    data = encoded(Image.new("RGB", (300, 200)), kind, **options)
    assert old in data
    return data.replace(old, new)


_HEIGHT = b"\x01\x01\x04\0\1\0\0\0\xc8\0\0\0"


def tiled(side: int) -> bytes:
    """Return a TIFF of one tile, many times as large as the image."""
    data = bytearray(encoded(Image.new("L", (300, 200)), "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0]
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        tag = struct.unpack_from("<H", data, at)[0]
        if tag in (277, 278):
            struct.pack_into("<HHII", data, at, tag + 45, 4, 1, side)
        elif tag in (273, 279):
            struct.pack_into("<H", data, at, {273: 324, 279: 325}[tag])
    return bytes(data)


def bombs() -> dict[str, bytes]:
    inner = png(30_000, 30_000)
    icon = b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0" + struct.pack("<II", len(inner), 22)
    dib = struct.pack("<IiiHHI", 40, 30_000, 60_000, 1, 32, 0) + bytes(20)
    wide, large = struct.pack("<H", 300), struct.pack("<H", 40_000)
    big, small = struct.pack(">II", 30_000, 30_000), struct.pack(">II", 300, 200)
    return {
        "png": inner,
        "jpeg": patched("JPEG", struct.pack(">HH", 200, 300), struct.pack(">HH", 60_000, 60_000)),
        "gif": patched("GIF", wide + struct.pack("<H", 200), large + large),
        "bmp": patched("BMP", struct.pack("<ii", 300, 200), struct.pack("<ii", 30_000, 30_000)),
        "tiff": encoded(Image.new("RGB", (300, 200)), "TIFF").replace(_HEIGHT, _HEIGHT[:8] + b"\xff\xff\x0f\0"),
        "tiff tile": tiled(60_000),
        "webp": b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xff\x3e\0" * 2 + bytes(8),
        "icon": icon + inner,
        "icon of a bitmap": icon[:14] + struct.pack("<II", len(dib), 22) + dib,
        "icns": b"icns" + struct.pack(">I", len(inner) + 16) + b"ic07" + struct.pack(">I", len(inner) + 8) + inner,
        "jpeg 2000": patched("JPEG2000", small, big).replace(struct.pack(">II", 200, 300), big),
        "heic": patched("HEIF", b"ispe" + bytes(4) + small, b"ispe" + bytes(4) + big),
        "jpeg xl": b"\xff\x0a" + (3 << 1 | 29_999 << 3 | 1 << 33).to_bytes(8, "little") + bytes(20),
        "qoi": b"qoif" + big + b"\3\0" + b"\xfd" * 99,
        "psd": b"8BPS\0\1" + bytes(6) + b"\0\3" + big + b"\0\x08\0\3" + bytes(20),
        "ppm": b"P6 30000 30000 255\n" + bytes(99),
        "text": png(300, 200, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
    }  # fmt: skip


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_by_its_header_whatever_its_format(name: str) -> None:
    data = bombs()[name]
    for way in DECODERS.values():
        with pytest.raises(ImageError) as caught:
            read_crop(data, Preprocessing(decoder=way, truncated="pad"), id="it")
        # Newer Pillows refuse such a tile themselves, in other words.
        kinds = ("too-large", "damaged") if name == "tiff tile" else ("too-large",)
        assert caught.value.kind in kinds, str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are in /proc on Linux")
def test_bombs_cost_no_memory() -> None:
    code = """if True:
        import pickle, re, sys
        from embedkit import ImageError
        from embedkit.images import read_image
        # What getrusage says is at least the peak of the process that started this one.
        peak = lambda: int(re.search("VmHWM: *(.*) kB", open("/proc/self/status").read().expandtabs(1))[1])
        before = peak()
        for data in pickle.load(sys.stdin.buffer):
            try:
                read_image(data)
            except ImageError:
                pass
        print(peak() - before)"""
    import pickle

    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(list(bombs().values())), capture_output=True)
    assert int(done.stdout) < 150_000, done.stderr  # In KB; a single one of them decoded takes 2 GB.


def test_the_limit_is_the_callers() -> None:
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "HEIF", "JXL", "AVIF"):
        data = encoded(Image.new("RGB", (120, 100)), kind)
        for way in DECODERS.values():
            assert read_crop(data, Preprocessing(decoder=way), max_pixels=12_000).shape == (224, 224, 3)
            with pytest.raises(ImageError, match="120 x 100 pixels are more than the limit of 11,999"):
                read_crop(data, Preprocessing(decoder=way), id="it", max_pixels=11_999)
    assert (
        refused(png(30_000, 30_000), max_pixels=10**9).kind != "too-large"
    )  # Nor does Pillow's own limit stand above.
    with pytest.raises(ImageError, match="more than the limit"):
        read_image(Image.new("RGB", (120, 100)), max_pixels=11_999)


def test_the_size_of_a_jpeg_xl_is_known_before_it_is_decoded() -> None:
    for size in ((33, 17), (8, 8), (256, 248), (300, 200), (1, 1000), (1280, 720), (640, 480), (9000, 3)):
        for options in ({}, {"use_container": True}):
            data = encoded(Image.new("L", size), "JXL", effort=1, **options)
            assert list(sizes_in(data)) == [size]


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "large.jpg").write_bytes(b"")
    os.truncate(tmp_path / "large.jpg", 600_000_000)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "ten.jpg").write_bytes(b"0123456789")
    cases = [
        ("pipe.jpg", "not-an-image", "a pipe"), ("large.jpg", "too-large", "600,000,000 bytes"),
        ("empty.jpg", "empty", "empty"), ("absent.jpg", "missing", "missing"), (".", "not-an-image", "a folder"),
        ("ten.jpg/x.jpg", "missing", "directory"), ("a" * 300, "unreadable", "long"), ("a\0b", "unreadable", "null"),
    ]  # fmt: skip
    for name, kind, words in cases:
        for read in (read_bytes, read_image):
            with pytest.raises(ImageError) as caught:
                read(tmp_path / name)
            assert caught.value.kind == kind and words in caught.value.reason, str(caught.value)
    with pytest.raises(ImageError, match="a device"):
        read_bytes("/dev/zero")
    assert read_bytes(tmp_path / "ten.jpg", limit=10) == b"0123456789"
    with pytest.raises(ImageError, match="10 bytes are more than the limit of 9"):
        read_bytes(tmp_path / "ten.jpg", limit=9)
    if Path("/proc/self/status").exists():  # Says that it is empty, and is not.
        assert read_bytes("/proc/self/status").startswith(b"Name:")
        with pytest.raises(ImageError, match="more than the limit"):
            read_bytes("/proc/self/status", limit=9)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").touch(mode=0)
    with pytest.raises(ImageError) as caught:
        read_bytes(tmp_path / "secret.jpg")
    assert caught.value.kind == "permission"
