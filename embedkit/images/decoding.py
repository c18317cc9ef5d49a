"""From a file's bytes to an upright RGB image."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from embedkit.errors import ImageError

# Registers every plugin once, here, rather than in the first of several decoding threads.
Image.init()
# Without EPS, PDF and WMF, which run other programs, and formats that Pillow only half knows. MPO comes with JPEG.
_WANTED = {"AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"}
FORMATS = tuple(sorted(_WANTED & Image.OPEN.keys()))
# Pillow warns of large images and odd EXIF blocks in the middle of decoding; here an image is read or it is not. A
# filter for the whole process, because warnings.catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

MAX_PIXELS = 178_956_970  # Pillow's own limit: half a gigabyte of RGB is a bomb or a mistake.
_ORIENTATION = 0x0112


def read_bytes(path: str | os.PathLike[str], id: str | None = None) -> bytes:
    """Return the bytes of an image file.

    Raises
    ------
    ImageError
        Naming the image and why it cannot be read: missing, not permitted, empty, a folder.
    """
    name = os.fspath(path) if id is None else id
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = "the file is missing" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise ImageError(name, reason) from error
    if not data:
        raise ImageError(name, "the file is empty")
    return data


def read_image(source: Any, *, id: str | None = None, exif: bool = True) -> Image.Image:
    """Return an image as upright RGB.

    Parameters
    ----------
    source : path, bytes, PIL image or array
        An array has shape (h, w) or (h, w, c) with 1, 3 or 4 channels, and holds uint8, uint16, or floats in [0, 1].
    id : str, optional
        What an error calls the image; by default its path.
    exif : bool, default True
        Whether the EXIF orientation is applied. A TIFF's own orientation always is: Pillow does that while it decodes.

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
        return _from_array(source, id or "array")
    if isinstance(source, Image.Image):
        return _guarded(source, id or getattr(source, "filename", "") or "image", exif)
    name = id if id is not None else ("image" if isinstance(source, bytes) else os.fspath(source))
    data = source if isinstance(source, bytes) else read_bytes(source, name)
    if not data:
        raise ImageError(name, "the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(name, "not an image, or of a format that embedkit does not read") from error
    except Exception as error:
        raise ImageError(name, _reason(error)) from error
    with image:
        return _guarded(image, name, exif)


def thumbnail(image: Image.Image, size: int) -> bytes:
    """Return an image as JPEG bytes, its longest side at most `size` pixels."""
    image = image.copy()
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _guarded(image: Image.Image, name: str, exif: bool) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(name, f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    try:
        image.load()
        return upright(_to_rgb(image), orientation_of(image) if exif else 1)
    except ImageError as error:
        raise ImageError(name, error.reason) from error
    except Exception as error:  # A decoder may raise anything for a damaged file; it costs this image only.
        raise ImageError(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels: {text}"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return f"truncated: {text}"
    return f"cannot be decoded: {text}"


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none."""
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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return any mode as RGB; Pillow's own conversion clips 16 bits, and drops transparency as if it were not."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):
        return _from_array(np.clip(np.asarray(image), 0, 65535).astype(np.uint16), "image")
    if image.mode == "F":
        return _from_float(np.asarray(image))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def _from_float(pixels: npt.NDArray[Any]) -> Image.Image:
    if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        raise ImageError("image", "its floats are neither in [0, 1] nor in [0, 255]")
    scale = 255.0 if pixels.max() <= 1 else 1.0
    return _from_array(np.rint(pixels * scale).astype(np.uint8), "image")


def _from_array(pixels: npt.NDArray[Any], name: str) -> Image.Image:
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1]
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in pixels.shape:
        raise ImageError(name, f"an array of shape {pixels.shape} is no image; expected (h, w) or (h, w, 1, 3 or 4)")
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            raise ImageError(name, "floats must lie in [0, 1]")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    elif pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise ImageError(name, f"an array of {pixels.dtype} is no image; expected uint8, uint16, or floats in [0, 1]")
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels))
    return _to_rgb(image)
