"""What is known already about a set of images: from the store as it is, and from the parts of an unfinished run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import StoreFormatError
from embedkit.store.matrix import Matrix
from embedkit.store.parts import Part
from embedkit.store.reader import Store
from embedkit.store.tables import Array, Failures, Images, Inventory, lookup
from embedkit.store.verification import verify

log = logging.getLogger("embedkit")

# Kinds of failures that say something about the disk, the network or the moment, and nothing about the image.
PASSING_KINDS = (b"unreadable", b"permission")

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """One entry for each id, sorted by its bytes: the last word that was said about it.

    Attributes
    ----------
    ids : array of bytes of shape (m,)
    sizes, mtimes_ns, content_sha256 : arrays of m
        Of the file when it was read.
    failed : bool (m,)
        Whether it could not be read.
    passing : bool (m,)
        Whether that may be otherwise the next time.
    source, row : int64 (m,)
        Where the entry stands: a row of ``sources[source]``, of its images or of its failures.
    """

    sources: Sequence[Store | Part]
    ids: Array
    sizes: Array
    mtimes_ns: Array
    content_sha256: Array
    failed: Array
    passing: Array
    source: Rows
    row: Rows

    def images(self, entries: Rows) -> Images:
        """Return the columns of some entries, none of which failed."""
        return Images(self.ids[entries], self.sizes[entries], self.mtimes_ns[entries], self.content_sha256[entries])

    def failures(self, entries: Rows) -> Failures:
        """Return the failures among some entries."""
        found = [Failures.empty()]
        for number in np.unique(self.source[entries]).tolist():
            chosen = entries[self.source[entries] == number]
            found.append(_failed(self.sources[number]).take(self.row[chosen]))
        joined = Failures.join(found)
        return joined.take(np.argsort(joined.ids, kind="stable"))

    def matrices(self, name: str) -> list[Matrix]:
        """Return the matrix of that name of every source."""
        return [source.matrices[name] for source in self.sources]


def gather_known(base: Store | None, parts: Iterable[Part]) -> Known:
    """Collect what a store and some parts say; where they differ, later parts have the last word."""
    sources: list[Store | Part] = [*([base] if base is not None else []), *parts]
    tables: list[Images | Failures] = [table for one in sources for table in (one.images, _failed(one))]
    lengths = np.array([len(table) for table in tables], dtype=np.int64)
    hashes = [getattr(table, "content_sha256", np.zeros((len(table), 32), dtype=np.uint8)) for table in tables]
    passing = [np.isin(getattr(table, "kinds", np.zeros(len(table), "S1")), PASSING_KINDS) for table in tables]
    nothing = Images.empty()
    ids = np.concatenate([nothing.ids, *(table.ids for table in tables)])
    # A stable sort keeps the order in which things were said, so the last of equal ids is the last word.
    order = np.argsort(ids, kind="stable")
    chosen = order[np.append(ids[order][1:] != ids[order][:-1], np.ones(min(1, len(order)), dtype=bool))]
    number = np.repeat(np.arange(len(tables)), lengths)
    return Known(
        sources=sources,
        ids=ids[chosen],
        sizes=np.concatenate([nothing.sizes, *(table.sizes for table in tables)])[chosen],
        mtimes_ns=np.concatenate([nothing.mtimes_ns, *(table.mtimes_ns for table in tables)])[chosen],
        content_sha256=np.concatenate([nothing.content_sha256, *hashes])[chosen],
        failed=number[chosen] % 2 == 1,
        passing=np.concatenate([np.empty(0, dtype=bool), *passing])[chosen],
        source=number[chosen] // 2,
        row=np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(length) for length in lengths)])[chosen],
    )


def _failed(source: Store | Part) -> Failures:
    return source.failures if isinstance(source, Part) else source.failed


def at(column: npt.NDArray[Any], entry: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return the column's values at some entries; anything where there is no entry (-1)."""
    if not len(column):
        return np.zeros((len(entry), *column.shape[1:]), dtype=column.dtype)
    return np.asarray(column[entry.clip(min=0)])


def unchanged(known: Known, inventory: Inventory, *, retry_failed: bool) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Return the entry of every image by its id (-1 for none), and whether size and time say that it is the same."""
    entry = lookup(known.ids, inventory.ids)
    same = (entry >= 0) & (at(known.sizes, entry) == inventory.sizes.astype(np.uint64))
    same &= at(known.mtimes_ns, entry) == inventory.mtimes_ns
    return entry, same & ~(at(known.failed, entry) & (at(known.passing, entry) | retry_failed))


def same_content(
    known: Known, usable: npt.NDArray[np.bool_], own: Rows, hashes: Iterable[tuple[int, bytes]]
) -> dict[int, int]:
    """Return, for every hashed image whose content is known, an entry that has it.

    That is the image's own entry where it can be, and otherwise the first by id: equal files have equal embeddings.
    """
    entries = np.flatnonzero(usable & ~known.failed & known.content_sha256.any(axis=1))
    by_hash: dict[bytes, int] = {}
    for entry in entries.tolist():
        by_hash.setdefault(known.content_sha256[entry].tobytes(), entry)
    found = {}
    for image, sha256 in hashes:
        if sha256 in by_hash:
            mine = int(own[image])
            same = mine >= 0 and usable[mine] and known.content_sha256[mine].tobytes() == sha256
            found[image] = mine if same else by_hash[sha256]
    return found


@dataclass(frozen=True)
class Damage:
    """Which rows of the store that is updated must be computed again, and whether its times can be trusted.

    `found` says whether there was any, if only in what needs nothing but to be written again.
    """

    rows: npt.NDArray[np.bool_] | None = None
    times: bool = False
    found: bool = False

    def masks(self, known: Known) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return for each entry whether its row may be kept, and whether its size and time say anything."""
        usable = timely = np.ones(len(known.ids), dtype=bool)
        if self.rows is not None:
            of_base = known.source == 0
            usable = ~(of_base & at(self.rows, np.where(of_base & ~known.failed, known.row, -1)) & ~known.failed)
            timely = ~of_base if self.times else timely
        return usable, timely


# What is not copied from the store but made anew. So are checksums, and the rows of a damaged one are named themselves.
_REWRITTEN = ("labels", "label_names", "gap")


def find_damage(base: Store) -> Damage:
    """Verify a store, and tell damage that can be repaired from damage that cannot."""
    rows, times = np.zeros(len(base), dtype=bool), False
    problems = verify(base)
    for problem in problems:
        log.warning("damaged: %s", problem)
        if problem.rows is not None:
            rows[slice(*problem.rows)] = True
        elif problem.where == "content_sha256":
            rows[:] = True
        elif problem.where in ("sizes", "mtimes_ns") or problem.where.startswith("failures/"):
            times = True
        elif problem.where not in _REWRITTEN and not problem.where.startswith("checksums/"):
            raise StoreFormatError(f"{base.path} cannot be repaired, only replaced with --overwrite: {problem}")
    return Damage(rows, times, bool(problems))
