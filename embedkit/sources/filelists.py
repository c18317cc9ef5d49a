"""Images that are named one by one: by the caller, or line by line in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from embedkit.errors import ImageError
from embedkit.images import MAX_BYTES
from embedkit.sources.entries import Entries, ImageFile, Listing, tell_apart
from embedkit.sources.failing import find_flaw, quoted

STANDARD_INPUT = "-"
_MAX_NAME_BYTES = 4096  # No system opens a longer path, and arrays of names are as wide as the longest.
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


def list_files(
    paths: Iterable[str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Listing:
    """List images that are named one by one, whatever they are called.

    Parameters
    ----------
    paths : iterable of path-like
        In any order.
    root : path-like, optional
        The folder that ids are relative to, and all paths lie below. By default the deepest folder that holds them all,
        so that ids are others when a path from elsewhere is added.
    max_bytes : int
        A larger file is a failure when it is read.

    Returns
    -------
    Listing
        Without classes. What no file can be called is a failure under its number.

    Raises
    ------
    ImageError
        When there is none, one is named twice, or one does not lie below the root.

    Examples
    --------
    >>> from embedkit.sources import list_files
    >>> listing = list_files(["/photos/cat/2.jpg", "/photos/1.jpg"])
    >>> listing.root.as_posix(), [file.id for file in listing.files]
    ('/photos', ['1.jpg', 'cat/2.jpg'])
    """
    good: list[str] = []
    failures: list[ImageError] = []
    for number, path in enumerate(os.fspath(path) for path in paths):
        flaw = find_flaw(path, "path")
        if flaw is None:
            good.append(path)
        else:
            failures.append(ImageError(f"{number:08}", flaw, "refused"))
    return _listed("the list of images", good, root, max_bytes, failures)


def list_named(
    source: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None, max_bytes: int = MAX_BYTES
) -> Listing:
    """List the images that a file names, one a line.

    Parameters
    ----------
    source : path-like
        The file; ``-`` is standard input. Names are paths, those that are relative below the working folder. They end
        with a newline, or with a NUL where there is one, as ``find -print0`` writes them. Empty lines are skipped.
    root : path-like, optional
        See `list_files`. It keeps the ids as they are when other images are named the next time.
    max_bytes : int
        A larger file is a failure when it is read.

    Returns
    -------
    Listing
        Without classes.

    Raises
    ------
    ImageError
        When the file cannot be read, is no list, names nothing, something twice, or what does not lie below the root.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from embedkit.sources import list_named
    >>> folder = tempfile.TemporaryDirectory()
    >>> names = pathlib.Path(folder.name) / "names.txt"
    >>> _ = names.write_text("/photos/cat/2.jpg" + chr(10) + "/photos/cat/1.jpg")
    >>> [file.id for file in list_named(names).files]
    ['1.jpg', '2.jpg']
    >>> [file.id for file in list_named(names, root="/photos").files]
    ['cat/1.jpg', 'cat/2.jpg']
    >>> folder.cleanup()
    """
    if os.fspath(source) == STANDARD_INPUT:
        return _listed("standard input", _names("standard input", sys.stdin.buffer), root, max_bytes)
    name = os.fspath(source)
    try:
        with open(source, "rb") as file:
            return _listed(name, _names(name, file), root, max_bytes)
    except OSError as error:
        raise unopened(name, error) from error


def unopened(name: str, error: OSError) -> ImageError:
    """Return the failure of a list or a manifest that the system does not read."""
    if isinstance(error, FileNotFoundError):
        return ImageError(name, "no such file", "missing")
    kind = "permission" if isinstance(error, PermissionError) else "unreadable"
    return ImageError(name, f"cannot be read: {error.strerror or error}", kind)


def _listed(
    name: str,
    names: Iterable[str],
    root: str | os.PathLike[str] | None,
    max_bytes: int,
    failures: Sequence[ImageError] = (),
) -> Listing:
    """Return the listing of some paths; they may be millions, so each is held once."""
    paths = [absolute(path) for path in names]
    if not paths and not failures:
        raise ImageError(name, "it is empty: it names no image", "empty")
    folder = _shared_folder(name, paths) if root is None else absolute(os.fspath(root))
    start = os.path.join(folder, "")
    for path in paths if root is not None else ():
        if not path.startswith(start):
            here = path.startswith(os.path.join(os.getcwd(), ""))
            where = "; relative names are below the working folder" if here else ""
            raise ImageError(name, f"it names {quoted(path)}, which is not below {quoted(folder)}{where}", "refused")
    for number, path in enumerate(paths):
        paths[number] = path[len(start) :] if os.sep == "/" else path[len(start) :].replace(os.sep, "/")
    ids = sorted(paths, key=sorting_key(paths))
    for left, right in pairwise(ids):
        if left == right:
            first, second = [number for number, id in enumerate(paths, 1) if id == left][:2]
            what = f"{quoted(os.path.join(folder, left))} is in the list twice, as names {first:,} and {second:,}"
            raise ImageError(name, what, "refused")
    files = _Files(folder, ids, max_bytes)
    return Listing(Path(folder), files, [], tell_apart(failures, files), 0)


def _shared_folder(name: str, paths: Sequence[str]) -> str:
    """Return the deepest folder that holds all of some paths."""
    if not paths:
        return os.getcwd()
    try:
        return os.path.commonpath([os.path.dirname(min(paths)), os.path.dirname(max(paths))])
    except ValueError as error:  # On Windows.
        raise ImageError(name, "its images lie on several drives; list each drive's on its own", "refused") from error


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
