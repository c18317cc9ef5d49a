"""What the header of an image says, without decoding its pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedkit.images import jpeg
from embedkit.images.decoding import orientation_of
from embedkit.images.formats import open_image
from embedkit.images.regions import Data, Region


@dataclass(frozen=True)
class Header:
    """What an image says of itself.

    Attributes
    ----------
    format : str
        Pillow's name of the file format; "pixels" when there is no file.
    width, height : int
        In pixels, as they lie in the file.
    """

    format: str
    width: int
    height: int


def read_header(data: Data) -> Header | None:
    """Return what an image says of itself, or None when it is none that can be opened.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.images import read_header
    >>> read_header(np.zeros((480, 640, 3), dtype=np.uint8))
    Header(format='pixels', width=640, height=480)
    """
    if isinstance(data, np.ndarray):
        return Header("pixels", data.shape[1], data.shape[0])
    try:
        with open_image(data.data if isinstance(data, Region) else data, "image") as image:
            return Header(image.format or "unknown", image.width, image.height)
    except Exception:  # Whoever decodes the image finds out why, and says so.
        return None


def upright_size(data: Data) -> tuple[int, int] | None:
    """Return width and height of an image once it lies upright, or None when it is none that can be opened.

    Of a region they are those of its box.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.images import upright_size
    >>> upright_size(np.zeros((480, 640, 3), dtype=np.uint8))
    (640, 480)
    """
    if isinstance(data, Region):
        left, top, right, bottom = data.box
        return right - left, bottom - top
    if isinstance(data, np.ndarray):
        return data.shape[1], data.shape[0]
    shape = jpeg.shape_of(data)
    if shape is not None:
        width, height, lying = shape[1], shape[0], jpeg.orientation(data) >= 5
    else:
        try:
            with open_image(data, "image") as image:
                width, height, lying = image.width, image.height, orientation_of(image) >= 5
        except Exception:  # Whoever decodes the image finds out why, and says so.
            return None
    return (height, width) if lying else (width, height)
