"""Images decoded at the scale that is needed of them, for those who cut crops of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.images import jpeg
from embedkit.images.decoding import read_image
from embedkit.images.formats import MAX_PIXELS
from embedkit.images.pixels import DECODERS, part_of, turned
from embedkit.images.regions import Region
from embedkit.spec import Preprocessing

Pixels = npt.NDArray[np.uint8]


def read_scaled(
    source: Any,
    preprocessing: Preprocessing,
    enough: Callable[[int, int], tuple[int, int]],
    *,
    id: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Read an image upright, and decode no more of a JPEG than is needed.

    Parameters
    ----------
    source : path, bytes, Region, PIL image or array
        As for `read_crop`.
    preprocessing : Preprocessing
        Its `exif`, `icc`, `truncated` and `decoder`; the exact decoder decodes every pixel.
    enough : callable
        Takes height and width of the upright image, and returns those that are enough of it. Called before the image
        is decoded, and once more where another decoder has to take over.
    id : str, optional
        What an error calls the image; by default its path.
    max_pixels : int, default 178956970
        As for `read_image`.

    Returns
    -------
    array of shape (h, w, 3)
        uint8. The whole image, or a region's part of it: a JPEG at 1/8, 1/4, 1/2 or all of its size, the smallest that
        is enough, and all else at its own size.

    Raises
    ------
    ImageError
        When it cannot be read.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit import Preprocessing
    >>> from embedkit.images import read_scaled
    >>> read_scaled(np.zeros((48, 64), dtype=np.uint8), Preprocessing(), lambda height, width: (24, 32)).shape
    (48, 64, 3)
    """
    found = _scaled_jpeg(source, preprocessing, enough, max_pixels) if isinstance(source, bytes) else None
    if found is not None:
        return found
    whole, box = source if isinstance(source, Region) else (source, None)
    image = read_image(
        whole, id=id, exif=preprocessing.exif, icc=preprocessing.icc, truncated=preprocessing.truncated,
        max_pixels=max_pixels,
    )  # fmt: skip
    try:
        image = image if box is None else part_of(image, box)
    except ImageError as error:  # The part knows pixels only, not whose they are.
        raise ImageError(id or error.id, error.reason, error.kind) from None
    enough(image.height, image.width)
    return np.asarray(image)


def _scaled_jpeg(
    data: bytes, preprocessing: Preprocessing, enough: Callable[[int, int], tuple[int, int]], max_pixels: int
) -> Pixels | None:
    """Return the pixels of a JPEG; None when Pillow has to judge the file."""
    shape = jpeg.shape_of(data, max_pixels)
    if shape is None or (preprocessing.icc and jpeg.has_profile(data)):
        return None
    orientation = jpeg.orientation(data) if preprocessing.exif else 1
    lying = orientation >= 5  # Height and width change places.
    needed = enough(*(shape[::-1] if lying else shape))
    stored = needed[::-1] if lying else needed
    # More than all pixels cannot be had, and asking for them would be an error.
    stored = (min(stored[0], shape[0]), min(stored[1], shape[1]))
    pixels = jpeg.decode(data, None if preprocessing.decoder == DECODERS["exact"] else stored)
    return None if pixels is None else turned(pixels, orientation)
