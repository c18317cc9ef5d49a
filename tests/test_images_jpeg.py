"""JPEGs take a faster way to the same pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from embedkit import ImageError, Preprocessing
from embedkit.images import CROP_MODES, DECODERS, crop, jpeg, read_crop, read_image

EXACT, STANDARD, FAST = (Preprocessing(decoder=DECODERS[name]) for name in ("exact", "standard", "fast"))


def photograph(width: int, height: int) -> Image.Image:
    """Return noise without its highest frequencies, as cameras make it."""
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, *, orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif.tobytes() if orientation != 1 else b"", **options)
    return buffer.getvalue()


def by_pillow(data: bytes, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    return crop(read_image(data, exif=preprocessing.exif), preprocessing)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_kind_of_jpeg_decodes_to_pillows_pixels(subsampling: str, progressive: bool) -> None:
    for image in (photograph(333, 251), photograph(64, 400).convert("L")):
        data = encoded(image, subsampling=subsampling, progressive=progressive)
        assert jpeg.shape_of(data) == (image.height, image.width)
        np.testing.assert_array_equal(jpeg.decode(data), np.asarray(read_image(data)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_exact_is_pillows_crop_and_standard_within_rounding(orientation: int, crop_mode: str) -> None:
    data = encoded(photograph(501, 300), orientation=orientation, quality=90)
    for exif in (True, False):
        exact = Preprocessing((96, 64), 0.9, crop_mode, exif=exif, decoder=DECODERS["exact"])
        reference = by_pillow(data, exact)
        np.testing.assert_array_equal(read_crop(data, exact), reference)
        standard = Preprocessing((96, 64), 0.9, crop_mode, exif=exif, decoder=DECODERS["standard"])
        found = read_crop(data, standard).astype(int)
        assert found.shape == (96, 64, 3) and np.abs(found - reference).max() <= 2
        assert np.abs(found - reference).mean() < 0.02


def test_the_orientation_is_found_wherever_pillow_finds_it() -> None:
    plain = encoded(photograph(64, 64))
    assert jpeg.orientation(plain) == 1
    turned = encoded(photograph(64, 64), orientation=6)
    assert jpeg.orientation(turned) == 6
    comment = b"\xff\xfe\x00\x08Exif\0\0"
    assert (
        jpeg.orientation(plain[:2] + comment + plain[2:]) == 1
        and jpeg.orientation(turned[:2] + comment + turned[2:]) == 6
    )
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="8"/>'
    segment = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp
    assert jpeg.orientation(plain[:2] + segment + plain[2:]) == 8
    assert [jpeg.orientation(data) for data in (b"", b"\xff\xd8", plain[:3], plain[:30])] == [1, 1, 1, 1]


def test_real_photographs_differ_by_a_level_here_and_there(flowers: Path) -> None:
    differing = []
    for path in sorted(flowers.glob("*/*.jpg"))[::200]:
        np.testing.assert_array_equal(read_crop(path, EXACT), by_pillow(path.read_bytes(), EXACT))
        difference = np.abs(read_crop(path, STANDARD).astype(int) - read_crop(path, EXACT))
        assert difference.max() <= 2
        differing.append((difference > 0).mean())
    assert 0 < np.mean(differing) < 0.02


def test_fast_decodes_a_large_photograph_at_a_fraction_of_its_size() -> None:
    data = encoded(photograph(4000, 3000), quality=90)
    whole, scaled = jpeg.decode(data), jpeg.decode(data, (512, 512))
    assert whole is not None and whole.shape == (3000, 4000, 3)
    assert scaled is not None and scaled.shape == (750, 1000, 3)
    assert np.abs(read_crop(data, FAST).astype(int) - read_crop(data, EXACT)).mean() < 3
    small = encoded(photograph(400, 300))
    np.testing.assert_array_equal(read_crop(small, FAST), read_crop(small, STANDARD))


def test_what_only_pillow_understands_goes_to_pillow(tmp_path: Path) -> None:
    cmyk = encoded(photograph(300, 300).convert("CMYK"))
    assert jpeg.shape_of(cmyk) is None
    np.testing.assert_array_equal(read_crop(cmyk, EXACT), by_pillow(cmyk, EXACT))
    image = photograph(300, 200)
    image.save(tmp_path / "a.png")
    difference = np.abs(read_crop(tmp_path / "a.png", STANDARD).astype(int) - crop(image, EXACT))
    assert difference.max() <= 2
    for interpolation in ("lanczos", "nearest", "box"):
        options = {"interpolation": interpolation}
        data = encoded(image)
        standard = Preprocessing(decoder=DECODERS["standard"], **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(read_crop(data, standard), by_pillow(data, Preprocessing(**options)))  # type: ignore[arg-type]


def test_broken_jpegs_are_named_with_their_reason(tmp_path: Path) -> None:
    data = encoded(photograph(300, 300))
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    for preprocessing in (EXACT, STANDARD, FAST):
        with pytest.raises(ImageError, match=r"cut\.jpg: its end is missing"):
            read_crop(tmp_path / "cut.jpg", preprocessing)
        with pytest.raises(ImageError, match="holiday: not an image but a text"):
            read_crop(b"\xff\xd8 no", preprocessing, id="holiday")
        with pytest.raises(ImageError, match="thin: too long and thin: 1 x 60000 pixels"):
            read_crop(encoded(Image.new("RGB", (1, 60000))), preprocessing, id="thin")


@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_standard_stays_within_rounding_whatever_the_shape(crop_mode: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        width = int(random.integers(20, 400))
        height = max(8, int(width * np.exp(random.uniform(-1.5, 1.5))))
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        options = {"crop_pct": float(random.choice([0.875, 1.0])), "crop_mode": crop_mode}
        options["interpolation"] = str(random.choice(["bilinear", "bicubic"]))
        standard = Preprocessing((96, 96), decoder=DECODERS["standard"], **options)  # type: ignore[arg-type]
        difference = np.abs(crop(image, standard).astype(int) - crop(image, Preprocessing((96, 96), **options)))  # type: ignore[arg-type]
        assert difference.max() <= 3 and (difference > 0).mean() < 0.03, (height, width, options)
