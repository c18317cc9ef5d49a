"""Images in object stores and on web servers: whatever fsspec reaches by a URL."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.images import MAX_BYTES
from embedkit.sources.entries import (
    Entries,
    ImageFile,
    Listing,
    by_bytes,
    classes_of,
    first_folder,
    have_folders,
    require_inside,
)
from embedkit.sources.failing import harmless, is_encodable
from embedkit.sources.folders import SUFFIXES, is_called, list_folder
from embedkit.sources.remote.transfers import Patience, Place, connect, public_url, too_large
from embedkit.sources.remote.versions import stamp_of
from embedkit.sources.remote.webpages import IndexWalk, WebFolder, split_image_url, web_folder

_ASKED_AT_ONCE = 16
_BLOCK = 1 << 20


class RemoteImage(NamedTuple):
    """An image that lies somewhere else."""

    id: str
    label: str | None
    size: int
    stamp: int
    images: _RemoteImages

    def status(self) -> tuple[int, int]:
        """Return size, and a number that stands for the version; both as they were when the listing was made."""
        return self.size, self.stamp

    def read(self) -> bytes:
        """Download it."""
        return self.images.read(self)

    def __repr__(self) -> str:
        return f"RemoteImage(id={self.id!r})"


@dataclass(frozen=True, eq=False, repr=False)
class _RemoteImages(Entries):
    """Images of one place."""

    place: Place
    root: WebFolder | str
    ids: Sequence[str]
    sizes: npt.NDArray[np.int64]
    stamps: npt.NDArray[np.int64]
    shaped: bool
    max_bytes: int

    def __len__(self) -> int:
        return len(self.ids)

    def entry(self, number: int) -> RemoteImage:
        id = self.ids[number]
        label = first_folder(id) if self.shaped else None
        return RemoteImage(id, label, int(self.sizes[number]), int(self.stamps[number]), self)

    def read(self, image: RemoteImage) -> bytes:
        """Download an image."""
        if isinstance(self.root, WebFolder):
            return self.place.fetch(self.root.request(image.id), image.id, None, self.max_bytes)
        return self.place.fetch(self.root + image.id, image.id, image.size or None, self.max_bytes)


def list_remote(
    url: str,
    *,
    patience: Patience | None = None,
    max_bytes: int = MAX_BYTES,
    storage_options: Mapping[str, Any] | None = None,
) -> Listing:
    """List the images below a URL without downloading any.

    Names decide, as in a folder, and an image's class is the first folder below the URL. A web server has to give index
    pages; the URL of a single image is a listing of one. Images are downloaded when they are read, one in each of the
    threads that read: where the way is long, more `workers` hide it.

    Parameters
    ----------
    url : str
        Such as ``s3://bucket/photos``, ``hdfs://``, ``gs://``, ``hf://datasets/name``, ``https://host/photos/``.
    patience : Patience, optional
        How long a server is waited for, and how often it is asked.
    max_bytes : int
        The largest file that is downloaded.
    storage_options : mapping, optional
        What fsspec's filesystem is told, such as credentials. They are never kept.

    Returns
    -------
    Listing
        Sorted by the bytes of the ids. Its root is the URL without user, password and query.

    Raises
    ------
    ImageError
        When nothing can be listed there, or no image is there.
    MissingExtraError
        When fsspec is not installed, or aiohttp, which it needs for the web.

    Examples
    --------
    >>> import fsspec
    >>> from embedkit.sources.remote.listing import list_remote
    >>> fsspec.filesystem("memory").pipe_file("/photos/cat/1.jpg", b"...")
    >>> [(image.id, image.label) for image in list_remote("memory://photos").files]
    [('cat/1.jpg', 'cat')]
    >>> fsspec.filesystem("memory").rm("/photos", recursive=True)
    """
    place, path = connect(url, patience or Patience(), storage_options)
    name = public_url(url)
    if "file" in np.atleast_1d(place.fs.protocol):
        return _list_file(path, max_bytes) if os.path.isfile(path) else list_folder(path, max_bytes=max_bytes)
    failures: list[ImageError] = []
    if place.web:
        images, ignored = _list_web(place, url, failures, max_bytes)
    else:
        images, ignored = _list_objects(place, path, name, failures, max_bytes)
    if not images and not failures:
        raise ImageError(name, f"no images there ({ignored:,} other files)", "missing")
    classes = classes_of(map(first_folder, images.ids)) if images.shaped else []
    return Listing(name, images, classes, sorted(failures, key=by_bytes), ignored)


def _list_file(path: str, max_bytes: int) -> Listing:
    """List one file of this machine."""
    folder, name = os.path.split(path)
    return Listing(folder, [ImageFile(name, path, None, max_bytes)], [], [], 0)


def _list_web(place: Place, url: str, failures: list[ImageError], max_bytes: int) -> tuple[_RemoteImages, int]:
    """List a folder of a web server, or one image of it."""
    folder, name = split_image_url(url)
    if is_called(name, SUFFIXES):
        ids = [require_inside(name)]
        ignored = 0
    else:
        folder = web_folder(url)
        walk = IndexWalk(place, folder)
        ids, ignored = _chosen(walk.run(), failures)
        failures += walk.failures

    def look(id: str) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = place.fs.info(folder.request(id))
        except Exception:  # A server may answer GET only; what is wrong with the image is found when it is read.
            return {}
        return found

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        return _images(place, folder, zip(ids, pool.map(look, ids), strict=True), failures, max_bytes), ignored


def _list_objects(
    place: Place, path: str, name: str, failures: list[ImageError], max_bytes: int
) -> tuple[_RemoteImages, int]:
    """List what lies below a path, or one image."""
    found = place.ask(name, lambda: _find(place.fs, path))
    if not found:
        raise ImageError(name, "nothing is there", "missing")
    if list(found) == [path]:
        path = path.rpartition("/")[0]
    root = path.rstrip("/") + "/"
    infos = {file.removeprefix(root): info for file, info in found.items() if file.startswith(root)}
    ids, ignored = _chosen(infos, failures)
    images = _images(place, root, ((id, infos[id]) for id in ids), failures, max_bytes)
    return images, ignored + len(found) - len(infos)


def _find(fs: Any, path: str) -> dict[str, Mapping[str, Any]]:
    """Return what lies below a path, afresh."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    fs.invalidate_cache()
    # The general way leaves out a folder that cannot be listed, unless it is told not to; others have no such choice.
    general = getattr(type(fs), "_find", None) is AsyncFileSystem._find or type(fs).find is AbstractFileSystem.find
    found: dict[str, Mapping[str, Any]] = fs.find(path, detail=True, **({"on_error": "raise"} if general else {}))
    if not found and fs.isfile(path):
        found = {path: {}}
    return {path: fs.info(path)} if list(found) == [path] else found


