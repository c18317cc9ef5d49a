"""Files whose end is missing fail as such, or are padded on demand."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit import ImageError, Preprocessing
from embedkit.images import DECODERS, crop, read_crop, read_image
from embedkit.images.truncation import is_truncated, mended

pytest.importorskip("pillow_heif").register_heif_opener()

ROWS, COLUMNS = np.mgrid[0:96, 0:120]
PIXELS = np.stack([ROWS * 2, COLUMNS * 2, (ROWS * COLUMNS) % 251], axis=-1).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {}), "progressive": ("JPEG", {"progressive": True}), "png": ("PNG", {}),
    "gif": ("GIF", {"interlace": 0}),
    "webp": ("WEBP", {}), "lossless webp": ("WEBP", {"lossless": True}), "tiff": ("TIFF", {}), "bmp": ("BMP", {}),
    "deflated tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}), "avif": ("AVIF", {}), "heic": ("HEIF", {}),
    "jpeg 2000": ("JPEG2000", {}), "ppm": ("PPM", {}), "qoi": ("QOI", {}),
}  # fmt: skip


def encoded(kind: str, image: Image.Image = PICTURE, **more: Any) -> bytes:
    format, options = KINDS[kind]
    buffer = io.BytesIO()
    image.save(buffer, format, **(options | more))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_of_any_format_says_so(kind: str) -> None:
    data = encoded(kind)
    assert read_image(data).size == (120, 96)
    for share in (0.3, 0.6, 0.9):
        for decoder in DECODERS.values():
            with pytest.raises(ImageError, match="truncated") as caught:
                read_crop(data[: int(share * len(data))], Preprocessing(decoder=decoder), id="cut")
            assert (caught.value.id, caught.value.kind) == ("cut", "truncated")


@pytest.mark.parametrize("decoder", DECODERS.values())
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_of_a_whole_file(kind: str, decoder: str) -> None:
    data = encoded(kind)
    plain, padding = (Preprocessing(decoder=decoder, truncated=truncated) for truncated in ("fail", "pad"))
    np.testing.assert_array_equal(read_crop(data, plain), read_crop(data, padding))


@pytest.mark.parametrize("kind", ["png", "gif", "bmp"])
def test_the_rows_that_are_there_are_kept_and_the_rest_is_filled(kind: str) -> None:
    data = encoded(kind)
    whole = np.asarray(read_image(data))
    found = np.asarray(read_image(data[: int(0.6 * len(data))], truncated="pad"))
    kept, lost = (slice(50, None), slice(0, 30)) if kind == "bmp" else (slice(0, 30), slice(-1, None))
    np.testing.assert_array_equal(found[kept], whole[kept])
    fill = found[lost]
    assert (fill == fill[0, 0]).all() and (kind == "gif" or (fill == 0).all())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pngs_of_every_mode_are_padded(mode: str) -> None:
    image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257) if mode == "I;16" else PICTURE.convert(mode)
    data = encoded("png", image)
    found = np.asarray(read_image(data[: int(0.8 * len(data))], truncated="pad"))
    np.testing.assert_array_equal(found[:20], np.asarray(read_image(data))[:20])


def test_a_gif_with_interlace_and_a_palette_of_its_own_is_padded() -> None:
    still = encoded("gif", PICTURE.convert("P"), interlace=1)
    moving = encoded("gif", save_all=True, append_images=[PICTURE.rotate(180)], comment=b"x" * 600)
    for data in (still, moving):
        first = len(still) if data is still else len(data) // 2
        found = read_image(data[: int(0.7 * first)], truncated="pad")
        np.testing.assert_array_equal(np.asarray(found)[0], np.asarray(read_image(data))[0])


@pytest.mark.parametrize("kind", ["jpeg", "progressive"])
def test_a_jpeg_of_which_only_a_few_rows_or_only_the_header_is_there_is_embedded(kind: str) -> None:
    data = encoded(kind, PICTURE.resize((480, 384)))
    whole = np.asarray(read_image(data)).astype(int)
    nearly = np.asarray(read_image(data[:-40], truncated="pad")).astype(int)
    rows = slice(0, 300) if kind == "jpeg" else slice(None)
    assert np.abs(nearly[rows] - whole[rows]).mean() < 3
    header = data[: data.index(b"\xff\xda") + 14]
    # libjpeg takes the codes of its first block from nothing; all others are grey.
    assert (np.asarray(read_image(header, truncated="pad")) == 128).mean() > 0.99
    with pytest.raises(ImageError, match="truncated"):
        read_image(data[:150], truncated="pad")
    for decoder in DECODERS.values():
        preprocessing = Preprocessing(decoder=decoder, truncated="pad")
        expected = crop(read_image(data[:-40], truncated="pad"), preprocessing)
        np.testing.assert_array_equal(read_crop(data[:-40], preprocessing), expected)


def test_padding_is_pillows_own_where_pillow_does_it() -> None:
    from PIL import ImageFile

    data = encoded("jpeg")[:-300]
    found = read_image(data, truncated="pad")
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # For this test; embedkit never touches it.
    try:
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_what_no_end_can_mend_fails_as_before() -> None:
    for kind in ("webp", "heic", "deflated tiff"):
        data = encoded(kind)
        with pytest.raises(ImageError, match="truncated"):
            read_image(data[: len(data) // 2], truncated="pad")
    for scrap in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0"):
        assert mended(scrap, 10_000) is None
        assert is_truncated(scrap) == (scrap != b"")


def test_a_header_that_promises_the_earth_is_not_mended() -> None:
    for kind, at, big in (("png", 16, b"\x7f\xff\xff\xff"), ("bmp", 18, b"\xff\xff\xff\x0f"), ("gif", 0, b"")):
        data = bytearray(encoded(kind)[:3000])
        data[at : at + len(big)] = big
        if kind == "gif":
            assert data[781:782] == b","  # The frame begins after the palette.
            data[786:790] = b"\xff\xff\xff\xff"
        assert mended(bytes(data), 178_956_970) is None
        with pytest.raises(ImageError):
            read_image(bytes(data), truncated="pad")
