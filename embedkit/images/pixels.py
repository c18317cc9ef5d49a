"""The crop that a backbone sees: timm's evaluation geometry, pixel for pixel."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedkit.spec import Preprocessing

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
CROP_MODES = ("center", "squash", "border")


def crop(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resize and crop an image as timm's evaluation transform does.

    Parameters
    ----------
    image : PIL image
        In mode RGB.
    preprocessing : Preprocessing
        Its `img_size`, `crop_pct`, `crop_mode` and `interpolation`; `mean` fills the border of crop mode "border".

    Returns
    -------
    array of shape (h, w, 3)
        uint8, with (h, w) == `preprocessing.img_size`.

    Examples
    --------
    >>> from PIL import Image
    >>> from embedkit import Preprocessing
    >>> from embedkit.images import crop
    >>> crop(Image.new("RGB", (640, 480)), Preprocessing(img_size=(224, 224))).shape
    (224, 224, 3)
    """
    # The roundings below are timm's and torchvision's; each of them moves pixels.
    target = preprocessing.img_size
    scaled = (math.floor(target[0] / preprocessing.crop_pct), math.floor(target[1] / preprocessing.crop_pct))
    fill = (0, 0, 0)
    if preprocessing.crop_mode == "squash":
        size = scaled
    elif preprocessing.crop_mode == "border":
        size = _kept_ratio(image, scaled, max)
        fill = tuple(round(255 * value) for value in preprocessing.mean)  # type: ignore[assignment]
    elif scaled[0] == scaled[1]:
        size = _short_side(image, scaled[0])
    else:
        size = _kept_ratio(image, scaled, min)
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), INTERPOLATIONS[preprocessing.interpolation])
    return _centred(np.asarray(image), target, fill, border=preprocessing.crop_mode == "border")


def _short_side(image: Image.Image, side: int) -> tuple[int, int]:
    height, width = image.height, image.width
    long_side = int(side * max(height, width) / min(height, width))
    return (long_side, side) if width <= height else (side, long_side)


def _kept_ratio(image: Image.Image, scaled: tuple[int, int], pick: type[max] | type[min]) -> tuple[int, int]:  # type: ignore[valid-type]
    ratio = pick(image.height / scaled[0], image.width / scaled[1])  # type: ignore[call-arg]
    return round(image.height / ratio), round(image.width / ratio)


def _centred(
    pixels: npt.NDArray[np.uint8], target: tuple[int, int], fill: tuple[int, ...], *, border: bool
) -> npt.NDArray[np.uint8]:
    """Cut the centre out of pixels, filling where they are smaller than the target."""
    crop = np.empty((*target, 3), dtype=np.uint8)
    crop[...] = fill
    inner: list[tuple[slice, slice]] = []
    for have, want in zip(pixels.shape[:2], target, strict=True):
        start = _start(have, want, border)
        length = min(have, want)
        inner.append((slice(max(start, 0), max(start, 0) + length), slice(max(-start, 0), max(-start, 0) + length)))
    (rows, to_rows), (columns, to_columns) = inner
    crop[to_rows, to_columns] = pixels[rows, columns]
    return crop


def _start(have: int, want: int, border: bool) -> int:
    if want > have and not border:
        return -((want - have) // 2)
    return round((have - want) / 2)
