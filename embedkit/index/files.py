"""The files of an index: a folder with FAISS's own file, its rows, and a JSON that says what they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_arrays

from embedkit.errors import StoreFormatError, StoreNotFoundError
from embedkit.index.exact import Rows
from embedkit.store import Store
from embedkit.store.durable import aside, publish_over, sync, write_durably
from embedkit.store.locking import Lock

NAME = "index.json"
FORMAT, VERSION = "embedkit-index", 1
_DATA = re.compile(r"(vectors|rows)-[0-9a-f]{32}\.(faiss|safetensors)")
_ATTEMPTS = 5  # To read files that a writer replaces meanwhile.

Keys = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Saved:
    """What lies in the folder of an index.

    Attributes
    ----------
    facts : dict
        The JSON.
    arrays : dict of str to array
        "rows" and "keys" of the entries, "mean" and "matrix" of a whitening.
    path : Path or None
        FAISS's file; None where the exact search needs none.
    index
        What FAISS read from it.
    """

    facts: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]
    path: Path | None
    index: Any


def is_index(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is the folder of an index."""
    return os.path.isfile(os.path.join(path, NAME))


def row_keys(store: Store, rows: Rows | None = None) -> Keys:
    """Return what tells one row from another across updates of a store, as uint8 of shape (n, 16).

    It is a hash of id and content. Where a store does not know the content, it is one of id and embedding.
    """
    wanted = np.arange(len(store)) if rows is None else rows
    images, keys = store.images, np.empty((len(wanted), 16), dtype=np.uint8)
    known: npt.NDArray[np.bool_] = np.asarray(images.content_sha256.any(axis=1))
    for number, row in enumerate(wanted.tolist()):
        content = images.content_sha256[row] if known[row] else store.embeddings[row]
        hashed = hashlib.blake2b(images.ids[row] + b"\0" + content.tobytes(), digest_size=16)
        keys[number] = np.frombuffer(hashed.digest(), dtype=np.uint8)
    return keys


def rows_of(keys: Keys, store: Store) -> tuple[Rows, Rows]:
    """Return the row of the store that each key is, -1 where it has none, and the rows that no key is of."""
    here, wanted = (np.ascontiguousarray(some).view("V16").ravel() for some in (row_keys(store), keys))
    together, places = np.unique(np.concatenate([here, wanted]), return_inverse=True)
    rows = np.full(len(together), -1, dtype=np.int64)
    rows[places[: len(here)]] = np.arange(len(here))
    found = rows[places[len(here) :]]
    missing = np.ones(len(here), dtype=np.bool_)
    missing[found[found >= 0]] = False
    return found, np.flatnonzero(missing)


def save(folder: Path, facts: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], index: Any) -> Path | None:
    """Write an index, so that whoever opens it finds the old one or the new one; return FAISS's file.

    Raises
    ------
    StoreBusyError
        When another process writes it.
    StoreFormatError
        When something else stands there.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or (any(folder.iterdir()) and not is_index(folder))):
        raise StoreFormatError(f"{folder} is no index of ours; name another place for it")
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder):
        vectors = None
        if index is not None:
            with aside(folder) as path:
                faiss.write_index(index, os.fspath(path))
                vectors = _published(path, folder, "vectors", "faiss")
        with aside(folder) as path:
            write_durably(path, save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
            rows = _published(path, folder, "rows", "safetensors")
        files = {"rows": _entry(rows)} | ({} if vectors is None else {"vectors": _entry(vectors)})
        values = {"format": FORMAT, "version": VERSION, **facts, "files": files}
        with aside(folder) as path:
            write_durably(path, json.dumps(values, indent=2).encode())
            publish_over(path, folder / NAME)
        for old in folder.iterdir():
            if _DATA.fullmatch(old.name) and old not in (vectors, rows):
                old.unlink()
    return vectors


def load(folder: Path, *, mapped: bool = True) -> Saved:
    """Read the folder of an index.

    Parameters
    ----------
    folder : Path
        The folder.
    mapped : bool, default True
        Whether FAISS maps its file instead of reading it. Such an index takes no further rows.

    Raises
    ------
    StoreNotFoundError
        When there is no index.
    StoreFormatError
        When it is damaged, or newer than this embedkit.
    """
    for attempt in range(_ATTEMPTS):
        facts = _read_facts(folder)
        try:
            return _load(folder, facts, mapped)
        except FileNotFoundError as error:
            if attempt == _ATTEMPTS - 1:
                raise StoreFormatError(f"{folder} is damaged: {error.filename} is missing; build it again") from error
    raise AssertionError("unreachable")


def _load(folder: Path, facts: dict[str, Any], mapped: bool) -> Saved:
    arrays: dict[str, npt.NDArray[Any]] = {}
    rows = _file(folder, facts, "rows")
    with _named(rows), safe_open(rows, framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            arrays[name] = file.get_tensor(name)
    if "vectors" not in facts["files"]:
        return Saved(facts, arrays, None, None)
    vectors = _file(folder, facts, "vectors")
    with _named(vectors):
        index = faiss.read_index(os.fspath(vectors), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    entries = len(arrays.get("rows", ()))
    if index.ntotal != entries or arrays["rows"].dtype != np.int64 or arrays["keys"].shape != (entries, 16):
        raise StoreFormatError(f"{vectors} has {index.ntotal:,} entries and {entries:,} rows; build the index again")
    return Saved(facts, arrays, vectors, index)


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreNotFoundError(f"{folder} is no index; make one with: embedkit index STORE -o {folder}") from None
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(f"{path} is damaged: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not isinstance(facts.get("files"), dict):
        raise StoreFormatError(f"{path} does not describe an index")
    if facts.get("version") != VERSION:
        raise StoreFormatError(f"{path} is of version {facts.get('version')!r}; this embedkit reads {VERSION}")
    return facts


def _file(folder: Path, facts: dict[str, Any], which: str) -> Path:
    """Return a data file that the JSON names, after comparing its size."""
    entry = facts["files"].get(which)
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not _DATA.fullmatch(name):
        raise StoreFormatError(f"{folder / NAME} names no file of {which}")
    path = folder / name
    if path.stat().st_size != entry.get("bytes"):
        raise StoreFormatError(
            f"{path} has {path.stat().st_size:,} bytes instead of {entry.get('bytes')}; build it again"
        )
    return path


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what a library says of a file into an error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (SafetensorError, RuntimeError, MemoryError) as error:
        raise StoreFormatError(f"{path} is damaged ({str(error).splitlines()[-1][:200]}); build it again") from error


def _published(path: Path, folder: Path, what: str, suffix: str) -> Path:
    """Make a file durable and give it a name of its own, which no reader of an older index looks for."""
    handle = os.open(path, os.O_RDWR)
    try:
        sync(handle)
    finally:
        os.close(handle)
    target = folder / f"{what}-{os.urandom(16).hex()}.{suffix}"
    publish_over(path, target)
    return target


def _entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size}
