"""Compressed archives, unpacked once into a temporary file without a name, since nothing in them is found otherwise."""

from __future__ import annotations

import bz2
import importlib
import logging
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from embedkit.errors import ImageError
from embedkit.sources.archives.descriptors import SharedFile, reason_of
from embedkit.sources.archives.members import Member
from embedkit.sources.archives.tars import BLOCK, begins_tar
from embedkit.sources.remote.ranges import Readable
from embedkit.sources.temporaries import LOOK_EVERY, MOST_UNKNOWN, require_room

MOST_TIMES = 100

_PIECE = 1 << 20
_MOST_MEMORY = 512 << 20  # An xz file may ask for four gigabytes.

log = logging.getLogger("embedkit")


class _Decompressor(Protocol):
    """What the standard library's have in common; gzip's differs and is made alike."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _BrokenError(Exception):
    """The compressed data are at fault: a reason, and a kind of failure."""


class _Gzip:
    def __init__(self) -> None:
        self._inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._inflater.eof

    @property
    def needs_input(self) -> bool:
        return not self._full

    @property
    def unused_data(self) -> bytes:
        return self._inflater.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        unpacked = self._inflater.decompress(self._inflater.unconsumed_tail + data, max_length)
        self._full = len(unpacked) == max_length  # There may be more, whether or not it has read all that it was given.
        return unpacked


def _zstandard() -> _Decompressor:
    decompressor: _Decompressor = importlib.import_module("compression.zstd").ZstdDecompressor()
    return decompressor


_DECOMPRESSORS: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x1f\x8b": _Gzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(memlimit=_MOST_MEMORY),
    b"\x28\xb5\x2f\xfd": _zstandard,
}


def is_compressed(file: Readable) -> bool:
    """Return whether a file begins like one of the compressed formats that are unpacked."""
    return file.read_at(0, 8).startswith(tuple(_DECOMPRESSORS))


def unpack(file: Readable, *, most_bytes: int | None = None) -> tuple[SharedFile, Member | None]:
    """Return what a compressed file holds as a temporary file, and what was wrong with it if it was cut short.

    The file lies where temporary files do (``TMPDIR``), has no name, and goes with the object.

    Parameters
    ----------
    file : Readable
        The archive; it is read once, from its beginning to its end.
    most_bytes : int, optional
        What it may unpack to; by default a gigabyte and a hundred times its size.

    Raises
    ------
    ImageError
        When it unpacks to more, or to more than there is room for.
    """
    most = MOST_UNKNOWN + MOST_TIMES * file.size if most_bytes is None else most_bytes
    folder = tempfile.gettempdir()
    name = os.path.basename(file.path)
    magic, make = next((magic, make) for magic, make in _DECOMPRESSORS.items() if file.read_at(0, 8).startswith(magic))
    log.info(
        "unpacking %s (%s bytes) into %s: a compressed archive is not read in place", name, f"{file.size:,}", folder
    )
    written, problem = 0, None
    try:
        make()
    except ImportError as error:
        reason = "Zstandard is read with Python 3.14 or newer; unpack it first (zstd -d)"
        raise ImageError(file.path, reason, "unsupported") from error
    with tempfile.TemporaryFile(buffering=0) as spool:
        try:
            for piece in _pieces(file, magic, make):
                if not written and len(piece) >= BLOCK and not begins_tar(piece[:BLOCK]):
                    raise ImageError(file.path, "a compressed file, and no tar archive in it", "unsupported")
                if written + len(piece) > most:
                    reason = f"unpacks to more than {most:,} bytes; if it is no trap, unpack it yourself"
                    raise ImageError(file.path, reason, "too-large")
                if written // LOOK_EVERY != (written + len(piece)) // LOOK_EVERY or not written:
                    require_room(file.path, len(piece), "unpack")
                spool.write(piece)
                written += len(piece)
        except _BrokenError as error:
            reason, kind = error.args
            problem = Member.fault(b"", f"cannot be unpacked to its end: {reason}", kind)
        except OSError as error:
            raise ImageError(file.path, f"cannot be unpacked: {reason_of(error)[0]}", "unreadable") from error
        log.info("unpacked %s to %s bytes", name, f"{written:,}")
        return SharedFile(file.path, os.dup(spool.fileno())), problem


def _pieces(file: Readable, magic: bytes, make: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """Yield what a file holds; it may be several compressed ones in a row, with zeros or garbage after them."""
    offset, waiting = 0, b""
    while True:
        decompressor = make()
        while not decompressor.eof:
            if not waiting and decompressor.needs_input:
                waiting = file.read_at(offset, _PIECE)
                offset += len(waiting)
                if not waiting:
                    raise _BrokenError("its end is missing", "truncated")
            try:
                piece = decompressor.decompress(waiting, _PIECE)
            except Exception as error:  # Each raises another kind, bzip2 the same as a disk does.
                raise _BrokenError(str(error) or "it is broken", "damaged") from error
            yield piece
            waiting = b""
        waiting = decompressor.unused_data.lstrip(b"\0")
        while len(waiting) < len(magic) and (piece := file.read_at(offset, _PIECE)):
            offset += len(piece)
            waiting = (waiting + piece).lstrip(b"\0")
        if not waiting.startswith(magic):
            return
