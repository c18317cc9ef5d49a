"""The members of a tar archive, from its headers alone, however the archive is made or broken.

The standard library's module keeps an object for every member that it has seen, reads extended headers of any size, and
calls itself once for each of a row of them. An archive from a stranger wants a reader with limits.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from embedkit.sources.archives.members import Member, Place, modified
from embedkit.sources.remote.ranges import Readable

BLOCK = 512
MAX_EXTENDED = 1 << 20  # What may lie before a member: long names, times, attributes.

_FIELDS = struct.Struct("100s24x12s12s8sc100s6s82x155s12x")
_HARD_LINK, _SYMBOLIC_LINK, _SPARSE = b"1", b"2", b"S"
_SPECIAL = {b"3": "device", b"4": "device", b"6": "named pipe"}
_WITHOUT_DATA = b"123456V"
_OF_NO_USE = b"5DVMN"  # Folders, and what GNU calls volumes, continued files and the like.
_SPARSE_KEYS = frozenset(b"GNU.sparse." + key for key in (b"name", b"major", b"map", b"size", b"numblocks"))
_KEYS = _SPARSE_KEYS | {b"path", b"linkpath", b"size", b"mtime"}  # No others, for there may be any number of them.
_SECONDS = re.compile(rb"(-?)(\d{1,12})(?:\.(\d*))?")


class _Header(NamedTuple):
    name: bytes
    size: int
    seconds: int
    kind: bytes
    link: bytes


def begins_tar(block: bytes) -> bool:
    """Return whether a file's first block is that of a tar archive: a member's header, or the end of an empty one."""
    return len(block) == BLOCK and (not block.strip(b"\0") or _header(block) is not None)


def walk_tar(file: Readable, *, is_cut: bool = False) -> Iterator[Member]:
    """Yield the members of a tar archive in their order; what is wrong with the archive itself has no name.

    A damaged header is left out, and the next one that is whole is looked for. Archives that were joined with ``cat``
    are read through to the last. Zeros end an archive; without any there were more members, unless it is known already
    that it `is_cut`.
    """
    offset, block = 0, b""
    extended: dict[bytes, bytes] = {}
    time: dict[bytes, bytes] = {}  # That of all members that have no other.
    ended = False
    while offset < file.size:
        block = block or file.read_at(offset, BLOCK)
        header = _header(block)
        if header is None:
            if not block.strip(b"\0"):
                ended, offset, block = True, _after_zeros(file, offset), b""
                continue
            if ended:
                return  # What follows the end of an archive may be anything.
            if len(block) < BLOCK:
                yield Member.fault(b"", "the archive ends within a header", "truncated")
                return
            found = next_header(file, offset + BLOCK)
            yield Member.fault(b"", f"no header where there should be one, at byte {offset:,}", "damaged")
            offset, block, extended = found, b"", {}
            continue
        ended = False
        data = offset + BLOCK
        if header.kind in b"xXgLK":
            if data + header.size > file.size:
                yield Member.fault(b"", "the archive ends within a header", "truncated")
                return
            if header.size > MAX_EXTENDED:
                yield Member.fault(b"", f"a header of {header.size:,} bytes, at byte {offset:,}", "damaged")
            else:
                said = _said(header, file.read_at(data, header.size))
                if header.kind != b"g":
                    extended |= said
                elif b"mtime" in said:
                    time = {b"mtime": said[b"mtime"]}
            offset, block = data + _padded(header.size), b""
            continue
        if header.kind == _SPARSE:
            data = _after_sparse_map(file, offset, block)
        told, extended = (time | extended if time else extended), {}
        size = _stored(header, told)
        offset = data + _padded(size)
        # The end of the data and the next header, which lie side by side, in one go.
        last = min(BLOCK, max(0, offset - data))
        both = file.read_at(offset - last, last + BLOCK)
        block = both[last:]
        if data + size > file.size:
            name = _member(header, told, data, b"").name
            yield Member.fault(name, f"the archive ends within this file of {size:,} bytes", "truncated")
            return
        yield _member(header, told, data, both[: size - (offset - last - data)])
    if file.size and not ended and not is_cut:
        reason = "the zeros that end an archive are missing: it was cut off, and members may be missing, too"
        yield Member.fault(b"", reason, "truncated")


def _header(block: bytes) -> _Header | None:
    """Return what a header says, or nothing when it is none."""
    if len(block) < BLOCK or not _is_whole(block):
        return None
    name, size, seconds, _, kind, link, magic, prefix = _FIELDS.unpack(block)
    bytes_, time = _number(size), _number(seconds)
    if bytes_ is None or bytes_ < 0:
        return None
    name = _text(name)
    if magic == b"ustar\0" and prefix[0]:  # GNU's own format has other things in this place.
        name = _text(prefix) + b"/" + name
    return _Header(name, bytes_, time or 0, kind, _text(link))


def _is_whole(block: bytes) -> bool:
    expected = _number(block[148:156])
    if expected is None or not expected:
        return False
    # Adler-32's lower half is one more than the sum of the bytes modulo 65521, much faster than a sum.
    rest = block[:148] + b" " * 8 + block[156:]
    if (zlib.adler32(rest) & 0xFFFF) == (expected + 1) % 65521:
        return True
    return sum(rest) - 256 * sum(byte > 127 for byte in rest) == expected  # Some count bytes as signed.


def _number(field: bytes) -> int | None:
    """Return a number, in octal digits or, with the highest bit set, in bytes."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big") - (1 << (8 * len(field) - 1))
        return number - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else number
    try:
        return int(_text(field).strip() or b"0", 8)
    except ValueError:
        return None


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _said(header: _Header, data: bytes) -> dict[bytes, bytes]:
    """Return what an extended header says: one of GNU's long names, or POSIX's records."""
    if header.kind in b"LK":
        return {b"path" if header.kind == b"L" else b"linkpath": _text(data)}
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(data):
        length, space, _ = data[start : start + 10].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        key, _, value = data[start + len(length) + 1 : start + int(length) - 1].partition(b"=")
        if key in _KEYS:
            records[key] = value
        start += int(length)
    return records


