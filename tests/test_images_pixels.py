from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit import ImageError, Preprocessing
from embedkit.backbones import import_timm
from embedkit.images import CROP_MODES, DECODERS, INTERPOLATIONS, Region, crop, read_crop, read_image

TARGETS = [(224, 224), (96, 96), (160, 224), (31, 17)]
SIZES = [(320, 240), (239, 321), (224, 224), (256, 256), (50, 40), (40, 300), (1, 77), (97, 1)]  # width, height


def timms(image: Image.Image, preprocessing: Preprocessing) -> Any:
    """Return the crop of timm's own evaluation transform, as uint8 (h, w, 3)."""
    timm = import_timm()
    transform = timm.data.create_transform(
        input_size=(3, *preprocessing.img_size),
        is_training=False,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        normalize=False,
    )
    return transform(image).permute(1, 2, 0).numpy()


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_the_crop_is_timms_pixel_for_pixel(crop_mode: str, interpolation: str) -> None:
    compared = 0
    for target in TARGETS:
        for crop_pct in (0.875, 0.9, 1.0):
            preprocessing = Preprocessing(target, crop_pct, crop_mode, interpolation, mean=(0.485, 0.456, 0.406))
            for size in SIZES:
                image = noise(*size)
                try:
                    expected = timms(image, preprocessing)
                except ValueError:
                    continue  # timm itself cannot shrink a line of pixels to less than one.
                np.testing.assert_array_equal(crop(image, preprocessing), expected, err_msg=f"{preprocessing} {size}")
                compared += 1
    assert compared > 60


@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_the_crop_of_real_photographs_is_timms_pixel_for_pixel(flowers: Path, crop_mode: str) -> None:
    for path in sorted(flowers.glob("*/*.jpg"))[::500]:
        image = Image.open(path).convert("RGB")
        for interpolation in INTERPOLATIONS:
            preprocessing = Preprocessing(crop_mode=crop_mode, interpolation=interpolation)
            found = crop(read_image(path), preprocessing)
            np.testing.assert_array_equal(found, timms(image, preprocessing), err_msg=f"{path} {interpolation}")


@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_a_line_of_pixels_still_has_a_crop(crop_mode: str) -> None:
    for size in ((3000, 1), (1, 3000)):
        found = crop(Image.new("RGB", size, (9, 9, 9)), Preprocessing((16, 16), 0.875, crop_mode))
        assert found.shape == (16, 16, 3)
        assert found.dtype == np.uint8


def test_an_image_that_would_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(ImageError, match="too long and thin: 1 x 60000 pixels would become 256 x 15360000"):
        crop(Image.new("RGB", (1, 60000)), Preprocessing())


def test_a_region_is_embedded_as_an_image_of_its_own_in_upright_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = noise(300, 200)
    for kind in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        image.save(buffer, kind, exif=exif)
        upright = read_image(buffer.getvalue())
        assert upright.size == (200, 300)
        for name in DECODERS:
            preprocessing = Preprocessing((32, 32), decoder=DECODERS[name])
            for box, inside in (((10, 20, 90, 280), (10, 20, 90, 280)), ((-50, 250, 70, 999), (0, 250, 70, 300))):
                found = read_crop(Region(buffer.getvalue(), box), preprocessing)
                np.testing.assert_array_equal(found, crop(upright.crop(inside), preprocessing))
            with pytest.raises(ImageError, match=r"^x: its box \(200, 0, 210, 9\) lies outside of its 200 x 300"):
                read_crop(Region(buffer.getvalue(), (200, 0, 210, 9)), preprocessing, id="x")
