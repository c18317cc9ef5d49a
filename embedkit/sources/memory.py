"""Images that Python has: in lists, mappings and arrays, in datasets, and from iterators."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.images import Data
from embedkit.sources.entries import Entries, ImageFile, Listing, by_bytes, classes_of, tell_apart
from embedkit.sources.failing import find_flaw
from embedkit.sources.filelists import list_files
from embedkit.sources.items import (
    Item,
    data_of,
    dimensions,
    id_of,
    item_of,
    label_of,
    named_item,
    names_of,
    numbered,
    one_line,
)


class MemoryImage(NamedTuple):
    """An image that Python has.

    Nobody can tell without reading it whether it is the one of the last run, so its time is that of its listing: an
    update reads it, and keeps its row when its content is known.
    """

    id: str
    label: str | None
    number: int
    images: _Images
    listed_ns: int

    def status(self) -> tuple[int, int]:
        """Return the time of the listing, which no other listing has."""
        return 0, self.listed_ns

    def read(self) -> Data:
        """Return its pixels, or the bytes of a file."""
        return self.images.read(self.number, self.id)


class _Images(Protocol):
    def __len__(self) -> int: ...

    def read(self, number: int, id: str) -> Data: ...


@dataclass(frozen=True)
class _Listed(Entries):
    """Images by the order of their ids."""

    images: _Images
    ids: Sequence[str] | None  # None where they are numbers.
    labels: Sequence[str | None] | None
    numbers: npt.NDArray[np.int64]
    listed_ns: int

    def __len__(self) -> int:
        return len(self.numbers)

    def entry(self, at: int) -> MemoryImage:
        number = int(self.numbers[at])
        id = numbered(number) if self.ids is None else self.ids[number]
        return MemoryImage(id, self.labels[number] if self.labels else None, number, self.images, self.listed_ns)


def list_memory(images: Any, *, name: str | None = None) -> Listing:
    """List images that Python has.

    Parameters
    ----------
    images : sequence, mapping, dataset, iterable or DataLoader without batches
        Of paths, which are listed as files are; or of images: PIL images, arrays of shape (h, w) or (h, w, c), torch
        tensors of shape (c, h, w), (h, w) or (h, w, c), the bytes of files, `pathlib.Path`. Pixels are uint8, uint16
        or floats in [0, 1]: a dataset must not normalise them.

        An item may also be a tuple or a list. One that begins with a str is ``(id, image)`` or ``(id, image, label)``;
        any other is ``(image, label)``, as datasets have it, and what follows is left out. Or it is a dict with
        "image", and perhaps "id" and "label". Of a mapping the keys are the ids, and the values are items.

        A map-style dataset has ``len()`` and is indexed by one thread at a time. The files of torchvision's
        ``ImageFolder`` and of its subsets are read themselves, without the dataset's transforms. Labels come from
        ``targets`` where a dataset has them; otherwise, if its first item has a label, all items are loaded once more.
        From a dataset that transforms at random, every update is computed anew.

        An iterator is read to its end before anything is computed, into a file without a name in the folder for
        temporary files: pixels as they are, or bytes.
    name : str, optional
        What the listing is called; by default after the type of `images`.

    Returns
    -------
    Listing
        Ids are str; an int, and by default an image's number, becomes one of eight digits, ``00000012``. A label is a
        str, or an int that stands for an entry of the dataset's ``classes`` or else for itself, with zeros before it
        so that classes are sorted like numbers. -1, None and anything else is no label. An image that cannot be read
        is a failure, on listing where it comes from an iterator and on reading elsewhere.

    Raises
    ------
    ImageError
        When there is nothing in it, two ids are the same, it is one image or has batches of them, or an iterator
        raises an exception.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.sources.memory import list_memory
    >>> black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    >>> [(image.id, image.label) for image in list_memory([(black, "night"), (white, "snow")]).files]
    [('00000000', 'night'), ('00000001', 'snow')]
    >>> [image.id for image in list_memory({"snow.png": white, "night.png": black}).files]
    ['night.png', 'snow.png']
    """
    name = name or type(images).__name__
    if isinstance(images, str | bytes | os.PathLike) or dimensions(images) in (2, 3) or hasattr(images, "getexif"):
        raise ImageError(name, "one image, where several were expected; put it into a list", "not-an-image")
    if isinstance(images, Mapping):
        images = [named_item(key, value) for key, value in images.items()]
    files = _files_of(images, name)
    if files is not None:
        return files
    if not _is_indexed(images):
        return _list_iterator(iter(images), getattr(images, "classes", None), name)
    if not len(images):
        raise ImageError(name, "it is empty", "empty")
    if isinstance(images, list | tuple) and isinstance(images[0], str | os.PathLike):
        return list_files(_paths(images, name))
    ids, labels, failures = _described(images)
    return _listing(name, _Held(images), ids, names_of(labels, getattr(_whole(images)[0], "classes", None)), failures)


def _is_indexed(images: Any) -> bool:
    """Return whether images are got by their numbers; torch's IterableDataset only looks as if they were."""
    torch = sys.modules.get("torch.utils.data")
    if torch is not None and isinstance(images, torch.IterableDataset):
        return False
    return hasattr(images, "__len__") and hasattr(images, "__getitem__")


