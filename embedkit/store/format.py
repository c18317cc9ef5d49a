"""Schema v1: names, types and checksums of a store's datasets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from embedkit.spec import canonical_json

FORMAT = "embedkit-store"
SCHEMA_VERSION = 1
BLOCK_ROWS = 4096
MAX_PROVENANCE_BYTES = 64 * 1024

# Superblock 2 has checksummed object headers and no consistency flags that a killed process would leave behind.
LIBVER = ("v108", "v108")
# Puts /embeddings on a 64-byte boundary for SIMD, yet off page boundaries, where reads are measurably slower.
ALIGNMENT = {"alignment_threshold": 4096, "alignment_interval": 64}

Array = npt.NDArray[Any]


def encode_texts(texts: Sequence[str]) -> Array:
    """Return texts as an array of null-padded bytes; undecodable file names keep their bytes."""
    encoded = [os.fsencode(text) for text in texts]
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")


def decode_texts(raw: Array) -> list[str]:
    """Return an array of null-padded bytes as texts, the inverse of `encode_texts`."""
    values = raw.tolist()
    try:
        # One decode of the joined bytes is several times faster than one decode a row.
        joined: list[str] = b"\0".join(values).decode("utf-8").split("\0") if values else []
    except UnicodeDecodeError:
        return [os.fsdecode(value) for value in values]
    return joined if len(joined) == len(values) else [os.fsdecode(value) for value in values]


def write_dataset(group: h5py.Group, name: str, data: Array) -> str:
    """Write one small contiguous dataset with its checksum, and return the checksum."""
    data = np.ascontiguousarray(data)
    dtype = h5py.string_dtype("utf-8", data.dtype.itemsize) if data.dtype.kind == "S" else data.dtype
    dataset = create_dataset(group, name, data.shape, dtype)
    if data.size:
        dataset[...] = data.astype(dtype) if data.dtype.kind == "S" else data
    return seal(dataset, hashlib.sha256(data.tobytes()).hexdigest())


def create_dataset(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any) -> h5py.Dataset:
    """Create a contiguous dataset whose space exists at once and is not zero-filled first."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # Times would make two stores of the same images differ.
    plist.set_obj_track_times(False)
    h5type = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), h5type, space, dcpl=plist))


def seal(dataset: h5py.Dataset, sha256: str) -> str:
    """Attach a dataset's checksum."""
    set_text(dataset, "sha256", sha256)
    return sha256


def set_text(target: h5py.HLObject, name: str, text: str) -> None:
    """Set a text attribute of fixed length: variable-length ones lie in a heap that HDF5 does not checksum."""
    raw = text.encode("utf-8")
    target.attrs.create(name, np.array(raw), dtype=h5py.string_dtype("utf-8", max(1, len(raw))))


def get_text(target: h5py.HLObject, name: str) -> str:
    """Return a text attribute."""
    value = target.attrs[name]
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def content_id(digest: str, columns: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Return the hash of what a store holds: spec digest and (name, dtype, shape, sha256) of its columns.

    Times of files are left out, so the same images embedded the same way give the same id however it came about.
    """
    facts = sorted([name, dtype, list(shape), sha256] for name, dtype, shape, sha256 in columns)
    return hashlib.sha256(canonical_json([digest, facts]).encode()).hexdigest()
