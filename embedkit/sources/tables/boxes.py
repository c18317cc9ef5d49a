"""Boxes in tables: which part of an image a row is about."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from embedkit.sources.failing import quoted
from embedkit.text import printable

Box = tuple[int, int, int, int]

BOX_FORMATS = ("xyxy", "xywh")
# How one column, or four, of boxes are called, without case, spaces and underscores.
COLUMN_NAMES = {"xyxy": ("box", "bbox", "xyxy", "boxxyxy", "bboxxyxy"), "xywh": ("xywh", "boxxywh", "bboxxywh")}
CORNER_NAMES = {
    "xyxy": (
        ("x0", "y0", "x1", "y1"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"),
        ("xmin", "ymin", "xmax", "ymax"),
    ),
    "xywh": (("x", "y", "w", "h"), ("x", "y", "width", "height")),
}  # fmt: skip
_LARGEST = 2**31 - 1
_SEPARATOR = re.compile(r"[\s,;]+")


def read_box(values: Sequence[Any], box_format: str) -> Box | None:
    """Return the box that a row has in one column or in four; None when they are empty.

    Parameters
    ----------
    values : sequence
        One text or list of four numbers, or four numbers.
    box_format : {"xyxy", "xywh"}
        Left, top, right and bottom, of which right and bottom are the first outside; or left, top, width and height.

    Returns
    -------
    tuple of int, or None
        Left, top, right and bottom, each rounded to the nearest edge of a pixel.

    Raises
    ------
    ValueError
        When it is no box.

    Examples
    --------
    >>> from embedkit.sources.tables.boxes import read_box
    >>> read_box(["[10, 20, 30.4, 40]"], "xyxy"), read_box([10, 20, 30, 40], "xywh")
    ((10, 20, 30, 40), (10, 20, 40, 60))
    """
    parts = _parts(values[0]) if len(values) == 1 else values
    if all(_is_empty(part) for part in parts):
        return None
    if len(parts) != 4:
        raise ValueError(f"a box has 4 numbers, not {len(parts)}: {_shown(values)}")
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a box has 4 numbers, not {_shown(values)}") from None
    if box_format == "xywh":
        numbers[2:] = numbers[0] + numbers[2], numbers[1] + numbers[3]
    if not all(abs(number) < _LARGEST for number in numbers):
        raise ValueError(f"a box has 4 numbers of ordinary size, not {_shown(values)}")
    if max(map(abs, numbers)) <= 1 and not all(number.is_integer() for number in numbers):
        raise ValueError(f"a box is in pixels, not in parts of the image: {_shown(values)}")
    left, top, right, bottom = (math.floor(number + 0.5) for number in numbers)
    if right <= left or bottom <= top:
        reason = f"a box from {left},{top} to {right},{bottom} holds nothing"
        if box_format == "xyxy" and right > 0 and bottom > 0:
            reason += f"; if {right},{bottom} is its size, say --box-format xywh"
        raise ValueError(reason)
    return left, top, right, bottom


def fragment(box: Box) -> str:
    """Return what names a part of an image in a URL: a W3C media fragment."""
    left, top, right, bottom = box
    return f"#xywh={left},{top},{right - left},{bottom - top}"


def _parts(value: Any) -> Sequence[Any]:
    """Return the numbers of a box in one column, as they stand there."""
    if not isinstance(value, str):
        return value if isinstance(value, list | tuple) else [value]
    text = value.strip().removeprefix("[").removesuffix("]").removeprefix("(").removesuffix(")").strip()
    return _SEPARATOR.split(text)


def _is_empty(part: Any) -> bool:
    return (
        part is None or (isinstance(part, str) and not part.strip()) or (isinstance(part, float) and math.isnan(part))
    )


def _shown(values: Sequence[Any]) -> str:
    """Return what a row has for a box, as tables write it."""
    value = values[0] if len(values) == 1 else list(values)
    if isinstance(value, str):
        return quoted(value, 100)
    try:
        return printable(json.dumps(value, ensure_ascii=False, default=str)[:100])
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
