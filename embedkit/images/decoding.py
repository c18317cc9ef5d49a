"""From a file's bytes to an upright RGB image."""

from __future__ import annotations

import io
import os
import stat
from typing import Any

import numpy as np
from PIL import Image

from embedkit.errors import ImageError
from embedkit.images.colours import from_array, note_transparency, to_rgb
from embedkit.images.formats import MAX_PIXELS, check_size, open_image, reason_and_kind
from embedkit.images.truncation import mended

# A file with more bytes than its pixels could have is none that is worth reading.
BYTES_A_PIXEL = 3
MAX_BYTES = BYTES_A_PIXEL * MAX_PIXELS  # What the largest image takes without compression.
TRUNCATED = ("fail", "pad")
_ORIENTATION = 0x0112
_TURNED_BY_THEIR_READER = ("HEIF", "JXL")


def read_bytes(path: str | os.PathLike[str], id: str | None = None, limit: int = MAX_BYTES) -> bytes:
    """Return the bytes of an image file.

    Parameters
    ----------
    path : path-like
        The file. Pipes and devices are refused without waiting for them.
    id : str, optional
        What an error calls the image; by default its path.
    limit : int, default 536870910
        The most bytes that are read.

    Raises
    ------
    ImageError
        Naming the image and why it cannot be read: missing, not permitted, empty, a folder, too large.
    """
    name = os.fspath(path) if id is None else id
    try:
        # Looked at before it is opened, which may wake a device, and after, because it may have become another.
        _check_file(os.stat(path), name, limit)
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(file, "rb", buffering=0) as stream:
            status = os.fstat(file)
            _check_file(status, name, limit)
            data = _read(stream, status.st_size, limit)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(name, "the file is missing", "missing") from error
    except PermissionError as error:
        raise ImageError(name, f"not permitted: {error.strerror}", "permission") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(name, reason, "missing" if isinstance(error, NotADirectoryError) else "unreadable") from error
    if not data:
        raise ImageError(name, "the file is empty", "empty")
    if len(data) > limit:
        raise _too_long(name, len(data), limit)
    return data


def read_image(
    source: Any,
    *,
    id: str | None = None,
    exif: bool = True,
    icc: bool = False,
    truncated: str = "fail",
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Return an image as upright RGB.

    Parameters
    ----------
    source : path, bytes, PIL image or array
        An array has shape (h, w) or (h, w, c) with 1, 3 or 4 channels, and holds uint8, uint16, or floats in [0, 1].
    id : str, optional
        What an error calls the image; by default its path.
    exif : bool, default True
        Whether the EXIF orientation is applied. Those of TIFF, HEIC and JPEG XL always are: their readers do that.
    icc : bool, default False
        Whether an embedded colour profile is applied, which makes sRGB of the pixels.
    truncated : {"fail", "pad"}, default "fail"
        What becomes of a JPEG, PNG, GIF or BMP whose end is missing: an error, or an image whose missing pixels are
        grey (JPEG), black (PNG, BMP) or the first colour of the palette (GIF).
    max_pixels : int, default 178956970
        An image with more is refused by its header, and a file of more than three bytes for each unread.

    Returns
    -------
    PIL image
        In mode RGB. Of an animation the first frame. Transparent pixels lie over white. 16 bits become 8 by
        ``round(value / 257)``.

    Raises
    ------
    ImageError
        When it cannot be decoded to the last row.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.images import read_image
    >>> read_image(np.array([[0, 65535]], dtype=np.uint16)).getpixel((1, 0))
    (255, 255, 255)
    """
    if isinstance(source, np.ndarray):
        return from_array(source, id or "array")
    if isinstance(source, Image.Image):
        name = id or getattr(source, "filename", "") or "image"
        image = _decoded(source, name, exif, icc, max_pixels)
        return image.copy() if image is source else image
    name = id if id is not None else ("image" if isinstance(source, bytes) else os.fspath(source))
    data = source if isinstance(source, bytes) else read_bytes(source, name, BYTES_A_PIXEL * max_pixels)
    if not data:
        raise ImageError(name, "the file is empty", "empty")
    try:
        return _read_data(data, name, exif, icc, max_pixels)
    except ImageError as error:
        whole = mended(data, max_pixels) if truncated == "pad" and error.kind == "truncated" else None
        if whole is None:
            raise
        try:
            return _read_data(whole, name, exif, icc, max_pixels)
        except ImageError:
            raise error from None


def thumbnail(image: Image.Image, size: int) -> bytes:
    """Return an image as JPEG bytes, its longest side at most `size` pixels."""
    image = image.copy()
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation that is still to be applied, 1 where there is none."""
    # A JPEG XL that was a JPEG comes back as that JPEG, lying as it lay.
    if image.format in _TURNED_BY_THEIR_READER and not getattr(image, "jpeg", False):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # A broken EXIF block says nothing about the pixels, and never costs the image.
        return 1


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image turned as its EXIF orientation says."""
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _check_file(status: os.stat_result, name: str, limit: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(name, "a folder, not an image", "not-an-image")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(name, "not a regular file but a pipe, a socket or a device", "not-an-image")
    if status.st_size > limit:
        raise _too_long(name, status.st_size, limit)


def _too_long(name: str, length: int, limit: int) -> ImageError:
    return ImageError(name, f"{length:,} bytes are more than the limit of {limit:,}", "too-large")


def _read(stream: io.FileIO, length: int, limit: int) -> bytes:
    """Read to the end, or one byte past the limit: a file may grow, and some say that they are empty."""
    pieces, left = [], limit + 1
    while left > 0 and (piece := stream.read(min(left, max(length + 1, 1 << 16)))):
        pieces.append(piece)
        left -= len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_data(data: bytes, name: str, exif: bool, icc: bool, max_pixels: int) -> Image.Image:
    with open_image(data, name, max_pixels) as image:
        return _decoded(image, name, exif, icc, max_pixels, data)


def _decoded(image: Image.Image, name: str, exif: bool, icc: bool, max_pixels: int, data: bytes = b"") -> Image.Image:
    check_size(name, image.width, image.height, max_pixels)
    try:
        note_transparency(image)
        image.load()
        check_size(name, image.width, image.height, max_pixels)
        return upright(to_rgb(image, icc=icc), orientation_of(image) if exif else 1)
    except Exception as error:  # A decoder may raise anything for a damaged file; it costs this image only.
        raise ImageError(name, *reason_and_kind(error, data)) from error