class _Held:
    """Images that are got by their numbers."""

    def __init__(self, images: Any) -> None:
        self._images = images
        self._lock = threading.Lock()  # A dataset may have one open file for all of its images.
        pictures = [_tried(images, at).image for at in range(len(images))] if isinstance(images, list | tuple) else []
        self._has_copies = len(set(map(id, pictures))) < len(pictures)

    def __len__(self) -> int:
        return len(self._images)

    def __reduce__(self) -> NoReturn:
        raise TypeError("they are in the memory of this process; save them as files, and name their folder")

    def read(self, number: int, id: str) -> Data:
        with self._lock:
            try:
                image = item_of(self._images[number], id).image
                if self._has_copies:
                    return data_of(image, id)  # Two threads would share its file, and what is known of it.
            except ImageError:
                raise
            except Exception as error:
                raise ImageError(id, one_line(error), "unreadable") from error
        return data_of(image, id)


class _Spool:
    """Images in a file without a name."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="embedkit-")  # noqa: SIM115 -- it lives as long as the listing
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        self._offsets, self._shapes = array("q", [0]), array("q")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __reduce__(self) -> NoReturn:
        raise TypeError("they come from an iterator, which can be read once; save them as files, and name their folder")

    def add(self, data: Data) -> None:
        """Write one more."""
        if isinstance(data, bytes):
            self._file.write(data)
            size, shape = len(data), (0, 0)
        else:
            pixels = np.ascontiguousarray(data)
            self._file.write(pixels.data)
            size, shape = pixels.nbytes, pixels.shape[:2]
        self._offsets.append(self._offsets[-1] + size)
        self._shapes.extend(shape)

    def read(self, number: int, id: str) -> Data:
        start, end = self._offsets[number : number + 2]
        with self._lock:
            try:
                self._file.seek(start)
                data = self._file.read(end - start)
            except OSError as error:
                raise ImageError(id, error.strerror or str(error), "unreadable") from error
        height, width = self._shapes[2 * number : 2 * number + 2]
        return np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3) if height else data


def _list_iterator(items: Iterator[Any], classes: Sequence[str] | None, name: str) -> Listing:
    """Read an iterator to its end and list what it had."""
    items = _going_on(items, name)
    first = next(items, None)
    if first is None:
        raise ImageError(name, "it is empty", "empty")
    items = chain([first], items)
    if isinstance(first[1], str | os.PathLike):
        return list_files(_paths((value for _, value in items), name))
    spool = _Spool()
    failures: list[ImageError] = []
    ids: list[Any] = []
    labels: list[Any] = []
    for number, value in items:
        id = numbered(number)
        try:
            item = _single(value, id, name)
            id = id_of(item.id, number)
            spool.add(data_of(item.image, id))
        except ImageError as error:
            if error.id == name:
                raise
            failures.append(error)
        except OSError as error:
            reason = f"it does not fit into {tempfile.gettempdir()}: {error.strerror}"
            raise ImageError(name, reason, "unreadable") from error
        else:
            ids.append(id)
            labels.append(item.label)
    return _listing(name, spool, ids, names_of(labels, classes), failures)


def _going_on(items: Iterator[Any], name: str) -> Iterator[tuple[int, Any]]:
    """Yield the items of an iterator with their numbers, and say how far it came when it fails."""
    number = 0
    while True:
        try:
            value = next(items)
        except StopIteration:
            return
        except Exception as error:
            raise ImageError(name, f"it ends after {number:,} images with {one_line(error)}", "unreadable") from error
        yield number, value
        number += 1


def _single(value: Any, id: str, name: str) -> Item:
    """Return what an item says, unless it is a batch of them."""
    item = item_of(value, id)
    if dimensions(item.image) == 4 or isinstance(item.image, list | tuple):
        reason = "it has batches of images; pass the dataset itself instead, or a DataLoader with batch_size=None"
        raise ImageError(name, reason, "not-an-image")
    return item


def _paths(values: Iterable[Any], name: str) -> Iterator[str | os.PathLike[str]]:
    for value in values:
        if not isinstance(value, str | os.PathLike):
            raise ImageError(name, f"it begins with paths, and then has a {type(value).__name__}", "not-an-image")
        yield value


def _described(images: Any) -> tuple[list[str] | None, list[Any] | None, list[ImageError]]:
    """Return the ids of images, empty where one is refused, and their labels, each None where there are none."""
    if dimensions(images):
        return None, None, []
    if not isinstance(images, list | tuple):
        first, targets = _tried(images, 0), _targets(images)
        if first.id is None and (targets is not None or label_of(first.label) is None):
            return None, targets, []
    ids: list[str] = []
    labels: list[Any] = []
    failures: list[ImageError] = []
    for number in range(len(images)):
        item = _tried(images, number)
        try:
            ids.append(id_of(item.id, number))
        except ImageError as error:
            failures.append(error)
            ids.append("")
        labels.append(item.label)
    return ids, labels, failures


def _tried(images: Any, number: int) -> Item:
    """Return an item; nothing where it fails, for it fails again when it is read."""
    try:
        return item_of(images[number], "")
    except Exception:
        return Item(None, None, None)


def _whole(images: Any) -> tuple[Any, Sequence[int] | None]:
    """Return the dataset that a subset is of, and its numbers in there."""
    torch, numbers = sys.modules.get("torch.utils.data"), None
    while torch is not None and isinstance(images, torch.Subset):
        numbers = images.indices if numbers is None else [images.indices[number] for number in numbers]
        images = images.dataset
    return images, numbers


def _targets(images: Any) -> list[Any] | None:
    whole, numbers = _whole(images)
    targets = getattr(whole, "targets", None)
    if targets is None or not hasattr(targets, "__len__") or len(targets) != len(whole):
        return None
    return [targets[number] for number in (range(len(targets)) if numbers is None else numbers)]


def _files_of(images: Any, name: str) -> Listing | None:
    """List the files of torchvision's ImageFolder or of a subset of one; None of anything else."""
    folder, numbers = _whole(images)
    samples, root, loader = (getattr(folder, name, None) for name in ("samples", "root", "loader"))
    if not samples or root is None or not getattr(loader, "__module__", "").startswith("torchvision."):
        return None
    files = [
        ImageFile(Path(os.path.relpath(path, root)).as_posix(), os.path.abspath(path), folder.classes[target])
        for path, target in (samples if numbers is None else (samples[number] for number in numbers))
    ]
    if any(file.id.startswith("..") for file in files):
        return None
    files.sort(key=by_bytes)
    _require_unique([file.id for file in files])
    return Listing(Path(root), files, classes_of(file.label for file in files), [], 0)


