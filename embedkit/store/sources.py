"""Embeddings in the files of other programs: where their rows lie and what they are called."""

from __future__ import annotations

import csv
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.errors import StoreFormatError, StoreNotFoundError
from embedkit.store import durable
from embedkit.store.exporting import NPY_FORMAT
from embedkit.store.format import MAX_ID_BYTES
from embedkit.store.vectors import (
    BLOCK_ROWS,
    Array,
    Vectors,
    checked_shape,
    is_vector,
    npy_header,
    npy_vectors,
    open_table,
    parquet_vectors,
    reading,
    stored_vectors,
)

Texts = list[str | None]

SUPPORTED = (
    ".npy (with a file of names), .npz, .parquet, .safetensors, or a folder of thingsvision (features.npy, "
    "file_names.txt) or clip-retrieval (img_emb, metadata)"
)
_MAX_HEADER_BYTES = 100_000_000
_BOMB_BYTES = 1 << 30
_ID_COLUMNS = ("id", "path", "image_path", "file_name", "filename")
_VECTOR_COLUMNS = ("embedding", "embeddings", "features")
_TENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_COLUMNS = {"ids": "U8", "labels": "I32", "sizes": "U64", "mtimes_ns": "I64", "content_sha256": "U8"}


@dataclass
class Source:
    """What is to become a store; its ids, labels and numbers are not checked yet.

    Attributes
    ----------
    path : Path
        For messages.
    vectors : Vectors
    ids : list of str or None
    labels : list of str or None, optional
    sizes, mtimes_ns : list of int, optional
    content_sha256 : list of bytes, optional
    provenance : JSON value, optional
        Of the store that was exported to this source.
    """

    path: Path
    vectors: Vectors
    ids: Texts
    labels: Texts | None = None
    sizes: list[int] | None = None
    mtimes_ns: list[int] | None = None
    content_sha256: list[bytes] | None = None
    provenance: Any = None


def open_source(path: Path, names: Path | None, scratch: Path, stack: ExitStack) -> Source:
    """Find out what a file or folder holds.

    Parameters
    ----------
    path, names : Path
        The embeddings, and what their rows are called where they do not say so themselves.
    scratch : Path
        A folder for what has to be unpacked.
    stack : ExitStack
        Removes what was unpacked.
    """
    for needed in (path, *([names] if names else [])):
        if not needed.exists():
            raise StoreNotFoundError(f"{needed} does not exist")
    suffix = path.suffix.lower()
    if path.is_dir():
        found = _clip_retrieval(path) if (path / "img_emb").is_dir() else _thingsvision(path)
    elif suffix == ".npy":
        return _npy(path, names)
    elif suffix == ".npz":
        return _npz(path, names, scratch, stack)
    elif suffix == ".parquet":
        found = _parquet(path)
    elif suffix == ".safetensors":
        found = _safetensors(path)
    else:
        raise StoreFormatError(f"{path} cannot be imported; what can: {SUPPORTED}")
    if names:
        raise _superfluous(path, names)
    return found


def _superfluous(path: Path, names: Path) -> StoreFormatError:
    return StoreFormatError(f"{path} says itself what its rows are called; leave out the names in {names}")


# --- NumPy


def _npy(path: Path, names: Path | None) -> Source:
    vectors, notes = npy_vectors(path), path.with_suffix(".json")
    values = _notes(notes)
    if values is not None:
        if names:
            raise _superfluous(path, names)
        with reading(notes):
            return _exported_npy(path, vectors, values)
    if names is None:
        raise StoreFormatError(
            f"{path} does not say what its rows are called; give a file of names (names=...): .txt, .json, .csv, .tsv "
            "or .parquet"
        )
    return Source(path, vectors, *read_names(names))


