"""Roots: where the images of a table lie, below which every path of it stays."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.images import MAX_BYTES, Region, read_bytes
from embedkit.sources.entries import GONE, Entry, require_inside, status_of
from embedkit.sources.failing import MAX_TEXT_BYTES, find_flaw, quoted
from embedkit.sources.filelists import absolute
from embedkit.sources.tables.boxes import Box, fragment
from embedkit.sources.tables.rows import BadRowError

# What is not a plain path below a root, character by character; one search settles the usual case.
_ODD = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|[\0\\:]|[^\x00-\x7f]")

Look = tuple[int, int]


class Root(Protocol):
    """Where the images of a table lie.

    Attributes
    ----------
    name : Path or str
        What a listing calls it.
    """

    @property
    def name(self) -> Path | str:
        """What a listing calls it."""
        ...

    def relative(self, path: str) -> str:
        """Return a path relative to the root, without detours, or raise BadRowError."""
        ...

    def look(self, paths: Iterable[str]) -> npt.NDArray[np.int64] | None:
        """Return the status of each file, where it is not cheap to look later."""
        ...

    def image(self, id: str, path: str, label: str | None, box: Box | None, look: Look | None) -> Entry:
        """Make the image of a row."""
        ...


class ListedImage(NamedTuple):
    """An image, or a part of one, that a row of a manifest names."""

    id: str
    path: str
    named: str  # The path below the root.
    label: str | None = None
    box: Box | None = None
    within: str | None = None  # Where links must not lead out of.
    max_bytes: int = MAX_BYTES

    def status(self) -> tuple[int, int]:
        """Return what stands for the content; of a file that is gone, what no file has."""
        return row_status(status_of(self.path), self.id, self.named, self.box)

    def read(self) -> bytes | Region:
        """Return the bytes of the file, and the box if there is one."""
        path = self.path
        if self.within is not None:
            path = os.path.realpath(path)
            if not path.startswith(self.within):
                reason = f"a symbolic link out of the folder, to {path}; --follow-links follows it"
                raise ImageError(self.id, reason, "refused")
        try:
            data = read_bytes(path, self.id, self.max_bytes)
        except ImageError as error:
            if error.kind == "missing" and os.sep == "/" and "\\" in path:
                raise ImageError(self.id, "the file is missing; here folders end with /, not \\", "missing") from error
            raise
        return data if self.box is None else Region(data, self.box)


class FolderRoot:
    """A folder of this machine."""

    def __init__(self, folder: Path, follow_links: bool, max_bytes: int) -> None:
        self.name = folder
        self._folder = os.fspath(folder)
        self._max_bytes = max_bytes
        real = os.path.join(os.path.realpath(folder), "")
        self._within = None if follow_links else real
        self._roots = {os.path.join(os.path.abspath(folder), ""), real}

    def relative(self, path: str) -> str:
        """Return a path relative to the folder, without detours."""
        if not _ODD.search(path) and len(path) <= MAX_TEXT_BYTES:
            return path
        given, path = path, path.replace("\\", "/") if os.name == "nt" else path
        if "://" in path:
            reason = f"{quoted(given)} is a URL; name the one that all images are below: --root https://host/photos/"
            raise BadRowError(reason, "refused")
        require_no_climb(path)
        if os.path.isabs(path):
            path = absolute(path)
            root = next((root for root in self._roots if path.startswith(root)), None)
            if root is None:
                raise BadRowError(
                    f"{quoted(given)} is not below {self.name}; name the folder that it is below: --root", "refused"
                )
            path = path[len(root) :].replace(os.sep, "/")
        return plain(path, given)

    def look(self, paths: Iterable[str]) -> None:
        """Return nothing: to look at a file is cheap."""

    def image(self, id: str, path: str, label: str | None, box: Box | None, look: Look | None) -> ListedImage:
        """Make the image of a row."""
        return ListedImage(id, os.path.join(self._folder, path), path, label, box, self._within, self._max_bytes)


def row_status(status: Look, id: str, path: str, box: Box | None) -> Look:
    """Return the status of what a row names, from that of the file.

    Under an id that is not the path, another file or box is another image, be it as large and as old as the one before.
    """
    if status == GONE:
        return status
    size, time_ns = status
    part = "" if box is None else fragment(box)
    if id != path + part:
        named = hashlib.sha256(os.fsencode(path + part)).digest()
        return size, time_ns ^ (int.from_bytes(named[:8], "big") >> 1)
    return size, time_ns ^ zlib.crc32(part.encode())


def require_no_climb(path: str) -> None:
    """Raise for a path that climbs out of folders."""
    if ".." in path.split("/"):
        raise BadRowError(
            f"{quoted(path)} climbs with ..; write it relative to one folder, and name that: --root", "refused"
        )


def plain(path: str, given: str) -> str:
    """Return a relative path without detours."""
    path = posixpath.normpath(path)
    if path == ".":
        raise BadRowError(f"{quoted(given)} is a folder, not an image", "not-an-image")
    return checked_id(path)


def checked_id(id: str | None) -> str:
    """Return an id that a store can hold and that leads nowhere else."""
    if id is None:
        raise BadRowError("it has no id", "missing")
    check_text(id, "name")
    try:
        return require_inside(id)
    except ImageError as error:
        raise BadRowError(f"{quoted(id)}: {error.reason}", error.kind) from error


def check_text(text: str, what: str) -> None:
    """Make sure that a store can hold a text."""
    if flaw := find_flaw(text, what):
        raise BadRowError(flaw, "refused")
