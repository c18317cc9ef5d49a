"""Entry and Listing: what every source of images comes down to."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, overload

import numpy as np

from embedkit.errors import ImageError
from embedkit.images import MAX_BYTES, Data, Region, read_bytes

GONE = (0, -1)  # Size and time that no file has.


class Entry(Protocol):
    """An image to embed, wherever it is.

    Attributes
    ----------
    id : str
        Unique in its listing, and a relative path with ``/``.
    label : str or None
        The name of its class.
    """

    @property
    def id(self) -> str:
        """What it is called."""
        ...

    @property
    def label(self) -> str | None:
        """The name of its class."""
        ...

    def status(self) -> tuple[int, int]:
        """Return size in bytes and modification time in nanoseconds: cheap, and others when the content is another."""
        ...

    def read(self) -> Data:
        """Return what the pixels are made of, or raise ImageError; called from several threads at a time."""
        ...


class ImageFile(NamedTuple):
    """An image that is a file: its id, its path for the operating system, and its class where it has one."""

    id: str
    path: str
    label: str | None = None
    max_bytes: int = MAX_BYTES

    def status(self) -> tuple[int, int]:
        """Return size and modification time; of a file that is gone, what no file has."""
        return status_of(self.path)

    def read(self) -> bytes:
        """Return the bytes of the file."""
        return read_bytes(self.path, self.id, self.max_bytes)


class Renamed(NamedTuple):
    """An entry under another id."""

    id: str
    entry: Entry

    @property
    def label(self) -> str | None:
        """The class of the entry."""
        return self.entry.label

    def status(self) -> tuple[int, int]:
        """Return the status of the entry."""
        return self.entry.status()

    def read(self) -> Data:
        """Read the entry."""
        return self.entry.read()


class Entries(Sequence[Entry]):
    """Entries that are made as they are asked for, since there may be a hundred million.

    A kind of source says how many it has, and makes one of them.
    """

    def entry(self, number: int) -> Entry:
        """Make the entry of a number from 0 to the length."""
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> Entry: ...

    @overload
    def __getitem__(self, at: slice) -> list[Entry]: ...

    def __getitem__(self, at: int | slice) -> Entry | list[Entry]:
        if isinstance(at, slice):
            return [self.entry(number) for number in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"entry {at} of {len(self)}")
        return self.entry(at % len(self))


@dataclass(frozen=True)
class Listing:
    """The images that a source has.

    Attributes
    ----------
    root : Path
        What the source is called, and where its images are found again; a folder, an archive, a URL.
    files : sequence of Entry
        Sorted by the bytes of their ids, which are unique.
    classes : list of str
        Sorted by their bytes; empty when the source has no classes.
    failures : list of ImageError
        What is called like an image and cannot be one, sorted by the bytes of the ids.
    ignored : int
        What is not called like an image, or is hidden.
    sources : mapping of str to Path
        Of several sources in one, the root of each by the name that its ids begin with, as far as it has paths.
    has_paths : bool
        Whether the ids are where images are below the root. A table may call them otherwise.
    """

    root: Path | str
    files: Sequence[Entry]
    classes: list[str]
    failures: list[ImageError]
    ignored: int
    sources: Mapping[str, Path | str] = field(default_factory=dict)
    has_paths: bool = True

    def __repr__(self) -> str:
        counts = f"images={len(self.files)}, classes={len(self.classes)}, failures={len(self.failures)}"
        return f"Listing({os.fspath(self.root)!r}, {counts})"


def content_sha256(data: Data) -> bytes:
    """Return the SHA-256 of what an entry reads: of a file its bytes, so that copies are known by it.

    Examples
    --------
    >>> from embedkit.sources import content_sha256
    >>> content_sha256(b"").hex()[:8]
    'e3b0c442'
    """
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    if isinstance(data, Region):  # Two regions of one image are not copies of one another.
        return hashlib.sha256(content_sha256(data.data) + b"region" + repr(tuple(data.box)).encode()).digest()
    head = f"pixels {data.dtype.str} {data.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(data).tobytes()).digest()


def status_of(path: str) -> tuple[int, int]:
    """Return size and modification time in nanoseconds; of a file that is gone, what no file has."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # The latter of a path that no file can have.
        return GONE
    return status.st_size, status.st_mtime_ns


def by_bytes(entry: Entry | ImageError) -> bytes:
    """Return what entries are sorted by: the bytes of their ids."""
    return os.fsencode(entry.id)


def tell_apart(failures: Sequence[ImageError], images: Iterable[Entry]) -> list[ImageError]:
    """Return failures sorted by their ids, none of which is that of another one or of an image."""
    if not failures:
        return []
    taken = {image.id for image in images}
    found: list[ImageError] = []
    times: Counter[str] = Counter()
    for failure in failures:
        id = failure.id
        while id in taken:
            times[failure.id] += 1
            id = f"{failure.id}#{times[failure.id]}"
        taken.add(id)
        found.append(ImageError(id, failure.reason, failure.kind))
    return sorted(found, key=by_bytes)


def classes_of(labels: Iterable[str | None]) -> list[str]:
    """Return the class names among some labels, sorted by their bytes."""
    return sorted({label for label in labels if label is not None}, key=os.fsencode)


def first_folder(id: str) -> str:
    """Return the class of an image that lies in folders of classes."""
    return id.partition("/")[0]


def have_folders(ids: Sequence[str]) -> bool:
    """Return whether the first folders are classes: when no image lies outside of them."""
    return bool(ids) and all("/" in id for id in ids)


def inside(root: str | os.PathLike[str], id: str) -> Path:
    """Join an id from a stranger to a root, without ever leaving it.

    Raises
    ------
    ImageError
        When the id is absolute, climbs with ``..``, or holds a NUL.

    Examples
    --------
    >>> from embedkit.sources import inside
    >>> inside("/photos", "cat/1.jpg").as_posix()
    '/photos/cat/1.jpg'
    """
    return Path(root, *require_inside(id).split("/"))


def require_inside(id: str) -> str:
    """Return an id from a stranger, or raise when it points out of whatever root it is joined to."""
    if leaves_root(id):
        raise ImageError(id, "this id points out of its root", "refused")
    return id


def leaves_root(id: str) -> bool:
    """Return whether an id from a stranger points out of whatever root it is joined to."""
    return (
        not id
        or "\0" in id
        or ".." in id.split("/")
        or os.path.isabs(id)
        or (os.name == "nt" and ("\\" in id or ":" in id))
    )