def _chosen(names: Iterable[str], failures: list[ImageError]) -> tuple[list[str], int]:
    """Return the ids of images among some names, sorted by their bytes, and the number of the others.

    An object may be called whatever its place takes, such as ``../x.jpg``.
    """
    ids, ignored = [], 0
    for name in names:
        if not is_called(name, SUFFIXES):
            ignored += 1
            continue
        try:
            require_inside(name)
        except ImageError as error:
            failures.append(ImageError(harmless(name), error.reason, error.kind))
            continue
        if not is_encodable(name):
            failures.append(ImageError(harmless(name), "its name is no text", "refused"))
        elif name.startswith(".") or "/." in name:
            ignored += 1
        else:
            ids.append(name)
    return sorted(ids, key=os.fsencode), ignored


def _images(
    place: Place, root: WebFolder | str, found: Iterable[tuple[str, Mapping[str, Any]]], failures: list[ImageError],
    max_bytes: int,
) -> _RemoteImages:  # fmt: skip
    """Make the images of what was found; those over the limit are failures.

    Where nothing is said of a version, the time of the listing stands for it, which no other listing has: an update
    then reads the image, and keeps its row when its content is known.
    """
    listed_ns = time.time_ns()
    ids: list[str] = []
    sizes: list[int] = []
    stamps: list[int] = []
    for id, info in found:
        size = int(info.get("size") or 0)
        if size > max_bytes:
            failures.append(too_large(id, size, max_bytes))
            continue
        ids.append(id)
        sizes.append(max(size, 0))
        stamps.append(stamp_of(info) or listed_ns)
    return _RemoteImages(
        place,
        root,
        ids,
        np.array(sizes, dtype=np.int64),
        np.array(stamps, dtype=np.int64),
        have_folders(ids),
        max_bytes,
    )


def open_remote(
    url: str, *, patience: Patience | None = None, storage_options: Mapping[str, Any] | None = None
) -> BinaryIO:
    """Open the file at a URL, to be read and sought in without downloading it first.

    Parameters
    ----------
    url, patience, storage_options
        As `list_remote` takes them.

    Returns
    -------
    binary file
        Buffered by the mebibyte. Reading tries again as `patience` says, and raises ImageError in the end.

    Raises
    ------
    ImageError
        When it cannot be opened, or its server gives whole files only.
    MissingExtraError
        When fsspec is not installed, or aiohttp, which it needs for the web.

    Examples
    --------
    >>> import fsspec
    >>> from embedkit.sources.remote.listing import open_remote
    >>> fsspec.filesystem("memory").pipe_file("/photos.tar", b"0123456789")
    >>> with open_remote("memory://photos.tar") as file:
    ...     file.seek(7), file.read()
    (7, b'789')
    >>> fsspec.filesystem("memory").rm("/photos.tar")
    """
    place, path = connect(url, patience or Patience(), storage_options)
    name = public_url(url)
    file = place.ask(name, lambda: place.fs.open(path, "rb"))
    if file.size is None:  # A stream, whatever it says of seeking.
        file.close()
        raise ImageError(name, "its server gives whole files only; download it first", "unsupported")
    return cast(BinaryIO, io.BufferedReader(_Patient(file, place, name), _BLOCK))


class _Patient(io.RawIOBase):
    """A file whose reading is tried again."""

    def __init__(self, file: Any, place: Place, name: str) -> None:
        self.file, self.place = file, place
        self.name = name
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        if start + offset < 0:
            raise OSError(22, "a position before the start of the file")
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        data = self.place.ask(self.name, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        self.file.seek(self.position)
        return bytes(self.file.read(count))

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()