def _listing(
    name: str,
    images: _Images,
    ids: Sequence[str] | None,
    labels: Sequence[str | None] | None,
    failures: list[ImageError],
) -> Listing:
    """Sort images by their ids, without those that have none, or a label that no class can have."""
    flaws = {label: flaw for label in set(labels or ()) if label is not None and (flaw := find_flaw(label, "class"))}
    named = range(len(images)) if ids is None else [number for number, id in enumerate(ids) if id]
    if labels is not None and flaws:
        bad = [number for number in named if labels[number] in flaws]
        failures += [
            ImageError(numbered(number) if ids is None else ids[number], flaws[labels[number] or ""], "refused")
            for number in bad
        ]
        named = sorted(set(named).difference(bad))
    if ids is not None:
        named = sorted(named, key=lambda number: os.fsencode(ids[number]))
        _require_unique([ids[number] for number in named])
    files = _Listed(images, ids, labels, np.array(named, dtype=np.int64), time.time_ns())
    classes = classes_of(label for label in set(labels or ()) if label not in flaws)
    return Listing(name, files, classes, tell_apart(failures, files), 0)


def _require_unique(ids: Sequence[str]) -> None:
    """Raise when two ids, which are sorted, are the same."""
    for left, right in pairwise(ids):
        if left == right:
            raise ImageError(left, "two images have this id", "refused")
