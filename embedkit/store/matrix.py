"""Arrays in a file, read by position: nothing is shared between readers but the immutable bytes."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_READ_BYTES = 1 << 30


class ReadOnlyFile:
    """A file to read at any position.

    Parameters
    ----------
    path : Path
        The file.
    keep : bool
        Whether it stays open, so that it can be replaced under its name while this reader goes on with the old bytes.
        Otherwise it is opened for each read: a run may have more parts than a process may have open files.
    """

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)) if keep else -1
        if keep:
            weakref.finalize(self, os.close, self._handle)

    @contextmanager
    def handle(self) -> Iterator[int]:
        """Yield a descriptor of the open file."""
        if self._handle >= 0:
            yield self._handle
            return
        handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            yield handle
        finally:
            os.close(handle)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        with self.handle() as handle:
            return os.fstat(handle).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from a position; fewer at the end of the file."""
        with self.handle() as handle:
            return _pread(handle, length, offset)

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return the array that lies at a position."""
        out = np.empty(shape, dtype=dtype)
        self.read_into(offset, out)
        return out

    def read_into(self, offset: int, out: npt.NDArray[Any]) -> None:
        """Fill an array with the bytes from a position."""
        view = memoryview(out.reshape(-1).view(np.uint8).data)
        with self.handle() as handle:
            done = 0
            while done < len(view):
                count = _preadv(handle, view[done : done + _READ_BYTES], offset + done)
                if count == 0:
                    raise OSError(f"{self.path} ends before byte {offset + len(view):,}; it was cut short")
                done += count


@dataclass(frozen=True)
class Matrix:
    """Rows of one width, contiguous in a file; `passing` when they are copied once and then the file is deleted."""

    file: ReadOnlyFile
    offset: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    passing: bool = False

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[1] * int(self.dtype.itemsize)

    @cached_property
    def map(self) -> npt.NDArray[Any]:
        """All rows, read-only, mapped without a copy."""
        if not self.shape[0] * self.row_bytes:
            return np.empty(self.shape, dtype=self.dtype)
        with self.file.handle() as handle, os.fdopen(os.dup(handle), "rb") as file:
            return np.memmap(file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)

    def read(self, start: int, stop: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return rows start to stop in memory, in `out` where it is given."""
        if out is None:
            out = np.empty((stop - start, self.shape[1]), dtype=self.dtype)
        self.file.read_into(self.offset + start * self.row_bytes, out)
        return out

    def forget(self, start: int, stop: int) -> None:
        """Let the kernel drop these rows from memory: a copy then need not wait for memory of its own."""
        if hasattr(os, "posix_fadvise"):
            with self.file.handle() as handle:
                length = (stop - start) * self.row_bytes
                os.posix_fadvise(handle, self.offset + start * self.row_bytes, length, os.POSIX_FADV_DONTNEED)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return rows in any order, with repeats.

        The kernel is first told about every row: it then fetches them side by side from the disk, instead of one after
        the other with megabytes of neighbours nobody asked for.
        """
        if hasattr(os, "posix_fadvise") and 8 * len(rows) < len(self):
            with self.file.handle() as handle:
                for row in rows.tolist():
                    os.posix_fadvise(handle, self.offset + row * self.row_bytes, self.row_bytes, os.POSIX_FADV_WILLNEED)
            return np.asarray(self._scattered[rows])
        return np.asarray(self.map[rows])

    @cached_property
    def _scattered(self) -> npt.NDArray[Any]:
        """The map again, for readers that jump about."""
        with self.file.handle() as handle, os.fdopen(os.dup(handle), "rb") as file:
            mapped = np.memmap(file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)
        base = mapped._mmap  # type: ignore[attr-defined]
        if hasattr(mmap, "MADV_RANDOM"):
            base.madvise(mmap.MADV_RANDOM)
        return mapped


if hasattr(os, "preadv"):

    def _pread(handle: int, length: int, offset: int) -> bytes:
        return os.pread(handle, length, offset)

    def _preadv(handle: int, out: memoryview, offset: int) -> int:
        return os.preadv(handle, [out], offset)

else:  # Windows. One position serves all threads there, so they take turns.
    _turn = threading.Lock()

    def _pread(handle: int, length: int, offset: int) -> bytes:
        with _turn:
            os.lseek(handle, offset, os.SEEK_SET)
            return os.read(handle, length)

    def _preadv(handle: int, out: memoryview, offset: int) -> int:
        data = _pread(handle, len(out), offset)
        out[: len(data)] = data
        return len(data)
