"""What the items of lists and datasets say: an image, and perhaps an id and a label."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.images import Data, read_bytes, read_image
from embedkit.sources.entries import leaves_root
from embedkit.sources.failing import find_flaw, quoted
from embedkit.text import printable

_DIGITS = 8  # Of the ids that are numbers, so that a hundred million of them are sorted like numbers.
_CHANNELS = (1, 3, 4)
_MOST_CLASSES = 2**64  # Larger numbers are no class's, and Python does not write the largest out.


class Item(NamedTuple):
    """What an item of a dataset says."""

    id: Any
    image: Any
    label: Any


def item_of(value: Any, id: str) -> Item:
    """Return what an item says, whatever it is made of."""
    if isinstance(value, Item):
        return value
    if isinstance(value, Mapping):
        if "image" not in value:
            keys = ", ".join(map(repr, list(value)[:8]))
            raise ImageError(id, f"a dict without 'image'; it has {keys or 'nothing'}", "not-an-image")
        return Item(value.get("id"), value["image"], value.get("label"))
    if isinstance(value, tuple | list):
        parts = [*value, None, None, None]
        if isinstance(parts[0], str):
            return Item(*parts[:3])
        return Item(None, *parts[:2])
    return Item(None, value, None)


def named_item(id: Any, value: Any) -> Item:
    """Return what a value of a mapping says; where that is nothing, the reason instead of its image."""
    try:
        return item_of(value, "")._replace(id=id)
    except ImageError as error:
        return Item(id, error, None)


def data_of(image: Any, id: str) -> Data:
    """Return an image as pixels, or as the bytes of a file.

    An image of Pillow's becomes pixels even when it was opened from a file: whether it still shows what is in the
    file, only its pixels say.
    """
    if isinstance(image, str | os.PathLike):
        return read_bytes(image, id)
    if isinstance(image, bytes):
        if not image:
            raise ImageError(id, "no bytes", "empty")
        return image
    if isinstance(image, ImageError):
        raise ImageError(id, image.reason, image.kind)
    if image is None:
        raise ImageError(id, "None, where an image was expected", "not-an-image")
    try:
        pixels = _pixels(image)
    except Exception as error:  # Of a sparse tensor, or one without content.
        reason = f"this {type(image).__name__} cannot be made an array: {one_line(error)}"
        raise ImageError(id, reason, "unsupported") from error
    try:
        return np.asarray(read_image(image if pixels is None else pixels, id=id))
    except ImageError as error:
        wrong = pixels is not None or not hasattr(image, "getexif")
        raise ImageError(id, error.reason, "unsupported" if wrong else error.kind) from error
    except (TypeError, AttributeError) as error:
        raise ImageError(id, f"a {type(image).__name__} is no image", "not-an-image") from error


def _pixels(image: Any) -> npt.NDArray[Any] | None:
    """Return an array, or a tensor as an array with its channels last; None of anything else."""
    if isinstance(image, np.ndarray):
        return image
    if not hasattr(image, "detach"):
        return None
    tensor = image.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
    pixels: npt.NDArray[Any] = np.asarray(tensor.numpy())
    if pixels.ndim != 3 or pixels.shape[0] not in _CHANNELS:
        return pixels
    # A shape such as (4, 6, 3) is more likely a small image than four channels of three columns.
    return pixels if pixels.shape[2] in _CHANNELS and pixels.shape[0] != 3 else np.moveaxis(pixels, 0, -1)


def one_line(error: Exception) -> str:
    """Return what an exception of somebody else's says, fit for a reason."""
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": "))


def dimensions(image: Any) -> int:
    """Return how many dimensions an array or a tensor has, 0 of anything else."""
    return len(image.shape) if isinstance(image, np.ndarray) or hasattr(image, "detach") else 0


def numbered(number: int) -> str:
    """Return a number as an id."""
    if number >= 10**_DIGITS:
        raise ImageError(str(number), f"without ids there may be {10**_DIGITS:,} images", "too-large")
    return f"{number:0{_DIGITS}d}"


def id_of(value: Any, number: int) -> str:
    """Return what an item is called; what it cannot be called is a failure under its number."""
    if value is None:
        return numbered(number)
    if isinstance(value, int | np.integer):
        if 0 <= value < 10**_DIGITS:
            return numbered(int(value))
        reason = f"as an id, a number has at most {_DIGITS} digits and no sign; others are given as a str"
    elif isinstance(value, str):
        reason = find_flaw(value, "name") or ""
        if not reason and not leaves_root(value):
            return str(value)
        reason = reason or f"its id points out of its root: {quoted(value)}"
    else:
        reason = f"an id is a str or a number, not a {type(value).__name__}"
    raise ImageError(numbered(number), reason, "refused")


def label_of(value: Any) -> str | int | None:
    """Return a class's name or number; None of whatever else datasets have beside an image."""
    if hasattr(value, "item") and not getattr(value, "shape", ()):
        value = value.item()
    if isinstance(value, str):
        return str(value) or None
    return int(value) if isinstance(value, int) and 0 <= value < _MOST_CLASSES else None


def names_of(labels: Iterable[Any] | None, classes: Sequence[Any] | None) -> list[str | None] | None:
    """Return the names of labels; None where no image has one."""
    found = [label_of(value) for value in labels or ()]
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in classes or ()]
    width = len(str(max((value for value in found if isinstance(value, int)), default=0)))
    # As many are held as there are images, so each name is held once.
    named = {
        value: names[value] if isinstance(value, int) and value < len(names) else str(value).zfill(width)
        for value in set(found)
        if isinstance(value, int)
    }
    texts = [named[value] if isinstance(value, int) else value for value in found]
    return texts if any(text is not None for text in texts) else None
