"""Embeddings in the files of other programs: where their rows lie and what they are called.

The files may be a stranger's. Nothing is ever unpickled, every size is checked before memory is taken for it, and
whatever a parser raises becomes a StoreFormatError that names the file.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbedkitError, StoreFormatError, StoreNotFoundError
from embedkit.store import durable
from embedkit.store.exporting import NPY_FORMAT

Array = npt.NDArray[Any]
Texts = list[str | None]

SUPPORTED = (
    ".npy (with a file of names), .npz, .parquet, .safetensors, or a folder of thingsvision (features.npy, "
    "file_names.txt) or clip-retrieval (img_emb, metadata)"
)
_ROWS = 4096
_BLOCK_BYTES = 64 << 20
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
class Vectors:
    """Rows of floats, as they lie in a file; `blocks` may be called again for another pass."""

    count: int
    dim: int
    blocks: Callable[[], Iterator[Array]]


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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a parser raises into a StoreFormatError that names the file."""
    try:
        yield
    except EmbedkitError:
        raise
    except Exception as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise StoreFormatError(f"{path} cannot be read, it is damaged or of another format: {reason}") from error


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
    vectors, notes = _npy_vectors(path), path.with_suffix(".json")
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


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"arrays of .npy version {version} are not plain numbers")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled; save plain numbers and texts")
    return shape, fortran, dtype


def _npy_vectors(path: Path, shown: Path | None = None) -> Vectors:
    """Return the rows of a .npy file; `shown` is its name in messages."""
    shown = shown or path
    with reading(shown), open(path, "rb") as file:
        shape, fortran, dtype = _npy_header(file)
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
        count, dim = _checked_shape(shape, dtype, size - offset)

    return _mapped(path, shown, dtype, offset, (count, dim), fortran)


def _mapped(
    path: Path, shown: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, int], fortran: bool = False
) -> Vectors:
    """Return the rows of an array that lies in a file."""

    def blocks() -> Iterator[Array]:
        row_bytes = shape[1] * dtype.itemsize
        with reading(shown):
            for start, stop in _ranges(shape[0], row_bytes):
                # A map for each block, so that what was read does not count as the memory of this process.
                if fortran:
                    yield np.memmap(path, dtype, "r", offset, shape, "F")[start:stop]
                else:
                    yield np.memmap(path, dtype, "r", offset + start * row_bytes, (stop - start, shape[1]))

    return Vectors(*shape, blocks)


def _checked_shape(shape: Sequence[int], dtype: np.dtype[Any], size: int) -> tuple[int, int]:
    """Return rows and width of an array of embeddings that takes `size` bytes."""
    if dtype.kind != "f":
        raise ValueError(f"it holds {dtype}, and embeddings are floats")
    if len(shape) != 2 or shape[0] < 0 or shape[1] < 1:
        raise ValueError(f"embeddings have a shape of (rows, width), this array has {tuple(shape)}")
    if size != prod(shape) * dtype.itemsize:
        raise ValueError(f"{tuple(shape)} {dtype} take {prod(shape) * dtype.itemsize:,} bytes, there are {size:,}")
    return shape[0], shape[1]


