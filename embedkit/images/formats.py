"""Which formats are read, and how a file is opened: its header only, and nothing in it is believed."""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageFile

from embedkit.errors import ImageError
from embedkit.images.headers import JXL_CODESTREAM, JXL_CONTAINER, sizes_in
from embedkit.images.signatures import AVIF_BRANDS, HEIF_BRANDS, brands_of, recognise
from embedkit.images.truncation import is_truncated

# Registers every plugin once, here, rather than in the first of several decoding threads.
Image.init()
# Without EPS, PDF and WMF, which run other programs; without what Pillow only half knows (GRIB, HDF5, MPEG), what has
# no signature (IM, IMT, SPIDER), and FITS, whose numbers have no black and white. MPO comes with JPEG. TGA has
# no signature either, but is common: it comes last, and only for bytes that are nothing else.
_WANTED = (
    "JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "PSD", "PPM", "QOI", "ICO", "ICNS", "CUR", "DDS",
    "PCX", "DCX", "DIB", "SGI", "SUN", "MSP", "FLI", "BLP", "FTEX", "XBM", "XPM", "PIXAR", "PCD", "TGA",
)  # fmt: skip
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
# What begins like these need not be one: their failures say nothing of the file, and those without a signature worth
# the name are tried only for what nothing else explains.
_WEAK = {"TGA", "PCX", "DIB", "CUR", "XBM", "PCD"}
_LAST = {"TGA", "PCX", "DIB", "CUR"}
# Pillow warns of large images and odd EXIF blocks in the middle of decoding; here an image is read or it is not. A
# filter for the whole process, because warnings.catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"(PIL|pillow_heif|pillow_jxl)\b")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # What it logs of damaged files, nobody asked for.

MAX_PIXELS = 178_956_970  # Pillow's own limit: half a gigabyte of RGB is a bomb or a mistake.

_Factory = Callable[[io.BytesIO, str], ImageFile.ImageFile]
# What a reader raises for bytes that are not of its format, or of an odd kind of it; Pillow's own list.
_NOT_MINE = (SyntaxError, IndexError, TypeError, struct.error)
_UNSUPPORTED = re.compile("unsupported|unknown|unimplemented|cannot handle|not supported", re.IGNORECASE)
PAD_ADVICE = "; --truncated pad embeds what is there"
_TRUNCATED = re.compile("truncated|not enough|expected to read|premature", re.IGNORECASE)
_DNG_VERSION, _FILE_TYPE, _INNER_IMAGES, _TILE_WIDTH, _TILE_HEIGHT = 50706, 254, 330, 322, 323


def open_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """Open an image without decoding it.

    Parameters
    ----------
    data : bytes
        Of the file.
    name : str
        What an error calls it.
    max_pixels : int, default MAX_PIXELS
        The most pixels that it may declare.

    Returns
    -------
    PIL image
        Not yet decoded.

    Raises
    ------
    ImageError
        When it is no image, of a kind that is not read, damaged from the beginning, or too large.
    """
    for width, height in sizes_in(data):
        check_size(name, width, height, max_pixels)
    image = _open(data, name)
    check_size(name, image.width, image.height, max_pixels)
    if image.format == "TIFF":
        _check_tiff(image, name, max_pixels)
    return image


def check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    """Raise ImageError for an image with more pixels than the limit."""
    if width * height > max_pixels:
        raise ImageError(name, f"{width} x {height} pixels are more than the limit of {max_pixels:,}", "too-large")


def reason_and_kind(error: Exception, data: bytes = b"") -> tuple[str, str]:
    """Say in one line why a decoder gave up, and what kind of failure that is."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    text = "".join(sign if sign.isprintable() else "?" for sign in text)  # It may quote the file.
    if isinstance(error, ImageError):
        return error.reason, error.kind
    if text.startswith("Generic Error"):  # libjxl's, with advice for those who build it.
        text = "the decoder gives no reason"
    if isinstance(error, Image.DecompressionBombError | MemoryError) or "MAX_TEXT" in text:
        return f"too large: {text}", "too-large"
    if isinstance(error, NotImplementedError) or _UNSUPPORTED.search(text):
        return f"of a kind that is not read: {text}", "unsupported"
    if _TRUNCATED.search(text) or isinstance(error, EOFError) or is_truncated(data):
        return f"its end is missing ({text}){PAD_ADVICE}", "truncated"
    return f"cannot be decoded: {text}", "damaged"


def _open(data: bytes, name: str) -> ImageFile.ImageFile:
    """Open by the first reader that takes it. Pillow's `open` would refuse by a limit of its own."""
    if data[:2] in (b"II", b"MM") and (found := recognise(data)) is not None:
        raise ImageError(name, *found)  # A raw file, which has the form of a TIFF.
    try:
        readers = _readers(data)
    except ImportError:
        raise ImageError(name, _NO_PLUGIN.format(_plugin_format(data)), "unsupported") from None
    failure: tuple[str, Exception] | None = None
    for format, factory, accept in readers:
        try:
            if accept is None or accept(data[:16]) is True:
                if format in _LAST and (failure is not None or recognise(data) is not None):
                    continue
                return factory(io.BytesIO(data), "")
        except _NOT_MINE as error:
            failure = failure if format in _WEAK else (format, error)
        except Exception as error:
            raise ImageError(name, *reason_and_kind(error, data)) from error
    if failure is not None:
        reason, kind = reason_and_kind(failure[1], data)
        raise ImageError(name, f"{reason} ({failure[0]})", kind)
    nothing = ("not an image, or of a format that embedkit does not read", "not-an-image")
    raise ImageError(name, *(recognise(data) or nothing))


def _readers(data: bytes) -> list[tuple[str, _Factory, Any]]:
    """Return the readers to try. Plugins are imported when there is something to read for them."""
    if data.startswith((JXL_CODESTREAM, JXL_CONTAINER)):
        from pillow_jxl.JpegXLImagePlugin import JXLImageFile

        return [("JPEG XL", JXLImageFile, None)]
    brands = brands_of(data)
    if brands & AVIF_BRANDS and "AVIF" in Image.OPEN:
        return [("AVIF", Image.OPEN["AVIF"][0], None)]
    if brands & HEIF_BRANDS:
        from pillow_heif import HeifImageFile

        return [("HEIC", HeifImageFile, None)]
    return [(name, *Image.OPEN[name]) for name in FORMATS]


_NO_PLUGIN = "a {} image, which needs a plugin: pip install 'embedkit[formats]'"


def _plugin_format(data: bytes) -> str:
    return "HEIC" if data[4:8] == b"ftyp" else "JPEG XL"


def _check_tiff(image: Any, name: str, max_pixels: int) -> None:
    """Refuse the preview of a raw file, and tiles larger than any image."""
    tags = image.tag_v2
    reduced = tags.get(_FILE_TYPE, 0)
    if _DNG_VERSION in tags or (isinstance(reduced, int) and reduced & 1 and _INNER_IMAGES in tags):
        raise ImageError(
            name, "a camera's raw file, of which only a preview could be read; develop it first", "unsupported"
        )
    width, height = tags.get(_TILE_WIDTH, 1), tags.get(_TILE_HEIGHT, 1)
    if isinstance(width, int | float) and isinstance(height, int | float):
        # The last tiles of a small image may be larger than the image, but not by much.
        check_size(name, int(width), int(height), max_pixels)
