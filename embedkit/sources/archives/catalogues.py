"""Catalogue: the images of an archive in columns, since there may be millions of them."""

from __future__ import annotations

import itertools
import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Container, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.sources.archives.members import Member, Place
from embedkit.sources.entries import by_bytes, classes_of, first_folder, have_folders, require_inside
from embedkit.sources.failing import harmless, quoted
from embedkit.sources.folders import SUFFIXES, is_called

MAX_LABEL_BYTES = 1024
_MOST_NAME = 4096  # The longest path that systems take.
_MOST_HOPS = 40
_FEW = 16  # A time that one in so many images has, or more, was not theirs.
_TYPES = {"packed": "b", "crc": "Q"}
_NOWHERE = Place(0, 0, 0, 0)


class Columns(NamedTuple):
    """Images sorted by the bytes of their ids, a column for each thing that is known about them.

    `labels` are numbers of `texts`, or -1, where the archive has a label beside each image.
    """

    ids: list[str]
    places: dict[str, npt.NDArray[np.int64]]
    texts: list[str]
    labels: npt.NDArray[np.int32] | None

    def place(self, number: int) -> Place:
        """Return where an image lies."""
        offset, stored, size, time_ns, packed, crc = (int(column[number]) for column in self.places.values())
        return Place(offset, stored, size, time_ns, bool(packed), crc)

    def label(self, number: int, shaped: bool) -> str | None:
        """Return the label of an image: what lies beside it, or else its first folder if the folders are classes."""
        if self.labels is None:
            return first_folder(self.ids[number]) if shaped else None
        code = int(self.labels[number])
        return self.texts[code] if code >= 0 else None

    def stamped(self, stamp: int) -> Columns:
        """Return the columns with a number that stands for the whole archive in the times that tell nothing.

        Archives that are to be the same whoever makes them have no times, or one for all members that are younger. The
        latest time is no proof either, for more may have been written in the same second.
        """
        times = self.places["time_ns"]
        if not len(times):
            return self
        seconds, below = times // 10**9, times % 10**9
        _, which, counts = np.unique(seconds, return_inverse=True, return_counts=True)
        sharing = counts[which]
        tells_nothing = (seconds <= 0) | (seconds == seconds.max()) | ((sharing > 1) & (sharing * _FEW >= len(times)))
        below = np.where(tells_nothing, (below + stamp % 10**9) % 10**9, below)
        return self._replace(places=self.places | {"time_ns": seconds * 10**9 + below})

    def classes(self) -> list[str]:
        """Return the classes that images have."""
        if self.labels is None:
            return classes_of(map(first_folder, self.ids)) if have_folders(self.ids) else []
        return classes_of(self.texts[code] for code in np.unique(self.labels[self.labels >= 0]).tolist())