def _stored(header: _Header, extended: dict[bytes, bytes]) -> int:
    """Return how many bytes of data follow a header."""
    if header.kind in _WITHOUT_DATA:
        return 0
    size = extended.get(b"size", b"")
    return int(size) if size.isdigit() and len(size) < 20 else header.size


def _member(header: _Header, extended: dict[bytes, bytes], data: int, end: bytes) -> Member:
    """Return a member; the end of its data goes into its time, for most times are whole seconds."""
    name, kind = extended.get(b"path") or header.name, header.kind
    if kind == _SYMBOLIC_LINK:
        return Member.fault(name, "a symbolic link, which an archive's files may not be", "refused")
    if kind == _HARD_LINK:
        return Member(name, target=extended.get(b"linkpath") or header.link)
    if kind in _SPECIAL:
        return Member.fault(name, f"not a regular file but a {_SPECIAL[kind]}", "not-an-image")
    if kind in _OF_NO_USE or (name.endswith(b"/") and kind in b"\0000"):
        return Member(name.rstrip(b"/") or b"/", folder=True)
    if kind == _SPARSE or not _SPARSE_KEYS.isdisjoint(extended):
        name = extended.get(b"GNU.sparse.name") or name
        return Member.fault(name, "stored without its holes (tar --sparse), which is not read", "unsupported")
    time = _nanoseconds(extended.get(b"mtime", b"")) if extended else None
    seconds, fraction = (header.seconds, 0) if time is None else divmod(time, 10**9)
    size = _stored(header, extended)
    return Member(name, Place(data, size, size, modified(seconds, zlib.crc32(end, fraction))))


def _nanoseconds(text: bytes) -> int | None:
    """Return a time in seconds with decimals in nanoseconds."""
    if not (found := _SECONDS.fullmatch(text)):
        return None
    time = int(found[2]) * 10**9 + int((found[3] or b"0")[:9].ljust(9, b"0"))
    return -time if found[1] else time


def _after_sparse_map(file: Readable, offset: int, block: bytes) -> int:
    """Return where the data of a sparse member begin: after its map, which may go on for many blocks."""
    more, offset = block[482], offset + BLOCK
    while more:
        block = file.read_at(offset, BLOCK)
        offset += BLOCK
        more = block[504] if len(block) == BLOCK else 0
    return offset


def _after_zeros(file: Readable, offset: int) -> int:
    """Return where the first block lies that is not all zeros."""
    size = 8 * BLOCK
    while piece := file.read_at(offset, size):
        if rest := piece.lstrip(b"\0"):
            return offset + (len(piece) - len(rest)) // BLOCK * BLOCK
        # Ever larger, so that the cost is that of what is skipped, whether that is much or little.
        offset, size = offset + len(piece), min(2 * size, 1 << 20)
    return file.size


def next_header(file: Readable, offset: int) -> int:
    """Return where the next whole header lies, or the end."""
    size = 8 * BLOCK
    while len(piece := file.read_at(offset, size)) >= BLOCK:
        blocks = np.frombuffer(piece, np.uint8, len(piece) // BLOCK * BLOCK).reshape(-1, BLOCK)
        for number in np.flatnonzero((blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1)):
            if _header(blocks[number].tobytes()):
                return offset + int(number) * BLOCK
        offset, size = offset + blocks.size, min(2 * size, 1 << 20)
    return file.size
