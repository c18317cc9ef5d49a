"""The crop that a backbone sees: timm's evaluation geometry, pixel for pixel."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedkit.errors import ImageError
from embedkit.images import jpeg
from embedkit.images.decoding import BYTES_A_PIXEL, read_bytes, read_image, upright
from embedkit.images.formats import MAX_PIXELS
from embedkit.images.regions import Region
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
# What `Preprocessing.decoder` says, for each way to decode and resize:
DECODERS = {
    "standard": "libjpeg-turbo, torch resize",  # Pillow's pixels; resized ones differ by a level here and there.
    "exact": "pillow",  # Every pixel as Pillow makes it.
    "fast": "libjpeg-turbo scaled, torch resize",  # Large JPEGs are decoded smaller, to no less than twice the size.
    "gpu": "nvJPEG, torch resize",  # JPEGs, where a GPU can; what it cannot is done as by "standard".
}
_FAST_MARGIN = 2

# Takes a JPEG, its height and width, those it should have, and whether its pixels lie on their side; returns them, or
# None where it will not.
Resizer: TypeAlias = "Callable[[bytes, tuple[int, int], tuple[int, int], bool], npt.NDArray[np.uint8] | None]"


def read_crop(
    source: Any,
    preprocessing: Preprocessing,
    *,
    id: str | None = None,
    max_pixels: int = MAX_PIXELS,
    resizer: Resizer | None = None,
) -> npt.NDArray[np.uint8]:
    """Read an image and return what a backbone sees of it.

    Parameters
    ----------
    source : path, bytes, Region, PIL image or array
        As for `read_image`. A region's box may reach beyond the image, and is cut off there.
    preprocessing : Preprocessing
        Its `decoder` says how: see `DECODERS`.
    id : str, optional
        What an error calls the image; by default its path.
    max_pixels : int, default 178956970
        As for `read_image`.
    resizer : callable, optional
        Decodes and resizes JPEGs instead, as they lie in the file, where it can.

    Returns
    -------
    array of shape (h, w, 3)
        uint8, with (h, w) == `preprocessing.img_size`.

    Raises
    ------
    ImageError
        When it cannot be read, its box lies outside of it, or its resized form would not fit into memory, as those of
        long and thin images do not.
    """
    if isinstance(source, str | os.PathLike):
        id = os.fspath(source) if id is None else id
        source = read_bytes(source, id, BYTES_A_PIXEL * max_pixels)
    try:
        found = _jpeg_crop(source, preprocessing, max_pixels, resizer) if isinstance(source, bytes) else None
        if found is not None:
            return found
        whole, box = source if isinstance(source, Region) else (source, None)
        image = read_image(
            whole, id=id, exif=preprocessing.exif, icc=preprocessing.icc, truncated=preprocessing.truncated,
            max_pixels=max_pixels,
        )  # fmt: skip
        return crop(image if box is None else part_of(image, box), preprocessing)
    except ImageError as error:  # The crop knows pixels only, not whose they are.
        raise (error if id is None or error.id == id else ImageError(id, error.reason, error.kind)) from None


def crop(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resize and crop an image as timm's evaluation transform does.

    Parameters
    ----------
    image : PIL image
        In mode RGB, upright.
    preprocessing : Preprocessing
        Its `img_size`, `crop_pct`, `crop_mode`, `interpolation` and `decoder`; `mean` fills the border of crop mode
        "border".

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
    size = _resized(image.height, image.width, preprocessing)
    if (image.height, image.width) == size:
        pixels = np.asarray(image)
    elif _by_torch(preprocessing, (image.height, image.width), size):
        pixels = _torch_resize(np.array(image), size, preprocessing.interpolation)
    else:
        pixels = np.asarray(image.resize((size[1], size[0]), INTERPOLATIONS[preprocessing.interpolation]))
    return _centred(pixels, preprocessing)


def part_of(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Return what lies in a box of left, top, right and bottom, cut off at the image's sides."""
    left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height)
    if left >= right or top >= bottom:
        reason = f"its box {box} lies outside of its {image.width} x {image.height} pixels"
        raise ImageError("image", reason, "unsupported")
    return image.crop((left, top, right, bottom))


def _jpeg_crop(
    data: bytes, preprocessing: Preprocessing, max_pixels: int, resizer: Resizer | None
) -> npt.NDArray[np.uint8] | None:
    """Return the crop of a JPEG; None when Pillow has to judge the file."""
    shape = jpeg.shape_of(data, max_pixels)
    if shape is None or (preprocessing.icc and jpeg.has_profile(data)):
        return None
    orientation = jpeg.orientation(data) if preprocessing.exif else 1
    lying = orientation >= 5  # Height and width change places.
    height, width = shape[::-1] if lying else shape
    size = _resized(height, width, preprocessing)
    small = None if resizer is None else resizer(data, shape, size[::-1] if lying else size, lying)
    if small is not None:
        return _centred(turned(small, orientation), preprocessing)
    if not _by_torch(preprocessing, (height, width), size):
        pixels = jpeg.decode(data)
        return None if pixels is None else crop(upright(Image.fromarray(pixels), orientation), preprocessing)
    stored = size[::-1] if lying else size
    scaled = preprocessing.decoder == DECODERS["fast"]
    pixels = jpeg.decode(data, (_FAST_MARGIN * stored[0], _FAST_MARGIN * stored[1]) if scaled else None)
    if pixels is None:
        return None
    # Turned when it is small. Rows are resized before columns, with a rounding between: of the upright image.
    if lying:
        pixels = _torch_resize(pixels, (stored[0], pixels.shape[1]), preprocessing.interpolation)
    resized = _torch_resize(pixels, stored, preprocessing.interpolation)
    return _centred(turned(resized, orientation), preprocessing)


def turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Return pixels upright that lie as an EXIF orientation says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def frame_of(height: int, width: int, preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """Return where the crop lies in an image.

    Returns
    -------
    tuple of float
        Top, left, bottom and right, as shares of the height and of the width. A crop that reaches beyond the image
        has shares below 0 and above 1.

    Examples
    --------
    >>> from embedkit import Preprocessing
    >>> from embedkit.images import frame_of
    >>> frame_of(100, 200, Preprocessing(img_size=(224, 224), crop_pct=1.0))
    (0.0, 0.25, 1.0, 0.75)
    """
    shares = []
    for have, want in zip(_resized(height, width, preprocessing), preprocessing.img_size, strict=True):
        kept, place = _centre(have, want)
        start = kept.start - place.start
        shares.append((start / have, (start + want) / have))
    (top, bottom), (left, right) = shares
    return top, left, bottom, right


def _by_torch(preprocessing: Preprocessing, before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Return whether torch's resize makes Pillow's pixels, to a level here and there.

    torch resizes each row first and then each column. So does Pillow, except where it finds the other order cheaper:
    for some images that are tall, or that shrink in height more than in width. Those are left to it.
    """
    if preprocessing.decoder == DECODERS["exact"] or preprocessing.interpolation not in ("bilinear", "bicubic"):
        return False
    (height, width), (new_height, new_width) = before, after
    alike = new_width * height <= 1.02 * new_height * width
    return new_height >= height or (alike and height <= 2 * width)


def _torch_resize(pixels: npt.NDArray[np.uint8], size: tuple[int, int], mode: str) -> npt.NDArray[np.uint8]:
    """Resize with an antialiasing filter, in integers as Pillow does, but with the processor's wide registers."""
    import torch  # Here, because listing images needs none of it.

    if pixels.shape[:2] == size:
        return pixels
    planes = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)  # (1, 3, h, w), channels last in memory
    resized = torch.nn.functional.interpolate(planes, size=size, mode=mode, antialias=True)
    return np.asarray(resized[0].permute(1, 2, 0).numpy())


def _resized(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return height and width before the crop; the roundings are timm's and torchvision's, and each moves pixels."""
    target = preprocessing.img_size
    scaled = (math.floor(target[0] / preprocessing.crop_pct), math.floor(target[1] / preprocessing.crop_pct))
    if preprocessing.crop_mode == "squash":
        size = scaled
    elif preprocessing.crop_mode == "border":
        size = _kept_ratio(height, width, scaled, max)
    elif scaled[0] == scaled[1]:
        size = _short_side(height, width, scaled[0])
    else:
        size = _kept_ratio(height, width, scaled, min)
    if size[0] * size[1] > MAX_PIXELS:
        reason = f"too long and thin: {width} x {height} pixels would become {size[1]} x {size[0]}"
        raise ImageError("image", reason, "too-large")
    return size


def _short_side(height: int, width: int, side: int) -> tuple[int, int]:
    long_side = int(side * max(height, width) / min(height, width))
    return (long_side, side) if width <= height else (side, long_side)


def _kept_ratio(
    height: int, width: int, scaled: tuple[int, int], pick: Callable[[float, float], float]
) -> tuple[int, int]:
    ratio = pick(height / scaled[0], width / scaled[1])
    # A line of pixels stays one pixel wide; timm would ask for none.
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _centred(pixels: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Cut the centre out of pixels, filling where they are smaller than the target: with the mean around a border."""
    target = preprocessing.img_size
    (rows, to_rows), (columns, to_columns) = (
        _centre(have, want) for have, want in zip(pixels.shape, target, strict=False)
    )
    found = np.array(pixels[rows, columns])  # In one piece, and without the rest of the image.
    if found.shape[:2] == target:
        return found
    border = preprocessing.mean if preprocessing.crop_mode == "border" else (0, 0, 0)
    cut = np.empty((*target, 3), dtype=np.uint8)
    cut[...] = [round(255 * colour) for colour in border]
    cut[to_rows, to_columns] = found
    return cut


def _centre(have: int, want: int) -> tuple[slice, slice]:
    """Return which of `have` pixels are kept, and where they lie among `want`."""
    if want > have:
        before = (want - have) // 2
        return slice(0, have), slice(before, before + have)
    start = round((have - want) / 2)
    return slice(start, start + want), slice(0, want)
