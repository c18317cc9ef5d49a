"""Rows of floats in the files of other programs, read a block at a time.

The files may be a stranger's. Nothing is ever unpickled, every size is checked before memory is taken for it, and
whatever a parser raises becomes a StoreFormatError that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbedkitError, StoreFormatError
from embedkit.store.exporting import optional, ranges

Array = npt.NDArray[Any]

BLOCK_ROWS = 4096
_BLOCK_BYTES = 64 << 20


@dataclass
class Vectors:
    """Rows of floats, as they lie in a file; `blocks` may be called again for another pass."""

    count: int
    dim: int
    blocks: Callable[[], Iterator[Array]]


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


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether the first axis varies fastest, and type of the array that a .npy file holds."""
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


def npy_vectors(path: Path, shown: Path | None = None) -> Vectors:
    """Return the rows of a .npy file; `shown` is its name in messages."""
    shown = shown or path
    with reading(shown), open(path, "rb") as file:
        shape, fortran, dtype = npy_header(file)
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
        count, dim = checked_shape(shape, dtype, size - offset)

    return stored_vectors(path, shown, dtype, offset, (count, dim), fortran)


def stored_vectors(
    path: Path, shown: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, int], fortran: bool = False
) -> Vectors:
    """Return the rows of an array that lies in a file."""

    def blocks() -> Iterator[Array]:
        with reading(shown), open(path, "rb") as file:
            file.seek(offset)
            for start, stop in ranges(shape[0], shape[1] * dtype.itemsize, BLOCK_ROWS, _BLOCK_BYTES):
                # Copies in any case: a map of a file that somebody cuts short ends the process, and none removes a file
                # that is mapped on Windows.
                if fortran:
                    yield np.array(np.memmap(path, dtype, "r", offset, shape, "F")[start:stop], order="C")
                else:
                    yield np.fromfile(file, dtype, (stop - start) * shape[1]).reshape(stop - start, shape[1])

    return Vectors(*shape, blocks)


def checked_shape(shape: Sequence[int], dtype: np.dtype[Any], size: int) -> tuple[int, int]:
    """Return rows and width of an array of embeddings that takes `size` bytes."""
    if dtype.kind != "f":
        raise ValueError(f"it holds {dtype}, and embeddings are floats")
    if len(shape) != 2 or shape[0] < 0 or shape[1] < 1:
        raise ValueError(f"embeddings have a shape of (rows, width), this array has {tuple(shape)}")
    if size != prod(shape) * dtype.itemsize:
        raise ValueError(f"{tuple(shape)} {dtype} take {prod(shape) * dtype.itemsize:,} bytes, there are {size:,}")
    return shape[0], shape[1]


@contextmanager
def open_table(path: Path) -> Iterator[Any]:
    """Open a Parquet file; its pages are read as they are needed, so a row group may be of any size."""
    parquet = optional("pyarrow.parquet", "pyarrow", "parquet")
    with (
        reading(path),
        open(path, "rb") as file,
        parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as table,
    ):
        yield table


def is_vector(kind: Any) -> bool:
    """Return whether an Arrow type is lists of floats."""
    kind = getattr(kind, "storage_type", kind)
    return str(kind).startswith(("list<", "large_list<", "fixed_size_list<")) and str(kind.value_type) in (
        "float", "double", "halffloat",
    )  # fmt: skip


def parquet_vectors(path: Path, column: str, count: int) -> Vectors:
    """Return the rows of a column of lists of floats."""

    def blocks() -> Iterator[Array]:
        start = 0
        for block in _column(path, column):
            yield _matrix(path, block, start, dim)
            start += len(block)

    with open_table(path) as table:
        kind = table.schema_arrow.field(column).type
    if not is_vector(kind):
        raise StoreFormatError(f"{path}: column {column} is {kind}, expected lists of floats")
    dim = getattr(getattr(kind, "storage_type", kind), "list_size", 0)
    if not dim:
        first = next((block for block in _column(path, column) if len(block)), None)
        dim = 0 if first is None or first[0].as_py() is None else len(first[0].as_py())
    if dim < 1:
        raise StoreFormatError(f"{path}: its first row in column {column} does not tell how wide embeddings are")
    return Vectors(count, dim, blocks)


def _column(path: Path, column: str) -> Iterator[Any]:
    with open_table(path) as table:
        for batch in table.iter_batches(batch_size=BLOCK_ROWS, columns=[column]):
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
