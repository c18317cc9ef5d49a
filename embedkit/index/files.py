"""The files of an index: a folder with FAISS's own file, its rows, and a JSON that says what they are."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from embedkit.index.facts import Facts
from embedkit.index.families import EXACT
from embedkit.index.whitening import Whitening
from embedkit.store import Store
from embedkit.store.durable import ASIDE, aside, publish_over, sync, write_durably
from embedkit.store.locking import Lock

NAME = "index.json"
FORMAT, VERSION = "embedkit-index", 1
_DATA = re.compile(r"(vectors|rows)-[0-9a-f]{32}\.(faiss|safetensors)")
_ARRAYS = ("rows", "keys", "mean", "matrix")
_JSON_BYTES = 1 << 24
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_ATTEMPTS = 5  # To read files that a writer replaces meanwhile.

Keys = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Saved:
    """What lies in the folder of an index.

    Attributes
    ----------
    facts : Facts
        What the JSON says.
    arrays : dict of str to array
        "rows" and "keys" of the entries, "mean" and "matrix" of a whitening.
    path : Path or None
        FAISS's file; None where the exact search needs none.
    index
        What FAISS read from it.
    """

    facts: Facts
    arrays: dict[str, npt.NDArray[Any]]
    path: Path | None
    index: Any

    def whitening(self, dim: int) -> Whitening | None:
        """Return the whitening of embeddings of width `dim`, if there is one; ValueError when it does not fit."""
        mean, matrix = (self.arrays.get(name) for name in ("mean", "matrix"))
        if mean is None and matrix is None:
            return None
        nothing = np.empty(0)
        return Whitening.of(nothing if mean is None else mean, nothing if matrix is None else matrix, dim)


def is_index(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is the folder of an index."""
    return os.path.isfile(os.path.join(path, NAME))


def row_keys(store: Store, rows: Rows | None = None) -> Keys:
    """Return what tells one row from another across updates of a store, as uint8 of shape (n, 16).

    It is a hash of id and content. Where a store does not know the content, it is one of id and embedding. Rows of -1
    have zeros.
    """
    wanted = np.arange(len(store)) if rows is None else rows
    images, keys = store.images, np.zeros((len(wanted), 16), dtype=np.uint8)
    known: npt.NDArray[np.bool_] = np.asarray(images.content_sha256.any(axis=1))
    for number, row in enumerate(wanted.tolist()):
        if row < 0:
            continue
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


def save(folder: Path, facts: Facts, arrays: dict[str, npt.NDArray[Any]], index: Any) -> Path | None:
    """Write an index, so that whoever opens it finds the old one or the new one; return FAISS's file.

    Raises
    ------
    StoreBusyError
        When another process writes it.
    StoreFormatError
        When something else stands there.
    """
    require_place(folder)
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
        values = {"format": FORMAT, "version": VERSION, **facts.to_dict(), "files": files}
        with aside(folder) as path:
            write_durably(path, json.dumps(values, indent=2).encode())
            publish_over(path, folder / NAME)
        for old in folder.iterdir():
            if _DATA.fullmatch(old.name) and old not in (vectors, rows):
                with suppress(PermissionError):  # Windows removes no file that a reader has mapped.
                    old.unlink()
    return vectors


