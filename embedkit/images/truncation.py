"""Files whose end is missing: how that is told, and how what is there becomes a whole file again."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from embedkit.images.headers import boxes

_PNG = b"\x89PNG\r\n\x1a\n"
_ADAM7 = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def is_truncated(data: bytes) -> bool:
    """Return whether a file's own structure says that it goes on after its end; for files that did not decode."""
    if data.startswith(_PNG):
        chunks = list(_png_chunks(data))
        if not all(kind.isalpha() for kind, _, _ in chunks):
            return False  # The chain of chunks is broken before the end.
        return not chunks or chunks[-1][0] != b"IEND" or chunks[-1][2] + 4 > len(data)
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-1024:]
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _gif_end(data)[1]
    if data[:4] == b"RIFF":
        return 8 + int.from_bytes(data[4:8], "little") > len(data)
    if data[4:8] in (b"ftyp", b"JXL ", b"jP  "):
        return any(end > len(data) for _, _, end in boxes(data)) or len(data) < 64
    if data.startswith(b"\xff\x4f\xff\x51"):
        return not data.rstrip(b"\0").endswith(b"\xff\xd9")
    if data.startswith(b"BM"):
        return _bmp_length(data) > len(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff_length(data) > len(data)
    return False


def mended(data: bytes, max_pixels: int) -> bytes | None:
    """Return a truncated JPEG, PNG, GIF or BMP with an end, so that what is there of it decodes; None for others.

    The pixels that are missing become what the format makes of nothing: the grey of a JPEG's missing coefficients, the
    first colour of a GIF's palette, and the zeros of a PNG and a BMP. A header may promise anything: what promises more
    than `max_pixels` is not mended.
    """
    if data.startswith(b"\xff\xd8"):
        return data + b"\xff\xd9"
    if data.startswith(_PNG):
        return _mended_png(data, max_pixels)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _mended_gif(data, max_pixels)
    if data.startswith(b"BM"):
        missing = _bmp_length(data) - len(data)
        return data + bytes(missing) if len(data) > 34 and 0 < missing <= 4 * max_pixels else None
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the contents of every chunk that begins in the data."""
    at = len(_PNG)
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at + 8, at + 8 + length
        at += length + 12


def _mended_png(data: bytes, max_pixels: int) -> bytes | None:
    """Decompress the rows that are there, and compress them again with zeros for the others."""
    chunks = list(_png_chunks(data))
    first = next((number for number, chunk in enumerate(chunks) if chunk[0] == b"IDAT"), None)
    if first is None or chunks[0][0] != b"IHDR" or chunks[0][2] - chunks[0][1] != 13:
        return None
    missing = _png_raw_length(data[chunks[0][1] : chunks[0][2]])
    if missing > 8 * max_pixels + (1 << 16):  # 16 bits of four channels, and a byte more a row.
        return None
    reading, writing, pieces = zlib.decompressobj(), zlib.compressobj(1), []
    try:
        for kind, start, end in chunks[first:]:
            rest = data[start:end] if kind == b"IDAT" else b""
            while rest and missing > 0:
                rows = reading.decompress(rest, min(missing, 1 << 20))
                rest = reading.unconsumed_tail
                missing -= len(rows)
                pieces.append(writing.compress(rows))
                if not rows and not rest:
                    break
    except zlib.error:
        pass  # What was decompressed before counts.
    while missing > 0:
        pieces.append(writing.compress(bytes(min(missing, 1 << 20))))
        missing -= 1 << 20
    body = b"".join([*pieces, writing.flush()])
    chunk = struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    return data[: chunks[first][1] - 8] + chunk + b"\0\0\0\0IEND\xaeB`\x82"


def _png_raw_length(header: bytes) -> int:
    """Return how many bytes the rows of a PNG have with their filter bytes."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _CHANNELS.get(colour, 4)
    total = 0
    for top, down, left, across in _ADAM7 if interlaced else ((0, 1, 0, 1),):
        rows, columns = -(-(height - top) // down), -(-(width - left) // across)
        if rows > 0 and columns > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _gif_end(data: bytes) -> tuple[int, bool, int]:
    """Return where the last whole block of pixels ends, whether the file ends too early, and its pixels' count."""
    at = 13 + _palette_length(data[10:11])
    pixels = 0
    while at < len(data):
        block = data[at : at + 1]
        if block == b";":
            return at, False, pixels
        if block == b"!":
            at, cut = _past_blocks(data, at + 2)
            in_pixels = False
        elif block == b",":
            width, height = (
                int.from_bytes(data[at + 5 : at + 7], "little"),
                int.from_bytes(data[at + 7 : at + 9], "little"),
            )
            pixels = width * height
            at, cut = _past_blocks(data, at + 11 + _palette_length(data[at + 9 : at + 10]))
            in_pixels = True
        else:
            return at, False, pixels
        if cut or at >= len(data):
            return (at if in_pixels else 0), True, pixels
    return 0, True, pixels


def _palette_length(flags: bytes) -> int:
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _past_blocks(data: bytes, at: int) -> tuple[int, bool]:
    """Return the end of a chain of blocks and False, or where its last block begins, when that is cut, and True."""
    while at < len(data):
        if data[at] == 0:
            return at + 1, False
        if at + 1 + data[at] > len(data):
            return at, True
        at += 1 + data[at]
    return at, True


def _mended_gif(data: bytes, max_pixels: int) -> bytes | None:
    """Fill up the block that is cut, and go on with codes for the first colour."""
    at, cut, pixels = _gif_end(data)
    if not cut or at == 0 or at > len(data) or pixels > max_pixels:
        return None
    last = data[at + 1 :]
    filled = bytes([255]) + last + bytes(255 - len(last)) if at < len(data) else b""
    blocks = pixels * 3 // 2 // 255 + 2  # A code has 12 bits at most, and stands for one pixel at least.
    return data[:at] + filled + (b"\xff" + bytes(255)) * blocks + b"\0;"


def _bmp_length(data: bytes) -> int:
    """Return how long a BMP without compression has to be, 0 where that is unknown."""
    if len(data) < 34 or data[14] < 40:
        return 26 if len(data) < 26 else 0
    offset, width, height = (struct.unpack_from(kind, data, at)[0] for kind, at in (("<I", 10), ("<i", 18), ("<i", 22)))
    bits, compression = struct.unpack_from("<HI", data, 28)
    if compression not in (0, 3):
        return int.from_bytes(data[2:6], "little")
    return int(offset + (abs(width) * bits + 31) // 32 * 4 * abs(height))


_TIFF_TYPES = {1: 1, 2: 1, 3: 2, 4: 4}
_OFFSETS_AND_COUNTS = ((273, 279), (324, 325))


def _tiff_length(data: bytes) -> int:
    """Return how long a TIFF has to be for its first image; 0 where that is unknown."""
    order = "<" if data[:2] == b"II" else ">"
    if len(data) < 8:
        return 8
    start: int = struct.unpack_from(order + "I", data, 4)[0]
    if start + 2 > len(data):
        return start + 2
    entries = struct.unpack_from(order + "H", data, start)[0]
    end: int = start + 2 + 12 * entries
    if end > len(data):
        return end
    values: dict[int, list[int]] = {}
    for at in range(start + 2, end, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", data, at)
        width = _TIFF_TYPES.get(kind, 0)
        if not any(tag in pair for pair in _OFFSETS_AND_COUNTS) or width not in (2, 4):
            continue
        where = at + 8 if width * count <= 4 else struct.unpack_from(order + "I", data, at + 8)[0]
        if where + width * count > len(data):
            return int(where + width * count)
        values[tag] = list(struct.unpack_from(f"{order}{count}{'H' if width == 2 else 'I'}", data, where))
    for offsets, counts in _OFFSETS_AND_COUNTS:
        for offset, length in zip(values.get(offsets, ()), values.get(counts, ()), strict=False):
            end = max(end, offset + length)
    return end
