from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit import ImageError, Preprocessing
from embedkit.images import DECODERS, Region, crop, frame_of, read_image, read_scaled

STANDARD = Preprocessing(decoder=DECODERS["standard"])


def photo(width: int, height: int, orientation: int = 1) -> bytes:
    """Return a JPEG whose red grows to the right and whose green grows downwards, as it lies in the file."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([across, down, np.full_like(across, 100)], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("enough", "shape"), [((75, 100), (75, 100)), ((76, 100), (150, 200)), ((601, 9), (600, 800)), ((1, 1), (75, 100))]
)
def test_a_jpeg_is_decoded_no_larger_than_needed(enough: tuple[int, int], shape: tuple[int, int]) -> None:
    pixels = read_scaled(photo(800, 600), STANDARD, lambda height, width: enough)
    assert pixels.shape == (*shape, 3)
    whole = Image.fromarray(np.asarray(read_image(photo(800, 600)))).resize(shape[::-1], Image.Resampling.BOX)
    assert np.abs(pixels.astype(int) - np.asarray(whole)).mean() < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_enough_is_asked_of_the_upright_image(orientation: int) -> None:
    asked: list[tuple[int, int]] = []

    def enough(height: int, width: int) -> tuple[int, int]:
        asked.append((height, width))
        return height // 2, width // 2

    data = photo(320, 160, orientation)
    pixels = read_scaled(data, STANDARD, enough)
    upright = read_image(data)
    assert asked == [(upright.height, upright.width)]
    assert pixels.shape == (upright.height // 2, upright.width // 2, 3)
    small = np.asarray(upright.resize((upright.width // 2, upright.height // 2), Image.Resampling.BOX))
    assert np.abs(pixels.astype(int) - small).mean() < 1.5


def test_the_exact_decoder_and_other_formats_decode_every_pixel() -> None:
    tiny = (1, 1)
    exact = read_scaled(photo(64, 48), Preprocessing(decoder=DECODERS["exact"]), lambda height, width: tiny)
    assert np.array_equal(exact, np.asarray(read_image(photo(64, 48))))
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, "PNG")
    found = read_scaled(buffer.getvalue(), STANDARD, lambda height, width: tiny)
    assert np.array_equal(found, np.arange(48).reshape(4, 4, 3))


def test_a_region_is_read_as_an_image_of_its_own() -> None:
    asked: list[tuple[int, int]] = []
    region = Region(photo(64, 48), (10, 20, 200, 30))
    pixels = read_scaled(region, STANDARD, lambda height, width: asked.append((height, width)) or (1, 1))
    assert pixels.shape == (10, 54, 3) and asked == [(10, 54)]
    with pytest.raises(ImageError, match=r"a\.jpg: its box"):
        read_scaled(Region(photo(64, 48), (64, 0, 70, 9)), STANDARD, lambda height, width: (1, 1), id="a.jpg")


def test_a_damaged_jpeg_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"a\.jpg"):
        read_scaled(photo(640, 480)[:4000], STANDARD, lambda height, width: (height, width), id="a.jpg")


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (90, 40)])
def test_a_frame_is_where_the_crop_lies(mode: str, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(img_size=(64, 64), crop_mode=mode, crop_pct=0.8, mean=(0.0, 0.0, 0.0))
    image = read_image(photo(*size))
    top, left, bottom, right = frame_of(image.height, image.width, preprocessing)
    found = crop(image, preprocessing).astype(float)
    # Red and green say which place of the image each pixel comes from.
    inside = found[..., 2] > 60
    rows, columns = (np.arange(64) + 0.5) / 64, (np.arange(64) + 0.5) / 64
    wanted_red = np.broadcast_to(255 * (left + (right - left) * columns), (64, 64))
    wanted_green = np.broadcast_to((255 * (top + (bottom - top) * rows))[:, None], (64, 64))
    assert np.abs(found[..., 0] - wanted_red)[inside].mean() < 6
    assert np.abs(found[..., 1] - wanted_green)[inside].mean() < 6
    assert (mode == "border" and image.height != image.width) == (min(top, left) < 0)
