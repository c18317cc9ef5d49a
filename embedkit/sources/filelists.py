"""Images that are named one by one: by the caller, or line by line in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from embedkit.errors import ImageError
from embedkit.images import MAX_BYTES
from embedkit.sources.entries import Entries, ImageFile, Listing

STANDARD_INPUT = "-"
_MAX_NAME_BYTES = 1 << 16  # No system opens a path of more than 32 KiB: what is longer is not a list.
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class _Files(Entries):
    """Files by their paths below a folder."""

    root: str
    ids: list[str]
    max_bytes: int

    def __len__(self) -> int:
        return len(self.ids)

    def entry(self, number: int) -> ImageFile:
        id = self.ids[number]
        return ImageFile(id, os.path.join(self.root, id), None, self.max_bytes)


def list_files(paths: Iterable[str | os.PathLike[str]], *, max_bytes: int = MAX_BYTES) -> Listing:
    """List images that are named one by one, whatever they are called.

    Parameters
    ----------
    paths : iterable of path-like
        In any order.
    max_bytes : int
        A larger file is a failure when it is read.

    Returns
    -------
    Listing
        Below the deepest folder that holds them all, without classes.

    Raises
    ------
    ImageError
        When there is none, or one is named twice.

    Examples
    --------
    >>> from embedkit.sources import list_files
    >>> listing = list_files(["/photos/cat/2.jpg", "/photos/1.jpg"])
    >>> listing.root.as_posix(), [file.id for file in listing.files]
    ('/photos', ['1.jpg', 'cat/2.jpg'])
    """
    return _listed("the list of images", (os.fspath(path) for path in paths), max_bytes)


def list_named(source: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Listing:
    """List the images that a file names, one a line.

    Parameters
    ----------
    source : path-like
        The file; ``-`` is standard input. Names are paths, those that are relative below the working folder. They end
        with a newline, or with a NUL where there is one, as ``find -print0`` writes them. Empty lines are skipped.
    max_bytes : int
        A larger file is a failure when it is read.

    Returns
    -------
    Listing
        Below the deepest folder that holds them all, without classes.

    Raises
    ------
    ImageError
        When the file cannot be read, is no list, names nothing, or something twice.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from embedkit.sources import list_named
    >>> folder = tempfile.TemporaryDirectory()
    >>> names = pathlib.Path(folder.name) / "names.txt"
    >>> _ = names.write_text("/photos/cat/2.jpg" + chr(10) + "/photos/1.jpg")
    >>> [file.id for file in list_named(names).files]
    ['1.jpg', 'cat/2.jpg']
    >>> folder.cleanup()
    """
    if os.fspath(source) == STANDARD_INPUT:
        return _listed("standard input", _names("standard input", sys.stdin.buffer), max_bytes)
    name = os.fspath(source)
    try:
        with open(source, "rb") as file:
            return _listed(name, _names(name, file), max_bytes)
    except OSError as error:
        raise unopened(name, error) from error


def unopened(name: str, error: OSError) -> ImageError:
    """Return the failure of a list or a manifest that the system does not read."""
    if isinstance(error, FileNotFoundError):
        return ImageError(name, "no such file", "missing")
    kind = "permission" if isinstance(error, PermissionError) else "unreadable"
    return ImageError(name, f"cannot be read: {error.strerror or error}", kind)


def _listed(name: str, names: Iterable[str], max_bytes: int) -> Listing:
    """Return the listing of some paths; they may be millions, so each is held once."""
    ids = [absolute(path) for path in names]
    if not ids:
        raise ImageError(name, "it is empty: it names no image", "empty")
    folders = os.path.dirname(min(ids)), os.path.dirname(max(ids))
    try:
        root = os.path.commonpath(folders)
    except ValueError as error:  # On Windows.
        raise ImageError(name, "its images lie on several drives; list each drive's on its own", "refused") from error
    start = len(os.path.join(root, ""))
    for number, path in enumerate(ids):
        ids[number] = path[start:] if os.sep == "/" else path[start:].replace(os.sep, "/")
    ids.sort(key=sorting_key(ids))
    for left, right in pairwise(ids):
        if left == right:
            raise ImageError(os.path.join(root, left), "it is in the list twice", "refused")
    return Listing(Path(root), _Files(root, ids, max_bytes), [], [], 0)


def absolute(path: str) -> str:
    """Return an absolute path without detours."""
    path = os.path.abspath(path)
    # Python keeps two slashes at the beginning, which POSIX lets mean something; where they are used they are one.
    return path[1:] if os.sep == "/" and path.startswith("//") else path


def sorting_key(ids: Iterable[str]) -> Callable[[str], bytes] | None:
    """Return what to sort ids by so that they end up in the order of their bytes: most often nothing, and no copies."""
    try:
        for id in ids:
            id.encode()
    except UnicodeEncodeError:  # Bytes that are not UTF-8 stand elsewhere than the characters that stand for them.
        return os.fsencode
    return None


def _names(name: str, file: IO[bytes]) -> Iterator[str]:
    """Yield the names in a list, which may be of any length."""
    chunk = file.read(_CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf")
    if chunk[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ImageError(name, "its text is UTF-16; save it as UTF-8", "unsupported")
    end = b"\0" if b"\0" in chunk else b"\n"
    rest, line = b"", 0
    while chunk:
        *whole, rest = (rest + chunk).split(end)
        for text in whole:
            line += 1
            yield from _name(name, line, text, end)
        if len(rest) > _MAX_NAME_BYTES:
            raise _not_a_list(name, line + 1)
        chunk = file.read(_CHUNK_BYTES)
    yield from _name(name, line + 1, rest, end)


def _name(name: str, line: int, text: bytes, end: bytes) -> Iterator[str]:
    """Yield the name in a line, if there is one."""
    if end == b"\n":
        text = text.removesuffix(b"\r")
        if b"\0" in text:
            raise _not_a_list(name, line)
    if len(text) > _MAX_NAME_BYTES:
        raise _not_a_list(name, line)
    if text:
        yield os.fsdecode(text)


def _not_a_list(name: str, line: int) -> ImageError:
    return ImageError(name, f"line {line:,} is not the name of a file; a list has one on each line", "damaged")
