"""What stands at a store's path: nothing, an unfinished run, a run in progress, or a finished store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedkit.errors import StoreFormatError, StoreNotFoundError
from embedkit.store.hdf5 import LayoutError, read_layout
from embedkit.store.locking import holder, parts_folder
from embedkit.store.matrix import ReadOnlyFile
from embedkit.store.parts import part_number
from embedkit.store.plans import read_note
from embedkit.store.reader import Store


@dataclass(frozen=True)
class Status:
    """What `Store.status` found.

    Attributes
    ----------
    state : {"none", "unfinished", "busy", "finished"}
        "busy" when a process is writing now, "unfinished" when one was.
    rows : int, optional
        Of the finished store, where there is one: an unfinished run may be updating it.
    committed, planned : int
        Images that the run has settled durably, and those together with what it has still to do.
    pid, host, since : int, str, str, optional
        The process that is writing.
    """

    state: str
    rows: int | None = None
    committed: int = 0
    planned: int = 0
    pid: int | None = None
    host: str | None = None
    since: str | None = None


def find_status(path: str | os.PathLike[str]) -> Status:
    """Say what stands at a store's path, without disturbing whoever writes there.

    Raises
    ------
    StoreFormatError
        When something is there that is not a store.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise StoreFormatError(f"{path} is a folder, and a store is one file; name that file")
    folder = parts_folder(target)
    note, busy = read_note(folder), holder(folder)
    parts = {path: number for path in folder.glob("part-*.h5") if (number := part_number(path.name)) is not None}
    committed = sum(map(_images, parts))
    planned = committed + (0 if note is None else _waiting(note["plan"], parts.values()))
    try:
        store = Store.open(target)  # Last, for a run that goes on meanwhile makes a store of its parts.
    except StoreNotFoundError:
        store = None
    rows = None if store is None else len(store)
    if busy is None and note is not None and store is not None and note["run_id"] == store.run_id:
        return Status("finished", rows)  # It was killed after that: what is left are files to remove.
    if busy is not None:
        return Status("busy", rows, committed, planned, busy.pid, busy.host, busy.since)
    return Status("unfinished" if planned else "none" if rows is None else "finished", rows, committed, planned)


def _waiting(plan: Mapping[str, Any], written: Iterable[int]) -> int:
    """Return how many images lie in those parts of a plan that are not written yet."""
    size, count = plan["part_size"], plan["count"]
    starts = {(number - plan["first"]) * size for number in written}
    return int(count - sum(min(size, count - start) for start in starts if 0 <= start < count))


def _images(path: Path) -> int:
    """Return how many images a part file settles."""
    try:
        file = ReadOnlyFile(path, keep=True)
        datasets = read_layout(file.read, file.size).datasets
        return sum(datasets[name].shape[0] for name in ("ids", "failures/ids"))
    except (OSError, LayoutError, KeyError, IndexError):
        return 0  # Removed just now by the run that finished, or damaged: the next run sets it aside.
