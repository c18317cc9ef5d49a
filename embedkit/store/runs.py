"""Run: an extraction in progress, which survives being killed at any moment.

``X.h5.parts/`` holds everything until the store is published: the lock, ``run.json`` (what is computed, and how it is
cut into parts), the list of ids, and the parts themselves. ``docs/store-format.md`` describes it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbedkitError, ImageError, StoreExistsError, StoreFormatError
from embedkit.spec import EmbeddingSpec
from embedkit.store import durable
from embedkit.store.assembling import Header, publish
from embedkit.store.knowledge import Damage, Known, at, find_damage, gather_known, same_content, unchanged
from embedkit.store.locking import Lock, now, parts_folder
from embedkit.store.parts import Part, PartWriter, Rows, part_number, read_parts
from embedkit.store.plans import NO_PLAN, NOTE, Plan, read_note, read_plan, require_same_specs, run_digest, write_note
from embedkit.store.reader import Store
from embedkit.store.tables import Inventory, lookup
from embedkit.store.updates import Update, changes_of, content_of, is_same
from embedkit.store.verification import verify
from embedkit.store.writer import refuse_existing

log = logging.getLogger("embedkit")


class Run:
    """An extraction in progress. Entering it takes the store's lock and finds what an earlier run left.

    Parameters
    ----------
    path : path-like
        The store to make or update.
    spec : EmbeddingSpec
        Of its embeddings.
    layers : mapping of str to EmbeddingSpec, optional
        Of its layers.
    information : mapping, optional
        JSON values that explain the run without deciding the numbers.
    overwrite : bool, default False
        Whether a store at `path` is replaced instead of updated.
    repair : bool, default False
        Whether rows of the store whose checksums do not match are computed again. Otherwise they are an error.

    Raises
    ------
    StoreBusyError
        When another process holds the lock.
    SpecMismatchError
        When the store, or the unfinished run, was made otherwise, naming the fields that differ.
    StoreFormatError
        When the store is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: EmbeddingSpec,
        *,
        layers: Mapping[str, EmbeddingSpec] | None = None,
        information: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        repair: bool = False,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self.folder = parts_folder(self.path)
        refuse_existing(self.path, overwrite=True)
        self.header = Header(spec, uuid.uuid4().hex, now(), dict(layers or {}), dict(information or {}))
        self.base: Store | None = None
        self.parts: dict[str, Part] = {}
        self.plan = NO_PLAN
        self._overwrite, self._repair = overwrite, repair
        self._damage = Damage()
        self._begun_on: str | None = None  # The folder of images that the unfinished run says that it read.
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        self._stack.enter_context(Lock(self.folder))
        try:
            self._recover()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _recover(self) -> None:
        """Find what an earlier run left: nothing, parts to go on with, or a published store that was not tidied up."""
        durable.sync_folder(self.folder)  # An earlier run may have been killed before it could.
        note, replaced = read_note(self.folder), False
        if note is not None and published_run(self.path) == note["run_id"]:
            replaced = note["digest"] == self.digest  # What was to be overwritten, if this is the same command.
            self._tidy()
            note = None
        if self.path.exists() and (replaced or not self._overwrite):
            self.base = Store.open(self.path)
            require_same_specs(
                f"{self.path} was made otherwise; choose another name, or replace it with --overwrite",
                (self.base.spec, self.base.layers), (self.header.spec, self.header.layers),
            )  # fmt: skip
            self._damage = find_damage(self.base) if self._repair else self._damage
        if note is not None:
            self._resume(note)
        written = sum(path.stat().st_size for path in self.folder.glob("part-*"))
        _say_when_long("reading what an earlier run computed", written)
        self.parts = read_parts(self.folder, self.digest)

    def _resume(self, note: dict[str, Any]) -> None:
        if note["digest"] != self.digest:
            if self._overwrite:
                self._tidy()
                return
            specs = {name: EmbeddingSpec.from_dict(values) for name, values in note["layers"].items()}
            drop = "drop it with --overwrite"
            if self.base is not None:
                drop = f"remove that folder, which drops the unfinished run and keeps {self.path}"
            require_same_specs(
                f"{self.folder} holds an unfinished run that was begun otherwise; finish it as it was begun, or {drop}",
                (EmbeddingSpec.from_dict(note["identity"]), specs), (self.header.spec, self.header.layers),
            )  # fmt: skip
        self._begun_on = note["information"].get("root")
        # Images and weights may have moved since, so this run knows better where they are.
        information = {**note["information"], **self.header.information}
        self.header = dataclasses.replace(
            self.header, run_id=note["run_id"], created=note["created"], information=information
        )
        self.plan = read_plan(self.folder, note)

    @property
    def digest(self) -> str:
        """What every part must have been made with: the digest of all specs."""
        return run_digest(self.header.spec, self.header.layers)

    @property
    def _row_bytes(self) -> int:
        return 4 * sum(spec.dim for spec in (self.header.spec, *self.header.layers.values()))

    def prepare(
        self,
        inventory: Inventory,
        hashes: Callable[[list[int]], Iterable[tuple[int, bytes]]],
        *,
        part_size: Callable[[int], int],
        batch_size: int,
        checksum: bool = False,
        retry_failed: bool = False,
    ) -> Update:
        """Decide what is to be computed, and write the plan down before any of it is.

        Parameters
        ----------
        inventory : Inventory
            What the store should hold.
        hashes : callable
            Returns number and SHA-256 of those images, of the given ones, that can be read.
        part_size : callable
            Returns the size of a part for a number of images to compute; asked when a plan is made.
        batch_size : int
            Images a forward pass.
        checksum : bool, default False
            Whether an image is unchanged only when its content is, whatever its size and modification time.
        retry_failed : bool, default False
            Whether images that failed before are tried again.

        Raises
        ------
        StoreExistsError
            When none of the rows there are, of the store or of the unfinished run, would be kept.
        """
        known = gather_known(self.base, self.parts.values())
        usable, timely = self._damage.masks(known)
        entry, settled = unchanged(known, inventory, retry_failed=retry_failed)
        settled &= at(usable & timely, entry) & (not checksum)
        pending = self._pending()
        waiting = lookup(pending, inventory.ids) >= 0
        kept = self._same_content(known, usable, inventory, entry, ~settled & ~waiting, hashes, any_size=checksum)
        missing = ~settled
        missing[list(kept)] = False
        self._refuse_a_stranger(inventory, known, kept)
        plan, todo = self._plan_for(inventory.ids[missing], pending, part_size, batch_size)
        self._warn_about_space(int(missing.sum()), len(inventory))
        changes = changes_of(self.base, known, inventory, entry, usable, settled, kept)
        failures = known.failures(entry[settled & at(known.failed, entry)]).listed()
        errors = [ImageError(failure.id, failure.error, failure.kind) for failure in failures]
        return Update(inventory, known, kept, plan, todo, errors, changes)

    @property
    def earlier(self) -> tuple[Mapping[str, Any], int]:
        """Information of what came before, and how many rows it has: the resumed run, or the store that is updated."""
        base: tuple[Mapping[str, Any], int] = ({}, 0) if self.base is None else (self.base.information, len(self.base))
        resumed = max(len(self.plan.ids), sum(len(part.images) for part in self.parts.values()))
        return (self.header.information, max(base[1], resumed)) if resumed else base

    def remember(self, information: Mapping[str, Any]) -> None:
        """Add to the information that the run's note and its store keep."""
        if information.items() <= self.header.information.items():
            return
        self.header = dataclasses.replace(self.header, information={**self.header.information, **information})
        self._write_note()

    def _write_note(self) -> None:
        if len(self.plan.ids):
            write_note(self.folder, self.header, None if self.base is None else self.base.content_id, self.plan)

    def _pending(self) -> npt.NDArray[Any]:
        """Return the ids of the plan's parts that are not written yet."""
        written = {part.sequence for part in self.parts.values()}
        return np.concatenate([self.plan.ids[:0], *(self.plan.part(k) for k in self.plan.parts if k not in written)])

    def _same_content(
        self,
        known: Known,
        usable: npt.NDArray[np.bool_],
        inventory: Inventory,
        entry: npt.NDArray[np.int64],
        unsettled: npt.NDArray[np.bool_],
        hashes: Callable[[list[int]], Iterable[tuple[int, bytes]]],
        *,
        any_size: bool,
    ) -> dict[int, int]:
        """Return the images whose content is known; a file is read for that only when its size is that of one."""
        sizes = np.unique(known.sizes[usable & ~known.failed])
        # With `any_size`, for a store may know hashes and no sizes.
        likely = unsettled & ((len(sizes) > 0) if any_size else np.isin(inventory.sizes.astype(np.uint64), sizes))
        if not likely.any():
            return {}
        return same_content(known, usable, entry, hashes(np.flatnonzero(likely).tolist()))

    def _refuse_a_stranger(self, inventory: Inventory, known: Known, kept: Mapping[int, int]) -> None:
        """Raise when every row there is would be dropped: that is another folder, not a new state of this one."""
        if self._overwrite:
            return
        base = self.base
        if base is not None and len(base) and not kept and not (lookup(inventory.ids, base.images.ids) >= 0).any():
            raise StoreExistsError(
                f"{self.path} holds {len(base):,} images of {base.root or 'another folder'}, and none of "
                "them is among these; choose another name, or replace it with --overwrite"
            )
        if base is not None and self._begun_on == self.header.information.get("root"):
            return  # An update of this folder, whose new images are gone again.
        used = lookup(inventory.ids, known.ids) >= 0
        used[list(kept.values())] = True
        computed = ~known.failed & (known.source >= (base is not None))
        if computed.any() and not (used & computed).any():
            raise StoreExistsError(
                f"the unfinished run in {self.folder} holds {int(computed.sum()):,} rows of "
                f"{self._begun_on or 'another folder'}, and none of them is among these; choose another name, or "
                "remove that folder to drop them"
            )

    def _plan_for(
        self, missing: npt.NDArray[Any], pending: npt.NDArray[Any], part_size: Callable[[int], int], batch_size: int
    ) -> tuple[Plan, list[int]]:
        """Return the plan that stands when it covers what is missing, otherwise a new one, written down."""
        written = {part.sequence for part in self.parts.values()}
        if not np.array_equal(missing, pending):
            first = max([self.plan.parts.stop, *(number + 1 for number in written)])
            batches = max(1, part_size(len(missing)) // batch_size)
            self.plan = Plan(first, batches * batch_size, batch_size, missing)
            self._write_note()
        return self.plan, [number for number in self.plan.parts if number not in written]

    def _warn_about_space(self, missing: int, total: int) -> None:
        needed, free = (missing + total) * self._row_bytes if missing else 0, durable.free_bytes(self.folder)
        if needed > free:
            log.warning(
                "%s needs about %s until it is finished, and %s are free; when the disk is full the run "
                "stops, and goes on where it stopped once there is space",
                self.path, in_megabytes(needed), in_megabytes(free),
            )  # fmt: skip

    def write(self, number: int, rows: Rows) -> None:
        """Write one part of the plan durably."""
        self.writer(number, rows)

    @property
    def writer(self) -> PartWriter:
        """What writes parts of the plan, here or in another process."""
        return PartWriter(self.folder, self.digest, self.header.run_id)

    def finalise(self, update: Update) -> bool:
        """Publish the store that holds the update's inventory, and return whether it differs from the one before.

        Raises
        ------
        StoreFormatError
            When a part is missing, or the store that is updated is damaged.
        OSError
            When the disk is full; all parts are kept.
        """
        earlier = set(self.parts)
        self.parts = read_parts(self.folder, self.digest, self.parts)
        new = [part for name, part in self.parts.items() if name not in earlier]
        # In the order of before, so that what was decided about sources still holds.
        sources = [source for source in update.known.sources if isinstance(source, Part)]
        content = content_of(self.header, update, gather_known(self.base, [*sources, *new]))
        changed = self.base is None or self._damage.found or not is_same(self.base, self.header, content)
        if changed:
            _say_when_long("writing the store", len(content.images) * self._row_bytes)
            if self.base is not None and not self._repair:
                for problem in verify(self.base):
                    raise StoreFormatError(
                        f"{self.path} is damaged and cannot be copied as it is: {problem}; what was computed is kept, "
                        "run the same command with --repair"
                    )
            publish(self.path, self.folder, self.header, content)
        self._tidy()
        return changed

    def abandon(self) -> None:
        """Remove what this run computed; what an earlier one left is not known to be worthless."""
        if not self.parts:
            self._tidy()
            return
        for path in self.folder.glob("part-*"):
            if path.name not in self.parts and part_number(path.name) is not None:
                path.unlink()

    def _tidy(self) -> None:
        """Remove what a run leaves once its store is published; the note last, for it says that this may be done."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == NOTE):
            if _is_ours(path.name):
                path.unlink()
        durable.sync_folder(self.folder)
        self.parts, self.plan = {}, NO_PLAN


def _is_ours(name: str) -> bool:
    """Return whether a run leaves a file of that name; what else lies there, such as a NAS's @eaDir, is not ours."""
    is_part = part_number(name.removesuffix(".bad")) is not None
    return is_part or name == NOTE or re.fullmatch(r"ids-\d{6,}-[0-9a-f]{16}", name) is not None


def in_megabytes(count: float) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 1e6:,.1f} MB"


def _say_when_long(what: str, size: int) -> None:
    """Log what is going on when it takes more than a few seconds, at about half a gigabyte a second."""
    if size > 1e9:
        log.info("%s (%s)", what, in_megabytes(size))


def published_run(path: Path) -> str | None:
    """Return the run that made a store, None where there is none that can be opened."""
    try:
        return Store.open(path).run_id
    except EmbedkitError:
        return None
