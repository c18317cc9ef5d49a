"""Region: a part of an image."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt


class Region(NamedTuple):
    """A part of an image, to be embedded as if it was one of its own.

    Attributes
    ----------
    data : bytes
        The whole image's file.
    box : tuple of int
        Left, top, right and bottom in pixels of the upright image; right and bottom are the first outside.
    """

    data: bytes
    box: tuple[int, int, int, int]


# What an image is decoded from: a file's bytes, a part of one, or pixels.
Data: TypeAlias = "bytes | Region | npt.NDArray[np.uint8]"
