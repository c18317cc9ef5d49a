"""The crop that a backbone sees: timm's evaluation geometry, pixel for pixel."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedkit.errors import ImageError
from embedkit.images.decoding import MAX_PIXELS
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

    Raises
    ------
    ImageError
        When an image is so long and thin that its resized form would not fit into memory.

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
        red, green, blue = preprocessing.mean
        fill = (round(255 * red), round(255 * green), round(255 * blue))
    elif scaled[0] == scaled[1]:
        size = _short_side(image, scaled[0])
    else:
        size = _kept_ratio(image, scaled, min)
    if size[0] * size[1] > MAX_PIXELS:
        shape = f"{image.width} x {image.height}"
        raise ImageError("image", f"too long and thin: {shape} pixels would become {size[1]} x {size[0]}")
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), INTERPOLATIONS[preprocessing.interpolation])
    return _centred(np.asarray(image), target, fill)


def _short_side(image: Image.Image, side: int) -> tuple[int, int]:
    height, width = image.height, image.width
    long_side = int(side * max(height, width) / min(height, width))
    return (long_side, side) if width <= height else (side, long_side)


def _kept_ratio(image: Image.Image, scaled: tuple[int, int], pick: Callable[[float, float], float]) -> tuple[int, int]:
    ratio = pick(image.height / scaled[0], image.width / scaled[1])
    # A line of pixels stays one pixel wide; timm would ask for none.
    return max(1, round(image.height / ratio)), max(1, round(image.width / ratio))


def _centred(
    pixels: npt.NDArray[np.uint8], target: tuple[int, int], fill: tuple[int, int, int]
) -> npt.NDArray[np.uint8]:
    """Cut the centre out of pixels, filling where they are smaller than the target."""
    cut = np.empty((*target, 3), dtype=np.uint8)
    cut[...] = fill
    (rows, to_rows), (columns, to_columns) = (
        _centre(have, want) for have, want in zip(pixels.shape, target, strict=False)
    )
    cut[to_rows, to_columns] = pixels[rows, columns]
    return cut


def _centre(have: int, want: int) -> tuple[slice, slice]:
    """Return which of `have` pixels are kept, and where they lie among `want`."""
    if want > have:
        before = (want - have) // 2
        return slice(0, have), slice(before, before + have)
    start = round((have - want) / 2)
    return slice(start, start + want), slice(0, want)
