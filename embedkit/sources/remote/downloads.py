"""Whole files from URLs, downloaded into files."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from typing import Any, BinaryIO

from embedkit.errors import ImageError
from embedkit.sources.remote.transfers import Patience, Place, connect, public_url
from embedkit.sources.temporaries import LOOK_EVERY, MOST_UNKNOWN, require_room

_PIECE = 1 << 20

log = logging.getLogger("embedkit")


def download(
    url: str,
    file: BinaryIO,
    *,
    max_bytes: int | None = None,
    patience: Patience | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> int:
    """Download what is at a URL into a file that lies among the temporary ones.

    Parameters
    ----------
    url, patience, storage_options
        As `embedkit.sources.list_remote` takes them.
    file : binary file
        Empty; what a try that failed left in it is removed.
    max_bytes : int, optional
        The largest that is downloaded. By default what there is room for, and a gigabyte where the server does not say
        how much it will send.

    Returns
    -------
    int
        The number of bytes.

    Raises
    ------
    ImageError
        When it cannot be downloaded, is larger, or has no room.

    Examples
    --------
    >>> import fsspec, io
    >>> from embedkit.sources.remote.downloads import download
    >>> fsspec.filesystem("memory").pipe_file("/flowers.csv", b"path")
    >>> download("memory://flowers.csv", io.BytesIO())
    4
    >>> fsspec.filesystem("memory").rm("/flowers.csv")
    """
    place, path = connect(url, patience or Patience(), storage_options)
    name = public_url(url)
    log.info("downloading %s into %s", name, tempfile.gettempdir())

    def attempt() -> int:
        file.seek(0)
        file.truncate()
        kept = _Kept(file, name, max_bytes)
        return _from_web(place, path, kept) if place.web else _from_object(place, path, kept)

    size = place.ask(name, attempt)
    log.info("downloaded %s bytes of %s", f"{size:,}", name)
    return size


class _Kept:
    """What is kept of a download, within its limits."""

    def __init__(self, file: BinaryIO, name: str, max_bytes: int | None) -> None:
        self.file, self.name, self.max_bytes = file, name, max_bytes
        self.size, self.looked = 0, -LOOK_EVERY

    def expect(self, size: int | None) -> None:
        """Take note of how much there will be, if that is known."""
        if self.max_bytes is None:
            self.max_bytes = MOST_UNKNOWN if size is None else size
        if size is not None and size <= self.max_bytes:
            require_room(self.name, size, "download")
        elif size is not None:
            raise self._excess()

    def write(self, piece: bytes) -> None:
        """Write what comes next."""
        assert self.max_bytes is not None
        self.size += len(piece)
        if self.size > self.max_bytes:
            raise self._excess()
        if self.size - self.looked >= LOOK_EVERY:
            require_room(self.name, len(piece), "download")
            self.looked = self.size
        try:
            self.file.write(piece)
        except OSError as error:  # Of the disk, so that no further try helps.
            raise ImageError(self.name, f"cannot be downloaded: {error.strerror}", "unreadable") from error

    def _excess(self) -> ImageError:
        return ImageError(self.name, f"more than {self.max_bytes:,} bytes; download it yourself first", "too-large")


def _from_object(place: Place, path: str, kept: _Kept) -> int:
    with place.fs.open(path, "rb") as source:
        kept.expect(source.size if isinstance(getattr(source, "size", None), int) else place.fs.info(path).get("size"))
        while piece := source.read(_PIECE):
            kept.write(piece)
    return kept.size


def _from_web(place: Place, url: str, kept: _Kept) -> int:
    from fsspec.asyn import sync

    sync(place.fs.loop, _requested, place, url, kept)
    return kept.size


async def _requested(place: Place, url: str, kept: _Kept) -> None:
    """Ask a web server for a file, however long that takes as long as something comes."""
    import aiohttp

    fs, seconds = place.fs, place.patience.timeout
    options = fs.kwargs | {"headers": fs.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **{"timeout": timeout} | options) as answer:
        answer.raise_for_status()
        is_packed = answer.headers.get("Content-Encoding", "identity") != "identity"  # Which aiohttp unpacks.
        kept.expect(None if is_packed else answer.content_length)
        async for piece in answer.content.iter_chunked(_PIECE):
            kept.write(piece)