def _notes(path: Path) -> dict[str, Any] | None:
    """Return what an export wrote beside its .npy; None when there is no such file, or one that is not ours."""
    if not path.is_file():
        return None
    with reading(path):
        with open(path, "rb") as file:
            if NPY_FORMAT.encode() not in file.read(64):
                return None
        values: dict[str, Any] = json.loads(path.read_bytes())
        return values if values["format"] == NPY_FORMAT else None


def _exported_npy(path: Path, vectors: Vectors, values: dict[str, Any]) -> Source:
    labels = values["labels"]
    return Source(
        path,
        vectors,
        _texts(values["ids"]),
        None if labels is None else _labels(_integers(labels), _texts(values["classes"])),
        _integers(values["sizes"]),
        _integers(values["mtimes_ns"]),
        [bytes.fromhex(text) for text in values["content_sha256"]],
        values["provenance"],
    )


def _integers(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("a column of integers has something else")
    return values


def _texts(values: Any) -> Texts:
    if not isinstance(values, list):
        raise ValueError("a list of texts is something else")
    return [_text(value) for value in values]


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if type(value) is int:
        return str(value)
    raise ValueError(f"{value!r} is not text")


def _labels(codes: Sequence[int], classes: Texts) -> Texts:
    if codes and not -1 <= min(codes) <= max(codes) < len(classes):
        raise ValueError("labels have codes that name no class")
    return [classes[code] if code >= 0 else None for code in codes]


def _npz(path: Path, names: Path | None, scratch: Path, stack: ExitStack) -> Source:
    with reading(path), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        rows = next((members[name] for name in ("embeddings", "features", "arr_0") if name in members), None)
        called = next((members[name] for name in ("ids", "paths", "filenames", "names") if name in members), None)
        if rows is None:
            raise ValueError(f"none of its arrays {sorted(members)} is embeddings, features or arr_0")
        if called is None and names is None:
            raise ValueError(f"none of its arrays {sorted(members)} is ids, paths, filenames or names; give names=...")
        if called is not None and names is not None:
            raise _superfluous(path, names)
        with archive.open(rows) as file:
            shape, _, dtype = npy_header(file)
            count, _ = checked_shape(shape, dtype, rows.file_size - file.tell())
        if rows.file_size > _BOMB_BYTES and rows.file_size > 100 * rows.compress_size:
            raise ValueError(f"{rows.compress_size:,} bytes would unpack to {rows.file_size:,}")
        ids = [] if called is None else _npz_texts(archive, called, count)
    # Unpacked: an archive reads from front to back only, and rows may lie in any order and be read twice.
    unpacked = stack.enter_context(durable.aside(scratch))
    with open(unpacked, "xb") as out:
        for chunk in _unpacked(path, rows):
            out.write(chunk)
    vectors = npy_vectors(unpacked, path)
    return Source(path, vectors, ids) if names is None else Source(path, vectors, *read_names(names))


def _unpacked(path: Path, member: zipfile.ZipInfo) -> Iterator[bytes]:
    with reading(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _npz_texts(archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: int) -> Texts:
    texts: Texts = []
    with archive.open(member) as file:
        shape, _, dtype = npy_header(file)
        if dtype.kind not in "US" or shape != (count,) or not 0 < dtype.itemsize <= 4 * MAX_ID_BYTES:
            raise ValueError(f"{member.filename} is {dtype} of shape {shape}, expected {count} texts")
        for start in range(0, count, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, count - start)
            block = np.frombuffer(file.read(rows * dtype.itemsize), dtype)
            if not all(block.tolist()):  # At once: an archive has room for any number of nothings.
                raise ValueError(f"{member.filename} has empty texts")
            texts += _texts(block.tolist())
    return texts


# --- Parquet


def _parquet(path: Path) -> Source:
    with open_table(path) as table:
        columns = table.schema_arrow
        text = (columns.metadata or {}).get(b"embedkit")
        count = table.metadata.num_rows
        if text is not None and "embedding" in columns.names:
            found = _read_columns(path, ["id", "size", "mtime_ns", "content_sha256"], optionally=["label"])
            labels = _texts(found["label"]) if "label" in found else None
            return Source(
                path, parquet_vectors(path, "embedding", count), _texts(found["id"]), labels,
                _integers(found["size"]), _integers(found["mtime_ns"]), found["content_sha256"], json.loads(text),
            )  # fmt: skip
        vectors = [name for name in columns.names if is_vector(columns.field(name).type)]
        named = [name for name in _VECTOR_COLUMNS if name in vectors]
        if not named and len(vectors) != 1:
            raise ValueError(f"one column of lists of floats is needed, there are {vectors} among {columns.names}")
        ids, labels = _named_columns(path, columns.names)
        return Source(path, parquet_vectors(path, (named or vectors)[0], count), ids, labels)


def _read_columns(path: Path, names: Sequence[str], optionally: Sequence[str] = ()) -> dict[str, Any]:
    with open_table(path) as table:
        names = [*names, *(name for name in optionally if name in table.schema_arrow.names)]
        found: dict[str, Any] = {name: [] for name in names}
        for batch in table.iter_batches(batch_size=65536, columns=names):
            for name in names:
                found[name] += batch.column(batch.schema.get_field_index(name)).to_pylist()
    return found


def _named_columns(path: Path, columns: Sequence[str]) -> tuple[Texts, Texts | None]:
    """Return the ids of a table, and the labels where it has some."""
    column = next((name for name in _ID_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(f"none of its columns {list(columns)} is {', '.join(_ID_COLUMNS)}")
    found = _read_columns(path, [column], optionally=["label"])
    return _texts(found[column]), _texts(found["label"]) if "label" in found else None


# --- safetensors


def _safetensors(path: Path) -> Source:
    with reading(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"its header would have {length:,} bytes")
        tensors = json.loads(file.read(length), object_pairs_hook=_unique)
        metadata = tensors.pop("__metadata__", {})
        if "embedkit" not in metadata:
            raise ValueError("it was not exported by embedkit, so nothing says what its tensors are")
        base = 8 + length
        _check_tensors(tensors, size - base)
        count, dim = tensors["embeddings"]["shape"]
        if tensors["embeddings"]["dtype"] != "F32" or dim < 1:
            raise ValueError("its embeddings are not float32 of shape (rows, width)")

        def column(name: str, *tail: int) -> Array:
            entry = tensors[name]
            if entry["dtype"] != _COLUMNS[name] or entry["shape"] != [count, *tail]:
                raise ValueError(f"{name} is {entry['dtype']} of shape {entry['shape']} for {count} rows")
            file.seek(base + entry["data_offsets"][0])
            dtype = np.dtype(_TENSORS[entry["dtype"]])
            values: Array = np.frombuffer(file.read(prod(entry["shape"]) * dtype.itemsize), dtype).reshape(
                entry["shape"]
            )
            return values

        width = tensors["ids"]["shape"][-1]
        texts = np.ascontiguousarray(column("ids", width)).view(f"S{width}").reshape(count)
        codes = column("labels").tolist() if "labels" in tensors else None
        return Source(
            path,
            stored_vectors(path, path, np.dtype("<f4"), base + tensors["embeddings"]["data_offsets"][0], (count, dim)),
            _texts(texts.tolist()),
            None if codes is None else _labels(codes, _texts(json.loads(metadata["classes"]))),
            column("sizes").tolist(),
            column("mtimes_ns").tolist(),
            [row.tobytes() for row in column("content_sha256", 32)],
            json.loads(metadata["embedkit"]),
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("its header has a name twice")
    return values


def _check_tensors(tensors: dict[str, Any], size: int) -> None:
    """Make sure that the tensors fill the file, one behind the other."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: _integers(item[1]["data_offsets"])):
        start, stop = entry["data_offsets"]
        shape = _integers(entry["shape"])
        itemsize = np.dtype(_TENSORS[entry["dtype"]]).itemsize
        if start != end or min([0, *shape]) < 0 or stop - start != prod(shape) * itemsize:
            raise ValueError(f"tensor {name!r} of shape {shape} does not lie where it should: {start} to {stop}")
        end = stop
    if end != size:
        raise ValueError(f"its tensors have {end:,} bytes, {size:,} are there")


# --- Folders


def _thingsvision(path: Path) -> Source:
    rows, names = path / "features.npy", path / "file_names.txt"
    if not rows.is_file():
        others = sorted(file.name for file in path.glob("features.*"))
        hint = f"it has {others[0]}: save the features as .npy instead" if others else f"what can: {SUPPORTED}"
        raise StoreFormatError(f"{path} has no features.npy and cannot be imported; {hint}")
    if not names.is_file():
        raise StoreFormatError(f"{path} has features.npy and no file_names.txt, which says what its rows are called")
    return Source(path, npy_vectors(rows), *read_names(names))


def _clip_retrieval(path: Path) -> Source:
    parts = _numbered(path / "img_emb", r"img_emb_(\d+)\.npy")
    tables = _numbered(path / "metadata", r"metadata_(\d+)\.parquet")
    if not parts or parts.keys() != tables.keys():
        alone = sorted(parts.keys() ^ tables.keys())
        raise StoreFormatError(
            f"{path}: every img_emb/img_emb_N.npy needs its metadata/metadata_N.parquet, "
            f"{f'number {alone[0]} is alone' if alone else 'there are none'}"
        )
    vectors: list[Vectors] = []
    ids: Texts = []
    for number, file in parts.items():
        part = npy_vectors(file)
        with open_table(tables[number]) as table:
            rows = table.metadata.num_rows
            if "image_path" not in table.schema_arrow.names:
                raise ValueError(f"image_path is not among its columns {table.schema_arrow.names}")
        if rows != part.count or part.dim != (vectors or [part])[0].dim:
            raise StoreFormatError(
                f"{file} has {part.count} rows of width {part.dim}, expected {rows} as in {tables[number]}, of width "
                f"{(vectors or [part])[0].dim}"
            )
        vectors.append(part)
        with reading(tables[number]):
            ids += _texts(_read_columns(tables[number], ["image_path"])["image_path"])
    count = sum(part.count for part in vectors)
    return Source(
        path, Vectors(count, vectors[0].dim, lambda: (block for part in vectors for block in part.blocks())), ids
    )


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Return files by the number in their names, in the order of the numbers: 10 comes after 9."""
    found: dict[int, Path] = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        if match := re.fullmatch(pattern, file.name):
            if int(match[1]) in found:
                raise StoreFormatError(f"{file} and {found[int(match[1])].name} have the same number")
            found[int(match[1])] = file
    return dict(sorted(found.items()))


# --- Names


def read_names(path: Path) -> tuple[Texts, Texts | None]:
    """Return what a file of names calls the rows, and their labels where it says so."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        with open_table(path) as table:
            return _named_columns(path, table.schema_arrow.names)
    if suffix not in (".txt", ".json", ".csv", ".tsv"):
        raise StoreFormatError(f"{path}: names come from .txt, .json, .csv, .tsv or .parquet")
    # Names of files need not be UTF-8; ids keep such bytes as Python does.
    with reading(path), open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if suffix == ".json":
            return _texts(json.load(file)), None
        if suffix == ".txt":
            lines = file.read().split("\n")
            return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])], None
        table = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
        columns = table.fieldnames or []
        column = next((name for name in _ID_COLUMNS if name in columns), None)
        if column is None:
            raise ValueError(f"none of its columns {list(columns)} is {', '.join(_ID_COLUMNS)}")
        ids: Texts = []
        labels: Texts = []
        for row in table:
            ids.append(row[column])
            labels.append(row.get("label") or None)
        return ids, labels if "label" in columns else None
