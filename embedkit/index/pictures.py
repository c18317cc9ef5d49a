"""The images behind the rows of a store, as far as they are still there."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from embedkit.errors import ImageError
from embedkit.images import Data, Region, read_bytes
from embedkit.sources import Listing, find_entry, inside, list_archive
from embedkit.store.format import is_path

if TYPE_CHECKING:
    from embedkit.store import Store

_FRAGMENT = re.compile(r"#(t|xywh)=[0-9.,-]+$")


def image_path(store: Store, id: str) -> Path | None:
    """Return the file of an id, which is the whole of it where the id is that of a box or a frame.

    It is None when an id has none, its root is unknown, or the id points out of it.
    """
    root, rest = _place(store, id)
    try:
        if root is None or root.is_file():
            return None
        path, whole = inside(root, rest), _FRAGMENT.sub("", rest)
        return inside(root, whole) if whole != rest and not path.exists() else path
    except ImageError:
        return None


def read_picture(store: Store, id: str) -> Data:
    """Return what an id's image is decoded from: of a file, a box in a file, or a member of an archive.

    Raises
    ------
    ImageError
        When it is not there any more, or cannot be had again: a frame of a video, or what Python had in memory.
    """
    root, rest = _place(store, id)
    if root is None:
        raise ImageError(id, "no file is known", "missing")
    if root.is_file():
        return find_entry(_archive(os.fspath(root), root.stat().st_mtime_ns), rest).read()
    path = inside(root, rest)
    name, sign, numbers = rest.rpartition("#xywh=")
    if not sign or path.exists():
        return read_bytes(path, id)
    try:
        left, top, width, height = map(int, numbers.split(","))
    except ValueError:
        raise ImageError(id, "the file is missing", "missing") from None
    return Region(read_bytes(inside(root, name), id), (left, top, left + width, top + height))


def _place(store: Store, id: str) -> tuple[Path | None, str]:
    """Return the folder or archive that an image came from, and its name there."""
    root, rest = store.root, id
    sources = store.information.get("sources")
    if isinstance(sources, dict):  # Several, whose names the ids begin with.
        name, _, rest = id.partition("/")
        root = Path(sources[name]) if is_path(sources.get(name)) else None
    return (root if root is not None and root.is_absolute() else None), rest


@lru_cache(maxsize=4)
def _archive(path: str, mtime_ns: int) -> Listing:
    """List an archive once for all pictures, as long as it stays as it is."""
    return list_archive(path)
