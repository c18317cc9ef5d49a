"""The members of a zip archive, from its directory alone, and the bytes of one.

The standard library's module keeps an object for every member, and its readers share one position in the file. Here the
directory is read through once, and each member by itself.
"""

from __future__ import annotations

import calendar
import functools
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from embedkit.errors import ImageError
from embedkit.sources.archives.members import Member, Place, modified
from embedkit.sources.remote.ranges import Readable

_ENTRY = struct.Struct("<4sBBHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4s22xHH")
_END = struct.Struct("<4sHHHHIIH")
_END_64 = struct.Struct("<4s12xIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_MOST_COMMENT = 0xFFFF
_PIECE = 1 << 20
_USUAL = 512  # What the name and the notes before a member take at most, as a rule.
_STORED, _DEFLATED = 0, 8
_METHODS = {1: "shrunk", 6: "imploded", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 99: "AES"}
_UNIX = 3


class _Directory(NamedTuple):
    start: int
    end: int
    members: int
    shift: int  # Of every place that the archive names, when something was put before it.


def is_zip(file: Readable) -> bool:
    """Return whether a file begins like a zip archive; what unpacks itself begins otherwise."""
    return file.read_at(0, 4) in (b"PK\3\4", b"PK\5\6", b"PK\6\6")


def walk_zip(file: Readable) -> Iterator[Member]:
    """Yield the members of a zip archive in the order of its directory.

    Raises
    ------
    ImageError
        When its directory, which is its end, cannot be found.
    """
    directory = _find_directory(file)
    stream = _Stream(file, directory.start, directory.end)
    number = 0
    while len(head := stream.take(_ENTRY.size)) == _ENTRY.size:
        fields = _ENTRY.unpack(head)
        if fields[0] != b"PK\1\2":
            break
        name, extra = stream.take(fields[11]), stream.take(fields[12])
        stream.take(fields[13])
        yield _member(fields, name, extra, directory)
        number += 1
    if number & 0xFFFF != directory.members & 0xFFFF:  # Old writers count in 16 bits.
        reason = f"the directory breaks off after {number:,} of {directory.members:,} members"
        yield Member.fault(b"", reason, "damaged")


def read_member(file: Readable, place: Place, id: str) -> bytes:
    """Return the bytes of a member, never more than its directory says.

    Raises
    ------
    ImageError
        When they are not what the directory says.
    """
    # The member with what stands before it, in one go, since asking twice takes twice as long where files are far away.
    head = file.read_at(
        place.offset, _LOCAL.size + _USUAL + (min(place.stored, _PIECE) if place.packed else place.size)
    )
    if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
        raise ImageError(id, "the archive has no member where its directory says", "damaged")
    _, name, extra = _LOCAL.unpack_from(head)
    start = _LOCAL.size + name + extra
    first = head[start : start + place.stored]
    if place.packed:
        data = _inflated(file, first, place.offset + start, place, id)
    else:
        data = first + file.read_at(place.offset + start + len(first), place.size - len(first))
    if len(data) < place.size:
        raise ImageError(id, f"{len(data):,} bytes, where the archive's directory says {place.size:,}", "truncated")
    if zlib.crc32(data) != place.crc:
        raise ImageError(id, "its checksum is not that in the archive's directory", "damaged")
    return data


def _inflated(file: Readable, piece: bytes, start: int, place: Place, id: str) -> bytes:
    """Return the bytes of a member that begins with a piece."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    parts: list[bytes] = []
    left, end = place.size, start + place.stored
    try:
        while not inflater.eof and (piece := piece or file.read_at(start, min(_PIECE, end - start))):
            start += len(piece)
            # One byte more than there may be shows that there are more.
            parts.append(inflater.decompress(piece, left + 1))
            left -= len(parts[-1])
            piece = b""
            if left < 0:
                raise ImageError(id, f"it has more than the {place.size:,} bytes that its directory says", "damaged")
    except zlib.error as error:
        raise ImageError(id, f"cannot be unpacked: {error}", "damaged") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Stream:
    """A part of a file, read from its beginning to its end."""

    def __init__(self, file: Readable, start: int, end: int) -> None:
        self.file, self.start, self.end = file, start, end
        self.piece, self.at = b"", 0

    def take(self, size: int) -> bytes:
        """Return the next bytes, or what is left."""
        if self.at + size > len(self.piece):
            rest = self.piece[self.at :]
            read = self.file.read_at(self.start, min(_PIECE, self.end - self.start))
            self.start += len(read)
            self.piece, self.at = rest + read, 0
        self.at += size
        return self.piece[self.at - size : self.at]


def has_directory(file: Readable) -> bool:
    """Return whether a file ends like a zip archive."""
    return _find_end(file) is not None


def _find_end(file: Readable) -> tuple[int, tuple[Any, ...]] | None:
    """Return where the end of an archive begins that follows its directory, and its fields."""
    tail_at = max(0, file.size - _MOST_COMMENT - _END.size)
    tail = file.read_at(tail_at, file.size - tail_at)
    at = tail.rfind(b"PK\5\6")
    while at >= 0:
        if at + _END.size <= len(tail):
            fields = _END.unpack_from(tail, at)
            if at + _END.size + fields[-1] <= len(tail):
                return tail_at + at, fields
        at = tail.rfind(b"PK\5\6", 0, at)
    return None


def _find_directory(file: Readable) -> _Directory:
    found = _find_end(file)
    if found is None:
        raise ImageError(file.path, "its end is missing, where a zip archive has its directory", "truncated")
    end, (_, disk, _, _, count, size, offset, _) = found
    if large := _find_large_end(file, end):
        end, disk, count, size, offset = large
    if disk:
        raise ImageError(file.path, "one of several parts of a zip archive; join them first", "unsupported")
    shift = end - size - offset
    if shift and file.read_at(offset, 4) == b"PK\1\2":
        shift = 0  # Something lies behind the directory, not before the archive.
    if offset + shift < 0 or offset + shift + size > end:
        raise ImageError(file.path, "a zip archive whose directory is not where its end says", "damaged")
    return _Directory(offset + shift, offset + shift + size, count, shift)


def _find_large_end(file: Readable, end: int) -> tuple[int, int, int, int, int] | None:
    """Return what the end of a large archive (zip64) says, which lies before the common one."""
    locator = file.read_at(max(0, end - _LOCATOR.size), _LOCATOR.size)
    if end < _LOCATOR.size or not locator.startswith(b"PK\6\7"):
        return None
    named = _LOCATOR.unpack(locator)[2]
    for at in (named, end - _LOCATOR.size - _END_64.size):
        record = file.read_at(at, _END_64.size) if 0 <= at < file.size else b""
        if len(record) == _END_64.size and record.startswith(b"PK\6\6"):
            _, disk, _, _, count, size, offset = _END_64.unpack(record)
            return at, disk, count, size, offset
    raise ImageError(file.path, "a zip archive whose end (zip64) is damaged", "damaged")


def _member(fields: tuple[int, ...], name: bytes, extra: bytes, directory: _Directory) -> Member:
    _, _, system, _, flags, method, time, date, crc, stored, size, *_, attributes, offset = fields
    name = _utf8(name, bool(flags & 0x800), system == _UNIX)
    mode = attributes >> 16 if system == _UNIX else 0
    if name.endswith(b"/") or stat.S_ISDIR(mode):
        return Member(name.rstrip(b"/") or b"/", folder=True)
    if stat.S_ISLNK(mode):
        return Member.fault(name, "a symbolic link, which an archive's files may not be", "refused")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return Member.fault(name, "not a regular file but a device, pipe or socket", "not-an-image")
    if flags & 0x2041:
        return Member.fault(name, "encrypted", "unsupported")
    if method not in (_STORED, _DEFLATED):
        how = _METHODS.get(method, f"method {method}")
        return Member.fault(name, f"compressed in a way that is not read ({how}); only Deflate is", "unsupported")
    large = _large(extra, size, stored, offset)
    if large is None:
        return Member.fault(name, "its size (zip64) is missing from the archive's directory", "damaged")
    size, stored, offset = large
    offset += directory.shift
    if offset < 0 or offset + _LOCAL.size + stored > directory.start:
        return Member.fault(name, "lies outside of the archive", "damaged")
    # Deflate makes nothing much longer, so that what does is not worth reading.
    if stored > 2 * size + _PIECE or (method == _STORED and stored != size):
        return Member.fault(name, f"takes {stored:,} bytes in the archive, where it has {size:,}", "damaged")
    return Member(name, Place(offset, stored, size, modified(_seconds(date, time), crc), method == _DEFLATED, crc))


def _utf8(name: bytes, marked: bool, unix: bool) -> bytes:
    """Return a name in UTF-8; the archive has it so, or in the code page of the first PCs."""
    if marked or name.isascii():
        return name
    if unix:  # Such systems write UTF-8 and do not always mark it.
        try:
            name.decode()
            return name
        except UnicodeDecodeError:
            pass
    return name.decode("cp437").encode()


def _large(extra: bytes, *values: int) -> list[int] | None:
    """Return size, stored size and offset, as zip64 has them where they are large; nothing when one is missing."""
    numbers: list[int] = []
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<HH", extra)
        if tag == 1:
            field = extra[4 : 4 + length]
            numbers = [number for (number,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            break
        extra = extra[4 + length :]
    found = iter(numbers)
    large = [next(found, -1) if value == 0xFFFFFFFF else value for value in values]
    return None if -1 in large else large


def _seconds(date: int, time: int) -> int:
    """Return the time of DOS, which knows no zones, as if in UTC."""
    return _midnight(date) + (time >> 11) * 3600 + (time >> 5 & 63) * 60 + (time & 31) * 2


@functools.lru_cache(maxsize=1024)
def _midnight(date: int) -> int:
    month, day = date >> 5 & 15, date & 31
    return calendar.timegm((1980 + (date >> 9), month if 1 <= month <= 12 else 1, max(day, 1), 0, 0, 0))
