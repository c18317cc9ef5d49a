"""Schema v1: names, types and checksums of a store's datasets, and how they lie in the file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt

from embedkit.errors import StoreFormatError
from embedkit.spec import EmbeddingSpec, canonical_json
from embedkit.store.hdf5 import Dataset

if TYPE_CHECKING:
    import h5py

FORMAT = "embedkit-store"
SCHEMA_VERSION = 1
BLOCK_ROWS = 4096
MAX_PROVENANCE_BYTES = 60 * 1024  # An attribute holds 64 KiB.
MAX_ID_BYTES = 4096
MAX_ERROR_BYTES = 1000
MAX_KIND_BYTES = 32
UNKNOWN_KIND = "unknown"  # Of failures that were written before there were kinds.
MAX_LAYERS = 32
MAX_LAYER_BYTES = 64
MAX_JSON_DEPTH = 64
NO_HASH = "0" * 64

Array = npt.NDArray[Any]
Attributes = Mapping[str, int | str]


def encode_texts(texts: Sequence[str]) -> Array:
    """Return texts as an array of null-padded bytes; undecodable file names keep their bytes."""
    encoded = [os.fsencode(text) for text in texts]
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")


def encode_reasons(reasons: Sequence[str]) -> Array:
    """Return the reasons of failures as bytes, cut where somebody wrote a novel."""
    # Surrogates come from names that are not UTF-8, or from whoever raised the error: both are shown, not lost.
    encoded = [reason.encode("utf-8", "backslashreplace")[:MAX_ERROR_BYTES] for reason in reasons]
    return encode_texts([reason.decode("utf-8", "ignore") for reason in encoded])


def encode_kinds(kinds: Sequence[str]) -> Array:
    """Return the kinds of failures as bytes; what cannot be one, for somebody made it up, is "damaged"."""
    return encode_texts([kind if kind.isascii() and is_kind(kind.encode()) else "damaged" for kind in kinds])


def is_kind(kind: bytes) -> bool:
    """Return whether a failure may be of a kind, which later writers may know more of: a short word of ASCII."""
    return re.fullmatch(rb"[!-~]{1,%d}" % MAX_KIND_BYTES, kind) is not None


def decode_texts(raw: Array) -> list[str]:
    """Return an array of null-padded bytes as texts, the inverse of `encode_texts`."""
    values = raw.tolist()
    try:
        # One decode of the joined bytes is several times faster than one decode a row.
        joined: list[str] = b"\0".join(values).decode("utf-8").split("\0") if values else []
    except UnicodeDecodeError:
        return [os.fsdecode(value) for value in values]
    return joined if len(joined) == len(values) else [os.fsdecode(value) for value in values]


def sha256_of(data: Array | bytes) -> str:
    """Return the SHA-256 of an array's bytes in hexadecimal."""
    return hashlib.sha256(data if isinstance(data, bytes) else np.ascontiguousarray(data).data).hexdigest()


