"""What stands at a store's path: nothing, an unfinished run, a run in progress, or a finished store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from embedkit.errors import StoreNotFoundError
from embedkit.store.hdf5 import LayoutError, read_layout
from embedkit.store.locking import holder, parts_folder
from embedkit.store.matrix import ReadOnlyFile
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
        Images that the run has settled durably, and those it set out to.
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
    folder = parts_folder(target)
    try:
        rows: int | None = len(Store.open(target))
    except StoreNotFoundError:
        rows = None
    if not folder.is_dir():
        return Status("none" if rows is None else "finished", rows)
    note, busy = read_note(folder), holder(folder)
    planned = int(note["plan"]["count"]) if note is not None else 0
    committed = sum(_images(part) for part in folder.glob("part-*.h5"))
    if busy is not None:
        return Status("busy", rows, committed, planned, busy.pid, busy.host, busy.since)
    unfinished = committed or planned
    return Status("unfinished" if unfinished else "none" if rows is None else "finished", rows, committed, planned)


def _images(path: Path) -> int:
    """Return how many images a part file settles."""
    try:
        file = ReadOnlyFile(path, keep=True)
        datasets = read_layout(file.read, file.size).datasets
        return sum(datasets[name].shape[0] for name in ("ids", "failures/ids"))
    except (OSError, LayoutError, KeyError, IndexError):
        return 0  # Removed just now by the run that finished, or damaged: the next run sets it aside.