class Catalogue:
    """What an archive holds, taken in member by member.

    Parameters
    ----------
    name : str
        What failures of the archive itself are called.
    read : callable
        Returns the bytes of a small member.
    most_bytes : int
        What an image may have.

    Attributes
    ----------
    failures : list of ImageError
        What is called like an image and cannot be one, and what is wrong with the archive; filled by `columns`.
    ignored : int
        Members that are not called like images, or are hidden.
    """

    def __init__(self, name: str, read: Callable[[Place, str], bytes], most_bytes: int) -> None:
        self.name, self.read, self.most_bytes = name, read, most_bytes
        self.failures: list[ImageError] = []
        self.ignored = 0
        self._names: list[bytes] = []
        self._columns = {name: array(_TYPES.get(name, "q")) for name in Place._fields}
        self._faults: dict[int, tuple[str, str]] = {}
        self._folders: dict[int, None] = {}
        self._links: dict[int, tuple[bytes, int]] = {}
        self._taken = 0
        self._targets: set[bytes] = set()
        self._refused: dict[str, tuple[str, str]] = {}
        self._labels: dict[bytes, int] = {}
        self._texts: dict[str, int] = {}
        self._unlabelled: dict[str, tuple[str, str]] = {}
        self._own: list[tuple[str, str]] = []

    @property
    def has_images(self) -> bool:
        """Whether anything was called like an image."""
        return bool(self._names or self._refused)

    def take(self, member: Member) -> None:
        """Take in the next member."""
        self._taken += 1
        if not member.name:
            self._own.append((member.reason or "a member without a name", member.kind or "damaged"))
            return
        if len(member.name) > _MOST_NAME:
            self._take_endless(member)
            return
        name = plain(member.name)
        id = _decoded(name)
        if 0 < len(member.target) <= _MOST_NAME:
            self._targets.add(plain(member.target))
        if not is_called(id, SUFFIXES):
            if not member.folder:
                self.ignored += 1
                if id.endswith(".cls") and member.place and not _is_hidden(name):
                    self._take_label(name, id, member.place)
            return
        try:
            require_inside(id)
        except ImageError as error:
            self._refused[harmless(id)] = "its name points out of the archive", error.kind
            return
        if _is_hidden(name):
            self.ignored += not member.folder
        else:
            self._take_image(name, member)

    def resolve(self, members: Iterator[Member]) -> None:
        """Find what hard links stand for, going through the members a second time; only their targets are kept."""
        if not self._links:
            return
        found: dict[bytes, _Namesakes] = {}
        links = 0
        for position, member in enumerate(members, 1):
            links += bool(member.target)
            if 0 < len(member.name) <= _MOST_NAME and (name := plain(member.name)) in self._targets:
                # One byte more than a name has is as wrong as a million.
                kept = member._replace(target=member.target[: _MOST_NAME + 1])
                found.setdefault(name, _Namesakes()).add(position, kept, links)
        for row, (target, position) in self._links.items():
            if file := _resolved(found, target, position):
                self._resolve(row, file)
            else:
                link = quoted(_decoded(target))
                self._faults[row] = (f"a hard link to {link}, which the archive does not have", "missing")

    def columns(self) -> Columns:
        """Return the images, and make the failures known; what was taken in is given up meanwhile, to save memory."""
        names = self._names
        order = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
        order = order[self._are_last(order)]
        bad = np.isin(order, [*self._faults])
        faults = [(_decoded(names[row]), row) for row in order[bad].tolist()]
        rows = order[~bad]
        labels = self._codes(rows)
        ids: list[str] = []
        for row in rows:
            ids.append(_decoded(names[row]))
            names[row] = b""
        self._fail(faults, ids)
        places = {name: np.array(self._columns.pop(name))[rows] for name in Place._fields}
        return Columns(ids, places, list(self._texts), labels)

    def _take_endless(self, member: Member) -> None:
        """Take in a member with a name that no system takes; nothing that long is kept."""
        if is_called(_decoded(member.name[-_MOST_NAME:]), SUFFIXES):
            reason = f"a name of {len(member.name):,} bytes; at most {_MOST_NAME:,} are taken"
            self._refused[harmless(_decoded(member.name[:_MOST_NAME]))] = reason, "refused"
        else:
            self.ignored += not member.folder

    def _take_image(self, name: bytes, member: Member) -> None:
        if member.folder:
            self._folders[len(self._names)] = None
            self._row(name, _NOWHERE, ("a folder, not an image", "not-an-image"))
            return
        if len(member.target) > _MOST_NAME:
            reason = f"a hard link to a name of {len(member.target):,} bytes; at most {_MOST_NAME:,} are taken"
            self._row(name, _NOWHERE, (reason, "refused"))
        elif member.target:
            self._links[len(self._names)] = plain(member.target), self._taken
            self._row(name, _NOWHERE)
        else:
            self._row(name, member.place or _NOWHERE, self._fault(member))

    def _fault(self, member: Member) -> tuple[str, str] | None:
        place = member.place
        if place is None:
            return (member.reason, member.kind) if member.reason else ("a hard link to a folder", "refused")
        if place.size == 0:
            return "the file is empty", "empty"
        if place.size > self.most_bytes:
            return f"{place.size:,} bytes; at most {self.most_bytes:,} are read", "too-large"
        return None

    def _row(self, name: bytes, place: Place, fault: tuple[str, str] | None = None) -> None:
        if fault:
            self._faults[len(self._names)] = fault
            place = _NOWHERE  # What it says may be more than a column holds.
        self._names.append(name)
        for column, value in zip(self._columns.values(), place, strict=True):
            column.append(value)

    def _resolve(self, row: int, file: Member) -> None:
        if fault := self._fault(file):
            self._faults[row] = fault
            return
        assert file.place is not None
        for column, value in zip(self._columns.values(), file.place, strict=True):
            column[row] = value

    def _take_label(self, name: bytes, id: str, place: Place) -> None:
        """Take the text of a ``.cls`` member, the label of the images of the same sample."""
        fault, text = None, ""
        if place.size > MAX_LABEL_BYTES:
            fault = (f"a label of {place.size:,} bytes; at most {MAX_LABEL_BYTES:,} are read", "too-large")
        else:
            try:
                text = self.read(place, id).decode().strip()
            except UnicodeDecodeError:
                fault = ("a label that is not UTF-8", "damaged")
            except ImageError as error:
                fault = (error.reason, error.kind)
        if not fault and not text:
            fault = ("a label without a text", "damaged")
        if not fault and "\0" in text:
            fault = (f"a label has no NUL: {quoted(text)}", "refused")
        # The last of several with one name counts, as in unpacking.
        self._labels[name] = -1 if fault else self._texts.setdefault(text, len(self._texts))
        self._unlabelled.pop(harmless(id), None)
        if fault:
            self._unlabelled[harmless(id)] = fault

    def _are_last(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which rows have a name that does not come again in the archive: the last wins, as in unpacking."""
        names = self._names
        last = np.ones(len(order), dtype=bool)
        for at, (row, after) in enumerate(itertools.pairwise(order)):
            last[at] = names[row] != names[after]
        return last

    def _codes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32] | None:
        """Return the labels of rows, None where the archive has no label; of several in a sample the first counts."""
        samples: dict[bytes, int] = {}
        for name in sorted(self._labels):
            samples.setdefault(_sample(name), self._labels[name])
        if max(samples.values(), default=-1) < 0:
            return None
        return np.array([samples.get(_sample(self._names[row]), -1) for row in rows.tolist()], dtype=np.int32)

    def _fail(self, faults: list[tuple[str, int]], ids: list[str]) -> None:
        found = {id: self._faults[row] for id, row in faults if row not in self._folders or not _holds(ids, id)}
        for others in (self._refused, self._unlabelled):
            for id, fault in others.items():
                found[_free(id, ids, found)] = fault
        if self._own:
            reason, kind = self._own[0]
            more = f" (and {len(self._own) - 1:,} more such places)" if len(self._own) > 1 else ""
            found[_free(self.name, ids, found)] = reason + more, kind
        self.failures += [ImageError(id, *fault) for id, fault in found.items()]
        self.failures.sort(key=by_bytes)


class _Namesakes:
    """The members of one name that links may stand for, in their order."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.members: list[Member] = []
        self._links = 0

    def add(self, position: int, member: Member, links: int) -> None:
        """Add the next one, after so many links, itself among them."""
        if self.positions and links == self._links:  # No link came between the two, so none stands for the first.
            self.positions.pop()
            self.members.pop()
        self.positions.append(position)
        self.members.append(member)
        self._links = links

    def before(self, position: int) -> tuple[int, Member]:
        """Return the last one before a position, as in unpacking, or else the last of all."""
        at = bisect_left(self.positions, position) - 1
        return self.positions[at], self.members[at]


def plain(name: bytes) -> bytes:
    """Return a name without ``.`` and doubled slashes, which mean nothing."""
    if b"./" not in name and b"//" not in name:
        return name
    start = b"/" if name.startswith(b"/") else b""
    return start + b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _is_hidden(name: bytes) -> bool:
    return name.startswith((b".", b"__MACOSX/")) or b"/." in name


def _sample(name: bytes) -> bytes:
    """Return what the members of a sample have in common: the name up to the first dot that follows the folders."""
    dot = name.find(b".", name.rfind(b"/") + 1)
    return name[:dot]


def _holds(ids: list[str], folder: str) -> bool:
    """Return whether one of some ids, sorted by their bytes, lies in a folder."""
    at = bisect_left(ids, os.fsencode(folder + "/"), key=os.fsencode)
    return at < len(ids) and ids[at].startswith(folder + "/")


def _free(id: str, ids: list[str], failures: Container[str]) -> str:
    """Return an id for a failure that neither an image has, nor another failure."""
    while True:
        at = bisect_left(ids, os.fsencode(id), key=os.fsencode)
        if id not in failures and (at == len(ids) or ids[at] != id):
            return id
        id += "!"


def _resolved(found: Mapping[bytes, _Namesakes], target: bytes, position: int) -> Member | None:
    """Return the member that a link names."""
    for _ in range(_MOST_HOPS):
        if target not in found:
            return None
        position, member = found[target].before(position)
        if not member.target:
            return member
        target = plain(member.target)
    return None
