"""What changes between a store and the images there are now, and the store that comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError, StoreFormatError
from embedkit.spec import canonical_json
from embedkit.store.assembling import Content, Gather, Header, narrowed
from embedkit.store.knowledge import Known, at
from embedkit.store.plans import Plan
from embedkit.store.reader import Store
from embedkit.store.tables import Failures, Images, Inventory, lookup


@dataclass(frozen=True)
class Changes:
    """What an extraction found, in images.

    Attributes
    ----------
    unchanged : int
        Kept from the store, by size and modification time, or by content.
    resumed : int
        Computed already by an unfinished run.
    moved : int
        Kept because the same content was known under another id.
    new, changed, retried, repaired : int
        To compute: never seen, seen with other content, failed before, damaged in the store.
    deleted : int
        In the store, and no longer among the images, under no id.
    """

    unchanged: int = 0
    resumed: int = 0
    moved: int = 0
    new: int = 0
    changed: int = 0
    retried: int = 0
    repaired: int = 0
    deleted: int = 0


@dataclass(frozen=True)
class Update:
    """What a run has to do so that its store holds an inventory.

    Attributes
    ----------
    inventory : Inventory
    known : Known
        What was known when the run began.
    kept : dict of int to int
        Images, by number, that keep the row of an entry with the same content.
    plan : Plan
    todo : list of int
        Parts of the plan that are still to be written.
    failures : list of ImageError
        The images that failed before and are not tried again.
    changes : Changes
    """

    inventory: Inventory
    known: Known
    kept: dict[int, int]
    plan: Plan
    todo: list[int]
    failures: list[ImageError]
    changes: Changes

    @property
    def waiting(self) -> int:
        """Images of the parts that are still to be written."""
        return sum(len(self.plan.part(number)) for number in self.todo)


def content_of(header: Header, update: Update, known: Known) -> Content:
    """Return the store that holds an update's inventory, from what is known now that its parts are written."""
    inventory = update.inventory
    entry = lookup(known.ids, inventory.ids)
    source, row, failed = (at(column, entry) for column in (known.source, known.row, known.failed))
    sizes, mtimes, hashes = (at(column, entry) for column in (known.sizes, known.mtimes_ns, known.content_sha256))
    if update.kept:
        images, before = (np.array(list(numbers), dtype=np.int64) for numbers in (update.kept, update.kept.values()))
        source[images], row[images], failed[images] = update.known.source[before], update.known.row[before], False
        sizes[images], mtimes[images] = inventory.sizes[images], inventory.mtimes_ns[images]
        hashes[images], entry[images] = update.known.content_sha256[before], 0
    if (entry < 0).any():
        raise StoreFormatError(f"{int((entry < 0).sum()):,} rows of the plan are missing; run again")
    good = np.flatnonzero(~failed)
    nothing = [0] * len(inventory.failures)
    listed = Failures.of(inventory.failures, nothing, nothing)
    failures = Failures.join([known.failures(entry[failed]), listed])
    gathers = {
        name: Gather(known.matrices(name), source[good], row[good], spec.dim)
        for name, spec in {"": header.spec, **header.layers}.items()
    }
    return Content(
        Images(inventory.ids[good], sizes[good], mtimes[good], hashes[good]),
        failures.take(np.argsort(failures.ids, kind="stable")),
        None if inventory.labels is None else inventory.labels[good],
        inventory.classes,
        gathers.pop(""),
        gathers,
    )


def changes_of(
    base: Store | None,
    known: Known,
    inventory: Inventory,
    entry: npt.NDArray[np.int64],
    usable: npt.NDArray[np.bool_],
    settled: npt.NDArray[np.bool_],
    kept: Mapping[int, int],
) -> Changes:
    """Count what an extraction found; the arguments are those of `Run.prepare`."""
    found = entry >= 0
    computed = found & (at(known.source, entry) >= (base is not None))  # By this run, when it was begun.
    images, same = (np.array(list(numbers), dtype=np.int64) for numbers in (kept, kept.values()))
    own = entry[images] == same
    missing = ~settled
    missing[images] = False
    failed, intact = found & at(known.failed, entry), at(usable, entry)
    resumed = int((settled & computed).sum() + (own & computed[images]).sum())
    deleted = 0
    if base is not None:
        elsewhere = {known.content_sha256[row].tobytes() for row in same[~own]}
        gone = np.flatnonzero(lookup(inventory.ids, base.images.ids) < 0)
        deleted = sum(base.content_sha256[row].tobytes() not in elsewhere for row in gone)
    return Changes(
        unchanged=int(settled.sum() + own.sum()) - resumed,
        resumed=resumed,
        moved=int((~own).sum()),
        new=int((missing & ~found).sum()),
        changed=int((missing & found & ~failed & intact).sum()),
        retried=int((missing & failed).sum()),
        repaired=int((missing & found & ~failed & ~intact).sum()),
        deleted=deleted,
    )


def is_same(base: Store, header: Header, content: Content) -> bool:
    """Return whether a store to be holds what there is already, times and the way to images and weights included."""
    for name in ("root", "recipe"):
        if canonical_json(base.information.get(name)) != canonical_json(header.information.get(name)):
            return False
    rows = content.embeddings
    if len(base) != len(rows.rows) or rows.which.any() or not np.array_equal(rows.rows, np.arange(len(base))):
        return False
    tables = ((base.images, content.images), (base.failed, content.failures))
    if not all(np.array_equal(vars(old)[name], vars(new)[name]) for old, new in tables for name in vars(old)):
        return False
    labels, classes = narrowed(content.labels, content.classes)
    return base.classes == classes and (
        labels is None or (base.labels is not None and np.array_equal(base.labels, labels))
    )
