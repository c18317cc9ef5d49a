"""How many pixels a file declares, where its reader would find that out only while it decodes them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

JXL_CODESTREAM = b"\xff\x0a"
JXL_CONTAINER = b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a"

# The pictures inside an icon. Their own headers count, not the icon's table.
_PNG_INSIDE = re.compile(rb"\x89PNG\r\n\x1a\n....IHDR(.{8})", re.DOTALL)
_JP2_INSIDE = re.compile(rb"\x00\x00\x00\x16ihdr(.{8})", re.DOTALL)
# Width to height: what three bits say instead of a width.
_JXL_RATIOS = ((1, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def sizes_in(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield width and height of every picture that the header of an icon, a JPEG XL or a WebP declares."""
    if data[:4] in (b"\0\0\1\0", b"\0\0\2\0"):
        yield from _icon_bitmaps(data)
    if data[:4] in (b"\0\0\1\0", b"icns"):
        yield from (struct.unpack(">II", found[1]) for found in _PNG_INSIDE.finditer(data))
        yield from (struct.unpack(">II", found[1])[::-1] for found in _JP2_INSIDE.finditer(data))
    elif data.startswith((JXL_CODESTREAM, JXL_CONTAINER)):
        size = _jxl_size(jxl_codestream(data))
        if size is not None:
            yield size
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) >= 30:
        yield int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1


def boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the contents of each box of an ISO file; an end may lie beyond the data's."""
    at = 0
    while at + 8 <= len(data):
        length, head = int.from_bytes(data[at : at + 4], "big"), 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        elif length == 0:
            length = len(data) - at
        if length < head:
            return
        yield data[at + 4 : at + 8], at + head, at + length
        at += length


def jxl_codestream(data: bytes) -> bytes:
    """Return the beginning of the codestream of a JPEG XL file."""
    if data.startswith(JXL_CODESTREAM):
        return data[:64]
    for kind, start, _ in boxes(data):
        if kind == b"jxlc":
            return data[start : start + 64]
        if kind == b"jxlp":
            return data[start + 4 : start + 68]
    return b""


def _icon_bitmaps(data: bytes) -> Iterator[tuple[int, int]]:
    for number in range(int.from_bytes(data[4:6], "little")):
        entry = 6 + 16 * number
        offset = int.from_bytes(data[entry + 12 : entry + 16], "little")
        head = data[offset : offset + 12]
        if len(head) == 12 and head[:4] == b"\x28\0\0\0":
            width, height = struct.unpack("<ii", head[4:])
            yield abs(width), abs(height) // 2  # A mask of the same height lies below the picture.


class _Bits:
    """Bits from the lowest of the first byte upwards."""

    def __init__(self, data: bytes) -> None:
        self.value = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        taken = self.value & ((1 << count) - 1)
        self.value >>= count
        return taken


def _jxl_size(codestream: bytes) -> tuple[int, int] | None:
    if not codestream.startswith(JXL_CODESTREAM):
        return None
    bits = _Bits(codestream[2:])
    small = bits.take(1)

    def side() -> int:
        return 8 * (bits.take(5) + 1) if small else bits.take((9, 13, 18, 30)[bits.take(2)]) + 1

    height = side()
    ratio = bits.take(3)
    across, down = _JXL_RATIOS[ratio]
    return (side() if ratio == 0 else height * across // down), height