def require_place(folder: Path) -> None:
    """Raise StoreFormatError when something else than an index stands where one is to be written."""
    if os.path.lexists(folder) and not _is_ours(folder):
        raise StoreFormatError(f"{folder} is something else than an index; name another place for it")


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is empty, an index, or what a writer left that was killed before it had made one."""
    if not folder.is_dir():
        return False
    if is_index(folder):
        with suppress(StoreFormatError):
            return bool(_read_json(folder / NAME).get("format") == FORMAT)
        return False
    names = os.listdir(folder)
    return all(name == "lock" or name.startswith(ASIDE) or _DATA.fullmatch(name) for name in names)


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
    path = folder / NAME
    for attempt in range(_ATTEMPTS):
        values = _read_values(folder)
        try:
            facts = Facts.from_dict(values)
            return _load(folder, facts, values["files"], mapped)
        except FileNotFoundError as error:
            if attempt == _ATTEMPTS - 1:
                raise StoreFormatError(f"{folder} is damaged: {error.filename} is missing; build it again") from error
        except StoreFormatError as error:
            raise error if os.fspath(folder) in str(error) else StoreFormatError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise StoreFormatError(f"{path} is damaged ({error!r:.200}); build the index again") from error
    raise AssertionError("unreachable")


def _load(folder: Path, facts: Facts, files: dict[str, Any], mapped: bool) -> Saved:
    path = _file(folder, files, "rows")
    with _named(path), safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in _ARRAYS if name in file.keys()}  # noqa: SIM118
    rows, keys = (arrays.get(name, np.empty(0)) for name in ("rows", "keys"))
    if rows.dtype != np.int64 or rows.ndim != 1 or keys.dtype != np.uint8 or keys.shape != (len(rows), 16):
        raise StoreFormatError(f"{path} does not hold the rows of an index; build it again")
    if (facts.factory == EXACT) == ("vectors" in files):
        raise StoreFormatError(f"{folder / NAME} names the factory {facts.factory!r:.80} and other files than its own")
    if "vectors" not in files:
        return Saved(facts, arrays, None, None)
    path = _file(folder, files, "vectors")
    with _named(path):
        index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    metric = faiss.METRIC_INNER_PRODUCT if facts.metric == "ip" else faiss.METRIC_L2
    if index.ntotal != len(rows) or index.metric_type != metric or not index.is_trained:
        raise StoreFormatError(f"{path} has {index.ntotal:,} entries instead of {len(rows):,}; build the index again")
    return Saved(facts, arrays, path, index)


def _read_values(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        values = _read_json(path)
    except FileNotFoundError:
        raise StoreNotFoundError(f"{folder} is no index; make one with: embedkit index STORE -o {folder}") from None
    if values.get("format") != FORMAT or not isinstance(values.get("files"), dict):
        raise StoreFormatError(f"{path} does not describe an index")
    if values.get("version") != VERSION:
        raise StoreFormatError(f"{path} is of version {values.get('version')!r:.80}; this embedkit reads {VERSION}")
    return values


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file of bounded size."""
    try:
        with path.open("rb") as file:
            data = file.read(_JSON_BYTES + 1)
        if len(data) > _JSON_BYTES:
            raise ValueError(f"it is larger than {_JSON_BYTES:,} bytes")
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise StoreFormatError(f"{path} does not describe an index")
    return values


def _file(folder: Path, files: dict[str, Any], which: str) -> Path:
    """Return a data file that the JSON names, after comparing what tells it from another."""
    entry: dict[str, Any] = files[which] if isinstance(files.get(which), dict) else {}
    name = entry.get("name")
    if not isinstance(name, str) or not _DATA.fullmatch(name) or not name.startswith(which):
        raise StoreFormatError(f"{folder / NAME} names no file of {which}")
    path = folder / name
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise StoreFormatError(f"{path} has {size:,} bytes instead of {entry['bytes']!r:.80}; build the index again")
    if _fingerprint(path) != entry["fingerprint"]:
        raise StoreFormatError(f"{path} is damaged, or the file of another index; build the index again")
    return path


def _fingerprint(path: Path) -> str:
    """Return the SHA-256 of some blocks of a file: enough to tell files of one size apart, without reading them."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        last = max(0, path.stat().st_size - _SAMPLE_BYTES)
        for number in range(_SAMPLES):
            file.seek(last * number // (_SAMPLES - 1))
            hashed.update(file.read(_SAMPLE_BYTES))
    return hashed.hexdigest()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what a library says of a file into an error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (SafetensorError, RuntimeError, MemoryError, TypeError, ValueError) as error:
        if not path.exists():  # A writer has replaced it; FAISS cannot say that.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from error
        reason = (str(error) or type(error).__name__).splitlines()[-1][-200:]
        raise StoreFormatError(f"{path} is damaged ({reason}); build the index again") from error


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
    return {"name": path.name, "bytes": path.stat().st_size, "fingerprint": _fingerprint(path)}