def content_id(digest: str, columns: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Return the hash of what a store holds: spec digest and (name, dtype, shape, sha256) of its columns.

    Times of files are left out, so the same images embedded the same way give the same id however it came about.
    """
    facts = sorted([name, dtype, list(shape), sha256] for name, dtype, shape, sha256 in columns)
    return hashlib.sha256(canonical_json([digest, facts]).encode()).hexdigest()


def identity(names: Iterable[str]) -> list[str]:
    """Return those of a store's datasets that decide its content id: not times, sizes, failures and checksums."""
    known = ("embeddings", "ids", "content_sha256", "labels", "label_names")
    return sorted(name for name in names if name in known or name.startswith("layers/"))


def read_header(path: Path, attributes: Attributes) -> tuple[dict[str, Any], EmbeddingSpec, dict[str, EmbeddingSpec]]:
    """Return a store's provenance, its spec and those of its layers, from the attributes of the file.

    Raises
    ------
    StoreFormatError
        When they are not those of a store that this version reads.
    """
    if attributes.get("format") != FORMAT:
        raise StoreFormatError(f"{path} is an HDF5 file, but not an embedkit store")
    version = attributes.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreFormatError(
            f"{path} has schema version {version}, this embedkit reads {SCHEMA_VERSION}; "
            "install the embedkit that wrote it, or a newer one"
        )
    try:
        provenance = json.loads(str(attributes["provenance"]))
        _check_depth(provenance)
        canonical_json(provenance)  # NaN and infinity are read, and would be an error of whoever writes them again.
        spec = EmbeddingSpec.from_dict(provenance["identity"])
        layers = {name: EmbeddingSpec.from_dict(values) for name, values in provenance.get("layers", {}).items()}
        digest = spec.digest
        wrong = [name for name in layers if not is_layer_name(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if str(error).isprintable() else repr(str(error))  # It may quote the file.
        raise StoreFormatError(f"{path}: its provenance cannot be read: {reason}") from error
    if wrong:
        raise StoreFormatError(
            f"{path} has the layer {wrong[0]!r}; layers have printable names of 1 to 64 bytes without a slash"
        )
    if digest != attributes.get("digest"):
        raise StoreFormatError(f"{path}: its digest does not match its own spec; the file was altered")
    if not re.fullmatch("[0-9a-f]{64}", str(attributes.get("content_id"))):
        raise StoreFormatError(f"{path}: its content_id is not 64 hexadecimal digits; the file was altered")
    return provenance, spec, layers


def is_layer_name(name: str) -> bool:
    """Return whether a layer may have a name: printable, of 1 to 64 bytes, without a slash."""
    return 0 < len(name.encode()) <= MAX_LAYER_BYTES and "/" not in name and name.isprintable()


def is_path(value: Any) -> TypeGuard[str]:
    """Return whether a JSON value can be the path of a file, on this system or another."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _check_depth(value: Any) -> None:
    """Raise ValueError for JSON so deep that whoever walks through it runs out of stack, here or later."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner for item in level if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]  # fmt: skip
    if level:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")


_TEXT = ("S",)
# Of each column: the types that it may have, and its shape behind the rows.
_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "ids": (_TEXT, ()),
    "sizes": (("<u8",), ()),
    "mtimes_ns": (("<i8",), ()),
    "content_sha256": (("|u1",), (32,)),
    "failures/ids": (_TEXT, ()),
    "failures/errors": (_TEXT, ()),
    "failures/sizes": (("<u8",), ()),
    "failures/mtimes_ns": (("<i8",), ()),
    "failures/kinds": (tuple(f"|S{width}" for width in range(1, MAX_KIND_BYTES + 1)), ()),
    "labels": (("<i4",), ()),
    "label_names": (_TEXT, ()),
}


def check_columns(
    path: Path, datasets: Mapping[str, Dataset], spec: EmbeddingSpec, layers: Mapping[str, EmbeddingSpec]
) -> None:
    """Raise StoreFormatError unless a store has all its datasets, in types and shapes that agree."""
    wanted = {"embeddings": spec, **{f"layers/{name}": layer for name, layer in layers.items()}}
    absent = {"failures/kinds"} - datasets.keys() | (set() if "labels" in datasets else {"labels", "label_names"})
    columns = [name for name in _COLUMNS if name not in absent]
    for name in [*wanted, *columns]:
        if name not in datasets:
            raise StoreFormatError(f"{path} is not an embedkit store: it has no dataset /{name}")
    rows = {"": datasets["ids"].shape[:1], "failures/": datasets["failures/ids"].shape[:1]}
    for name, layer in wanted.items():
        found = datasets[name]
        if found.shape != (*rows[""], layer.dim) or layer.dim < 1 or found.dtype.str not in ("<f4", "<f2"):
            raise StoreFormatError(
                f"{path}: /{name} is {found.dtype} of shape {found.shape} for {rows[''][0] if rows[''] else 0} ids; "
                f"expected float rows of width {layer.dim}"
            )
    for name in columns:
        types, tail = _COLUMNS[name]
        found = datasets[name]
        count = found.shape[:1] if name == "label_names" else rows["failures/" if name.startswith("failures/") else ""]
        typed = found.dtype.str in types or found.dtype.kind in types
        if not typed or found.shape != (*count, *tail) or len(found.shape) != 1 + len(tail):
            raise StoreFormatError(
                f"{path}: /{name} is {found.dtype} of shape {found.shape} for {count[0] if count else 0} rows"
            )


@dataclass(frozen=True)
class Pieces:
    """A file's metadata as (offset, bytes), where its datasets lie, and how many bytes it has in all."""

    metadata: list[tuple[int, bytes]]
    offsets: dict[str, int]
    size: int


def lay_out(datasets: Mapping[str, tuple[tuple[int, ...], Any]], attributes: Mapping[str, Attributes]) -> Pieces:
    """Have the HDF5 library lay out a file in memory, without the datasets' bytes.

    The result depends on nothing but the arguments, and offsets not on the attributes' values, only on their lengths.
    So a file is laid out once to learn where its bytes go, and again when their checksums are known. Every byte that
    reaches the disk is written by us: a full disk is then an error like any other, and not one inside the library.

    Parameters
    ----------
    datasets : mapping of str to (shape, dtype)
        By path. Contiguous, in this order.
    attributes : mapping of str to mapping
        Of each dataset, and of the root under the empty path: integers and texts, at most eight of each. HDF5 would
        keep more of them outside of the object header.
    """
    import h5py  # A tenth of a second that reading a store need not wait for.

    pages = _Pages()
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(
        False
    )  # Of the root; otherwise the same store would differ from one second to another.
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    # Superblock 2 has checksummed object headers, and no consistency flags that a killed process would leave behind.
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    # On 64-byte boundaries for SIMD, yet off page boundaries, where reads are measurably slower.
    access.set_alignment(1, 64)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, pages)
    file = h5py.File(h5py.h5f.create(b"store", h5py.h5f.ACC_TRUNC, creation, access))
    try:
        offsets = {}
        for path, (shape, dtype) in datasets.items():
            *groups, name = path.split("/")
            group = file.require_group("/".join(groups)) if groups else file
            dataset = _create(group, name, shape, np.dtype(dtype))
            offsets[path] = dataset.id.get_offset() or 0
            _set_attributes(dataset, attributes.get(path, {}))
        _set_attributes(file, attributes.get("", {}))
    finally:
        file.close()
        access.close()
    return Pieces(sorted(pages.written.items()), offsets, pages.end)


def _create(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> h5py.Dataset:
    """Create a contiguous dataset whose space exists at once and is not filled."""
    import h5py

    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plist.set_obj_track_times(False)  # Times would make two stores of the same images differ.
    text = h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype
    h5type = h5py.h5t.py_create(text, logical=True)
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), h5type, h5py.h5s.create_simple(shape), dcpl=plist))


def _set_attributes(target: h5py.HLObject, attributes: Attributes) -> None:
    import h5py

    for name, value in attributes.items():
        if isinstance(value, int):
            target.attrs[name] = np.int64(value)
        else:
            # Of fixed length: variable-length ones lie in a heap that HDF5 does not checksum.
            raw = value.encode("utf-8")
            target.attrs.create(name, np.array(raw), dtype=h5py.string_dtype("utf-8", max(1, len(raw))))


class _Pages:
    """A file in memory that holds what the library writes of a file of any size: a few kilobytes of metadata."""

    def __init__(self) -> None:
        self.written: dict[int, bytes] = {}
        self.position = self.end = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.end)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def write(self, data: memoryview) -> int:
        self.written[self.position] = bytes(data)
        self.position += len(data)
        self.end = max(self.end, self.position)
        return len(data)

    def readinto(self, out: memoryview) -> int:
        raise OSError("the layout of a new file is never read back")

    def truncate(self, size: int | None = None) -> int:
        self.end = self.position if size is None else size
        return self.end

    def flush(self) -> None:
        pass
