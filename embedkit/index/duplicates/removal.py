"""Which files a person can remove because others show the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from embedkit.index.duplicates.groups import Duplicates
from embedkit.index.duplicates.leaks import Leaks
from embedkit.index.pictures import image_path
from embedkit.store import Store


@dataclass(frozen=True)
class Removal:
    """Files that can go, and why others of the rows that can go are not among them.

    Attributes
    ----------
    paths : list of Path
        Files below the root of the store, which still have the size and time that the store knows.
    parts : int
        Rows that are no whole file of their own: boxes, frames, members of archives, files that are gone or not known.
    changed : int
        Files that changed since the store was made.
    kept : int
        Files that are, by a link, the very file that is to be kept.
    unprintable : int
        Names with line breaks, which a list of one path a line cannot hold.
    """

    paths: list[Path]
    parts: int = 0
    changed: int = 0
    kept: int = 0
    unprintable: int = 0


def removable(found: Duplicates | Leaks) -> Removal:
    """Return the files that can go: of each group all but the one to keep, or what is in the other store too.

    Nothing is removed. A row that is like another duplicate only, and not like the one to keep, stays: once the others
    are gone, it is asked about anew.
    """
    pairs = _leak_pairs(found) if isinstance(found, Leaks) else _group_pairs(found)
    paths: list[Path] = []
    counts = {"parts": 0, "changed": 0, "kept": 0, "unprintable": 0}
    for store, row, keepers in pairs:
        path, why = _judge(store, row, keepers)
        if path is not None:
            paths.append(path)
        else:
            counts[why] += 1
    return Removal(paths, **counts)


def _group_pairs(found: Duplicates) -> Iterator[tuple[Store, int, list[Path]]]:
    can_go = set(found.superfluous.tolist())
    for group in found:
        keep = group[0].path
        for row in group.rows.tolist():
            if row in can_go:
                yield found.store, row, [] if keep is None else [keep]


def _leak_pairs(found: Leaks) -> Iterator[tuple[Store, int, list[Path]]]:
    keepers: dict[int, list[Path]] = {}
    for row, other in zip(found.left_rows.tolist(), found.right_rows.tolist(), strict=True):
        path = image_path(found.right, found.right.ids[other])
        keepers.setdefault(row, []).extend([] if path is None else [path])
    for row, paths in keepers.items():
        yield found.left, row, paths


def _judge(store: Store, row: int, keepers: Iterable[Path]) -> tuple[Path | None, str]:
    """Return the file of a row when it can go, or why it cannot."""
    id = store.ids[row]
    path = image_path(store, id)
    # The file of a box or a frame is called otherwise than its id, and holds more than what can go.
    if path is None or path.name != id.rpartition("/")[2] or not path.is_file():
        return None, "parts"
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) != (int(store.images.sizes[row]), int(store.images.mtimes_ns[row])):
        return None, "changed"
    if os.path.realpath(path) in map(os.path.realpath, keepers):
        return None, "kept"
    if "\n" in os.fspath(path) or "\r" in os.fspath(path):
        return None, "unprintable"
    return path, ""
