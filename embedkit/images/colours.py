"""From whatever a file holds to RGB: palettes, inks, transparency, bit depths, colour profiles."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from embedkit.errors import ImageError

# What a PNG says of its transparent colour is in the units of the file; its pixels were scaled when they were decoded.
_SAMPLE_STEPS = {"L;2": 85, "L;4": 17}
_PHOTOMETRIC = 262
_OVERSHOOT = 0.05  # Lossy compression of floats in [0, 1] leaves some of them a little outside.


def note_transparency(image: Image.Image) -> None:
    """Bring the transparent colour of an image that is not yet decoded to the scale that its pixels will have."""
    colour = image.info.get("transparency")
    raw = _raw_mode(image)
    if raw in _SAMPLE_STEPS and isinstance(colour, int):
        image.info["transparency"] = colour * _SAMPLE_STEPS[raw] & 0xFF
    elif raw == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def to_rgb(image: Image.Image, *, icc: bool = False) -> Image.Image:
    """Return a decoded image of any mode in RGB, transparent pixels over white.

    Pillow's own conversion clips 16 bits, and drops transparency as if it were not.

    Parameters
    ----------
    image : PIL image
        Decoded.
    icc : bool, default False
        Whether an embedded colour profile is applied, by lcms, to sRGB. Profiles that are broken, or of another colour
        model than the pixels, are left aside; so are those of images with more than 8 bits of grey.

    Raises
    ------
    ImageError
        When its numbers have no black and white that is known.
    """
    if image.mode.startswith("I"):
        return _over_white(_from_integers(_upward(image)), _transparent(image))
    if image.mode == "F":
        return _from_float(np.asarray(image))
    profile = image.info.get("icc_profile") if icc else None
    if not image.has_transparency_data:
        if image.mode == "P":
            image = image.convert("RGB")
        found = in_srgb(image, profile) if profile else None
        return found or (image if image.mode == "RGB" else image.convert("RGB"))
    layer = _with_alpha(image)
    if profile:
        found = in_srgb(layer.convert("L" if image.mode in ("L", "LA", "La") else "RGB"), profile)
        if found is not None:
            found.putalpha(layer.getchannel("A"))
            layer = found
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")


def in_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Return an image in sRGB by its colour profile; None when the profile does not fit, or is none."""
    try:
        found = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.PERCEPTUAL, outputMode="RGB",
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # The pixels are good without it.
        return None
    return found


def from_array(pixels: npt.NDArray[Any], name: str) -> Image.Image:
    """Return an array of shape (h, w) or (h, w, c) in RGB.

    Raises
    ------
    ImageError
        When it is not of such a shape, or of another type than uint8, uint16, or floats in [0, 1].
    """
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1]
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in pixels.shape:
        reason = f"an array of shape {pixels.shape} is no image; expected (h, w) or (h, w, 1, 3 or 4)"
        raise ImageError(name, reason, "unsupported")
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            raise ImageError(name, "an array of floats must lie in [0, 1]", "unsupported")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    elif pixels.dtype == np.uint16:
        pixels = _in_eight_bits(pixels)
    elif pixels.dtype != np.uint8:
        reason = f"an array of {pixels.dtype} is no image; expected uint8, uint16, or floats in [0, 1]"
        raise ImageError(name, reason, "unsupported")
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels))
    return to_rgb(image)


def _raw_mode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _upward(image: Image.Image) -> npt.NDArray[Any]:
    """Return integers of which zero is black. Of 16 bits, Pillow forgets that a TIFF may say otherwise."""
    pixels = np.asarray(image)
    inverted = image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    return 65535 - pixels if inverted else pixels


def _transparent(image: Image.Image) -> npt.NDArray[np.bool_] | None:
    colour = image.info.get("transparency")
    return np.asarray(image) == colour if isinstance(colour, int) else None


def _over_white(image: Image.Image, transparent: npt.NDArray[np.bool_] | None) -> Image.Image:
    if transparent is not None:
        image.paste("white", mask=Image.fromarray(transparent))
    return image


def _with_alpha(image: Image.Image) -> Image.Image:
    """Return an image with transparency in RGBA."""
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "PA":  # The palette's own transparency, where it has one, is another.
        alpha, image = image.getchannel("A"), image.convert("RGB")
        image.putalpha(alpha)
    return image.convert("RGBA")


def _in_eight_bits(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    wide = pixels.astype(np.uint32)
    wide += 128
    wide //= 257
    return wide.astype(np.uint8)


def _from_integers(pixels: npt.NDArray[Any]) -> Image.Image:
    if pixels.min() < 0 or pixels.max() > 65535:
        reason = f"its integers lie between {pixels.min()} and {pixels.max()}, not in 0 to 65535; scale them first"
        raise ImageError("image", reason, "unsupported")
    return Image.fromarray(_in_eight_bits(pixels)).convert("RGB")


def _from_float(pixels: npt.NDArray[Any]) -> Image.Image:
    pixels = np.array(pixels)
    low, high = float(pixels.min()), float(pixels.max())  # NaN where there is one.
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        np.clip(pixels, 0, 1, out=pixels)
        pixels *= 255
    elif not (low >= 0 and high <= 255):
        raise ImageError("image", "its floats are neither in [0, 1] nor in [0, 255]; scale them first", "unsupported")
    return Image.fromarray(np.rint(pixels, out=pixels).astype(np.uint8)).convert("RGB")
