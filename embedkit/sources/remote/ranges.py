"""Files behind URLs that are read at places, of which nothing else is downloaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from embedkit.errors import ImageError
from embedkit.sources.remote.transfers import Patience, Place, connect, public_url
from embedkit.sources.remote.versions import stamp_of

_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")
_PIECE = 1 << 16
_LEAST_AHEAD, _MOST_AHEAD = 16 << 10, 4 << 20
_NEAR = 1 << 20  # Asking again takes about as long as reading so many bytes.


class Readable(Protocol):
    """A file that is read at places.

    Attributes
    ----------
    path : str
        What failures call it.
    size : int
        In bytes.
    version : str
        What tells it from a later one under the same name; empty when nothing does.
    """

    @property
    def path(self) -> str:
        """What failures call it."""
        ...

    @property
    def size(self) -> int:
        """How many bytes it has."""
        ...

    @property
    def version(self) -> str:
        """What tells it from a later one."""
        ...

    def read_at(self, offset: int, size: int, /) -> bytes:
        """Return `size` bytes from `offset` on, or as many as there are before the end."""
        ...

    def require_unchanged(self) -> None:
        """Raise OSError when it is known to be another than was opened."""
        ...


class _Part(NamedTuple):
    """A part of a file, and which file it is of."""

    data: bytes
    size: int
    version: str


@dataclass(frozen=True)
class RangedFile:
    """A file behind a URL that is read at places, by several threads at a time.

    Each part says which version it is of, and one of another version than the first is refused.
    """

    place: Place = field(repr=False)
    url: str = field(repr=False)
    path: str
    size: int
    version: str

    def read_at(self, offset: int, size: int, /) -> bytes:
        """Return `size` bytes from `offset` on, or as many as there are before the end."""
        parts: list[bytes] = []
        end = min(offset + size, self.size)
        while offset < end:
            part = _ask(self.place, self.url, self.path, offset, end - offset)
            if part is None:
                raise ImageError(self.path, "its server gave parts of it, and now gives the whole", "unreadable")
            if (part.size, part.version) != (self.size, self.version):
                raise ImageError(self.path, "it has changed since it was listed", "unreadable")
            parts.append(part.data)
            offset += len(part.data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def require_unchanged(self) -> None:
        """Do nothing, since each part says itself what it is of."""


class ReadAhead:
    """A file that is slow to ask, for one thread that goes through it from its beginning to its end.

    While what is asked for lies close together, ever more is read at once; where most is skipped, little.
    """

    def __init__(self, file: Readable) -> None:
        self.file, self.path, self.size, self.version = file, file.path, file.size, file.version
        self._start, self._data, self._ahead = 0, b"", _LEAST_AHEAD

    def read_at(self, offset: int, size: int, /) -> bytes:
        """Return `size` bytes from `offset` on, or as many as there are before the end."""
        end = self._start + len(self._data)
        if not self._start <= offset <= offset + size <= end and offset < self.size:
            is_near = self._start <= offset <= end + _NEAR
            self._ahead = min(2 * self._ahead, _MOST_AHEAD) if is_near else _LEAST_AHEAD
            self._start, self._data = offset, self.file.read_at(offset, max(size, self._ahead))
        at = offset - self._start
        return self._data[at : at + size] if at >= 0 else b""

    def require_unchanged(self) -> None:
        """Raise OSError when the file is known to be another than was opened."""
        self.file.require_unchanged()


def open_ranged(
    url: str, *, patience: Patience | None = None, storage_options: Mapping[str, Any] | None = None
) -> RangedFile | None:
    """Open the file at a URL, to be read at places; None when its server gives whole files only.

    Parameters
    ----------
    url, patience, storage_options
        As `embedkit.sources.list_remote` takes them.

    Raises
    ------
    ImageError
        When there is none, or it cannot be read.
    MissingExtraError
        When fsspec is not installed, or aiohttp, which it needs for the web.

    Examples
    --------
    >>> import fsspec
    >>> from embedkit.sources.remote.ranges import open_ranged
    >>> fsspec.filesystem("memory").pipe_file("/photos.tar", b"0123456789")
    >>> open_ranged("memory://photos.tar").read_at(7, 100)
    b'789'
    >>> fsspec.filesystem("memory").rm("/photos.tar")
    """
    place, path = connect(url, patience or Patience(), storage_options)
    name = public_url(url)
    part = _ask(place, path, name, 0, 1)
    return None if part is None else RangedFile(place, path, name, part.size, part.version)


def _ask(place: Place, url: str, name: str, start: int, count: int) -> _Part | None:
    """Return a part of a file, or as much of it as the place gives at once; nothing when it gives whole files only."""
    return place.ask(
        name, lambda: _web_part(place.fs, url, start, count) if place.web else _part(place.fs, url, start, count)
    )


def _part(fs: Any, path: str, start: int, count: int) -> _Part | None:
    data = bytes(fs.cat_file(path, start=start, end=start + count))
    fs.invalidate_cache(path)
    info = fs.info(path)  # After the data, so that what was put in their place meanwhile is noticed.
    size = info.get("size")
    if size is None:
        return None
    if not data and start < size:
        raise ConnectionError("nothing came")
    return _Part(data, int(size), str(stamp_of(info) or ""))


def _web_part(fs: Any, url: str, start: int, count: int) -> _Part | None:
    from fsspec.asyn import sync

    part: _Part | None = sync(fs.loop, _requested, fs, url, start, count)
    return part


async def _requested(fs: Any, url: str, start: int, count: int) -> _Part | None:
    """Ask a web server for a part. fsspec gives the bytes of one alone, without what the server says about them."""
    headers = {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    options = fs.kwargs | {"headers": fs.kwargs.get("headers", {}) | headers}
    session = await fs.set_session()
    data = bytearray()
    async with session.get(fs.encode_url(url), **options) as answer:
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status != 416 or not found:  # Which is the answer for an empty file.
            answer.raise_for_status()
        # aiohttp unpacks what is encoded, and then a part has another length and place.
        if not found or answer.status == 200 or answer.headers.get("Content-Encoding", "identity") != "identity":
            return None
        if found[1] is not None:
            async for piece in answer.content.iter_chunked(_PIECE):
                data += piece
                if len(data) > count:
                    break
    size = int(found[3])
    if start < size and (not data or int(found[1] or -1) != start or len(data) != int(found[2]) - start + 1):
        raise ConnectionError("another part of the file came than was asked for")
    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")
    return _Part(bytes(data), size, version)