def _ranges(count: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    rows = max(1, min(_ROWS, _BLOCK_BYTES // row_bytes))
    for start in range(0, count, rows):
        yield start, min(start + rows, count)


def _npz(path: Path, names: Path | None, scratch: Path, stack: ExitStack) -> Source:
    with reading(path), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        rows = next((members[name] for name in ("embeddings", "features", "arr_0") if name in members), None)
        called = next((members[name] for name in ("ids", "paths", "filenames", "names") if name in members), None)
        if rows is None:
            raise ValueError(f"none of its arrays {sorted(members)} is embeddings, features or arr_0")
        if called is None and names is None:
            raise ValueError(f"none of its arrays {sorted(members)} is ids, paths, filenames or names, and names=...")
        if called is not None and names is not None:
            raise _superfluous(path, names)
        with archive.open(rows) as file:
            shape, _, dtype = _npy_header(file)
            count, _ = _checked_shape(shape, dtype, rows.file_size - file.tell())
        if rows.file_size > _BOMB_BYTES and rows.file_size > 100 * rows.compress_size:
            raise ValueError(f"{rows.compress_size:,} bytes would unpack to {rows.file_size:,}")
        ids = [] if called is None else _npz_texts(archive, called, count)
    # Unpacked, because a map reads any order of the axes, and twice, where an archive is read from the front.
    unpacked = stack.enter_context(durable.aside(scratch))
    with open(unpacked, "xb") as out:
        for chunk in _unpacked(path, rows):
            out.write(chunk)
    vectors = _npy_vectors(unpacked, path)
    return Source(path, vectors, ids) if names is None else Source(path, vectors, *read_names(names))


def _unpacked(path: Path, member: zipfile.ZipInfo) -> Iterator[bytes]:
    with reading(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _npz_texts(archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: int) -> Texts:
    texts: Texts = []
    with archive.open(member) as file:
        shape, _, dtype = _npy_header(file)
        if dtype.kind not in "US" or shape != (count,) or not 0 < dtype.itemsize <= 4 * MAX_ID_BYTES:
            raise ValueError(f"{member.filename} is {dtype} of shape {shape}, expected {count} texts")
        for start in range(0, count, _ROWS):
            rows = min(_ROWS, count - start)
            block = np.frombuffer(file.read(rows * dtype.itemsize), dtype)
            if len(block) < rows or not block.all():
                raise ValueError(f"{member.filename} is cut short or has empty texts")
            texts += _texts(block.tolist())
    return texts


# --- Parquet


def _parquet(path: Path) -> Source:
    with _table(path) as table:
        columns = table.schema_arrow
        text = (columns.metadata or {}).get(b"embedkit")
        count = table.metadata.num_rows
        if text is not None and "embedding" in columns.names:
            found = _read_columns(path, ["id", "size", "mtime_ns", "content_sha256"], optionally=["label"])
            return Source(
                path, _parquet_vectors(path, "embedding", count), _texts(found["id"]), found.get("label"),
                _integers(found["size"]), _integers(found["mtime_ns"]), found["content_sha256"], json.loads(text),
            )  # fmt: skip
        vectors = [name for name in columns.names if _is_vector(columns.field(name).type)]
        named = [name for name in _VECTOR_COLUMNS if name in vectors]
        if not named and len(vectors) != 1:
            raise ValueError(f"one column of lists of floats is needed, there are {vectors} among {columns.names}")
        ids, labels = _named_columns(path, columns.names)
        return Source(path, _parquet_vectors(path, (named or vectors)[0], count), ids, labels)


@contextmanager
def _table(path: Path) -> Iterator[Any]:
    """Open a Parquet file; its pages are read as they are needed, so a row group may be of any size."""
    parquet = optional("pyarrow.parquet", "pyarrow", "parquet")
    with reading(path), open(path, "rb") as file:
        with parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            yield table


def _is_vector(kind: Any) -> bool:
    kind = getattr(kind, "storage_type", kind)
    return str(kind).startswith(("list<", "large_list<", "fixed_size_list<")) and str(kind.value_type) in (
        "float", "double", "halffloat",
    )  # fmt: skip


def _parquet_vectors(path: Path, column: str, count: int) -> Vectors:
    def blocks() -> Iterator[Array]:
        start = 0
        for block in _column(path, column):
            yield _matrix(path, block, start, dim)
            start += len(block)

    with _table(path) as table:
        kind = table.schema_arrow.field(column).type
    if not _is_vector(kind):
        raise StoreFormatError(f"{path}: column {column} is {kind}, expected lists of floats")
    dim = getattr(getattr(kind, "storage_type", kind), "list_size", 0)
    if not dim:
        first = next((block for block in _column(path, column) if len(block)), None)
        dim = 0 if first is None or first[0].as_py() is None else len(first[0].as_py())
    if dim < 1:
        raise StoreFormatError(f"{path}: its first row in column {column} does not tell how wide embeddings are")
    return Vectors(count, dim, blocks)


def _column(path: Path, column: str) -> Iterator[Any]:
    with _table(path) as table:
        for batch in table.iter_batches(batch_size=_ROWS, columns=[column]):
            array = batch.column(batch.schema.get_field_index(column))
            yield getattr(array, "storage", array)


def _matrix(path: Path, array: Any, start: int, dim: int) -> Array:
    """Return an Arrow array of lists of floats as rows of one width."""
    with reading(path):
        lengths = np.array([dim]) if hasattr(array.type, "list_size") else array.value_lengths().to_numpy(False)
        if array.null_count or (lengths != dim).any():
            row = next(row for row, value in enumerate(array) if value.as_py() is None or len(value.as_py()) != dim)
            raise ValueError(f"row {start + row} has no embedding of width {dim}")
        values = array.flatten()
        if values.null_count:
            raise ValueError(f"an embedding among rows {start} to {start + len(array)} has missing numbers")
        rows: Array = values.to_numpy(zero_copy_only=False).reshape(-1, dim)
        return rows


def _read_columns(path: Path, names: Sequence[str], optionally: Sequence[str] = ()) -> dict[str, Any]:
    with _table(path) as table:
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
            return np.frombuffer(file.read(prod(entry["shape"]) * dtype.itemsize), dtype).reshape(entry["shape"])

        width = tensors["ids"]["shape"][-1]
        texts = np.ascontiguousarray(column("ids", width)).view(f"S{width}").reshape(count)
        codes = column("labels").tolist() if "labels" in tensors else None
        return Source(
            path,
            _mapped(path, path, np.dtype("<f4"), base + tensors["embeddings"]["data_offsets"][0], (count, dim)),
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
    return Source(path, _npy_vectors(rows), *read_names(names))


def _clip_retrieval(path: Path) -> Source:
    parts = _numbered(path / "img_emb", r"img_emb_(\d+)\.npy")
    tables = _numbered(path / "metadata", r"metadata_(\d+)\.parquet")
    if not parts or parts.keys() != tables.keys():
        alone = sorted(parts.keys() ^ tables.keys())
        raise StoreFormatError(
            f"{path}: every img_emb/img_emb_N.npy needs its metadata/metadata_N.parquet, "
            f"{f'number {alone[0]} is alone' if alone else 'there are none'}"
        )
    vectors, ids = [], []
    for number, file in parts.items():
        part = _npy_vectors(file)
        with _table(tables[number]) as table:
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
    return Source(path, Vectors(count, vectors[0].dim, lambda: (block for part in vectors for block in part.blocks())), ids)


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
        with _table(path) as table:
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
