"""Links: tables behind URLs, and tables whose images are.

A table may come from a stranger, and would have this machine ask whatever server it names, such as those that only it
reaches. So all images lie below one URL, which is the table's own folder or was named by whoever runs this.
"""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.images import Region
from embedkit.sources.failing import quoted
from embedkit.sources.remote.downloads import download
from embedkit.sources.remote.transfers import Patience, Place, connect, public_url
from embedkit.sources.remote.versions import stamp_of
from embedkit.sources.remote.webpages import WebFolder, path_within, web_folder
from embedkit.sources.tables.boxes import Box
from embedkit.sources.tables.roots import Look, plain, require_no_climb, row_status
from embedkit.sources.tables.rows import BadRowError

_ASKED_AT_ONCE = 16
_PORTS = {"http": 80, "https": 443}


class LinkedImage(NamedTuple):
    """An image, or a part of one, that a row of a manifest names and that lies somewhere else."""

    id: str
    path: str
    label: str | None
    box: Box | None
    look: Look
    root: UrlRoot

    def status(self) -> tuple[int, int]:
        """Return size, and a number that stands for the version; both as they were when the listing was made."""
        return row_status(self.look, self.id, self.path, self.box)

    def read(self) -> bytes | Region:
        """Download it."""
        root = self.root
        data = root.place.fetch(root.request(self.path), self.id, None, root.max_bytes)
        return data if self.box is None else Region(data, self.box)


@dataclass(frozen=True)
class UrlRoot:
    """A URL that images lie below; no other server is ever asked."""

    name: str
    place: Place = field(repr=False)
    folder: WebFolder | str = field(repr=False)
    max_bytes: int

    def relative(self, path: str) -> str:
        """Return a path relative to the URL, of a URL what it has below this one."""
        given = path
        if "://" in path:
            path = self._below(path)
        elif path.startswith("/"):
            raise BadRowError(f"{quoted(path)} is a path of a machine; write it relative to {self.name}", "refused")
        require_no_climb(path)
        return plain(path, given)

    def look(self, paths: Iterable[str]) -> npt.NDArray[np.int64]:
        """Return size and version of each file; where the place tells no version, the time stands for it."""
        paths, listed_ns = list(paths), time.time_ns()
        unique = list(dict.fromkeys(paths))
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            found = dict(zip(unique, pool.map(lambda path: self._look(path, listed_ns), unique), strict=True))
        return np.array([found[path] for path in paths], dtype=np.int64).reshape(-1, 2)

    def image(self, id: str, path: str, label: str | None, box: Box | None, look: Look | None) -> LinkedImage:
        """Make the image of a row."""
        return LinkedImage(id, path, label, box, look or (0, 0), self)

    def request(self, path: str) -> str:
        """Return what the place calls a file."""
        return self.folder.request(path) if isinstance(self.folder, WebFolder) else self.folder + path

    def _look(self, path: str, listed_ns: int) -> Look:
        try:
            info = self.place.fs.info(self.request(path))
        except Exception:  # What is wrong with an image is found when it is read.
            return 0, listed_ns
        return max(int(info.get("size") or 0), 0), stamp_of(info) or listed_ns

    def _below(self, url: str) -> str:
        """Return what a URL has below this one."""
        shown = quoted(public_url(url))
        outside = BadRowError(f"{shown} is not below {self.name}; name the URL that all are below: --root", "refused")
        if not isinstance(self.folder, WebFolder):
            if not url.startswith(self.name):
                raise outside
            return url[len(self.name) :]
        try:
            here, there = urlsplit(self.name), urlsplit(url)
            if _server(here) != _server(there):
                raise outside
        except ValueError as error:
            raise BadRowError(f"{shown} is no URL", "refused") from error
        if there.query or "@" in there.netloc:
            raise BadRowError(f"{shown} has a query or a user, which may be secrets and are not kept", "refused")
        path = path_within(self.folder, there.path)
        if path is None:
            raise outside
        return path


def open_root(url: str, max_bytes: int) -> UrlRoot:
    """Return the root at a URL.

    Raises
    ------
    ImageError
        When it names no server or bucket, or nothing that fsspec knows.
    """
    place, path = connect(url, Patience(), None)
    name = public_url(url).rstrip("/") + "/"
    if not name.partition("://")[2].strip("/"):
        raise ImageError(
            url, "names no place; the root of a manifest is a URL that all its images are below", "refused"
        )
    return UrlRoot(name, place, web_folder(url) if place.web else path.rstrip("/") + "/", max_bytes)


def folder_url(url: str) -> str:
    """Return the URL of the folder that a file lies in, with the query of the file's.

    Examples
    --------
    >>> from embedkit.sources.tables.links import folder_url
    >>> folder_url("https://host/a/images.csv?key=1")
    'https://host/a/?key=1'
    """
    path, sign, query = url.partition("?")
    return f"{path.rpartition('/')[0]}/{sign}{query}"


@contextmanager
def downloaded(url: str) -> Iterator[Path]:
    """Download a table for a while; failures of the file are told under its URL."""
    name = re.sub(r"[^\w.-]", "_", posixpath.basename(public_url(url)))[-100:]
    with tempfile.TemporaryDirectory(prefix="embedkit-") as folder:
        path = Path(folder, name)
        with open(path, "wb") as file:
            download(url, file)
        try:
            yield path
        except ImageError as error:
            if error.id != os.fspath(path):
                raise
            raise ImageError(public_url(url), error.reason, error.kind) from error


def _server(url: SplitResult) -> tuple[str, str | None, int | None]:
    return url.scheme, url.hostname, url.port or _PORTS.get(url.scheme)
