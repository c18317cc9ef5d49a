"""What a store records of its images, a column each: of those that were embedded, and of those that failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError
from embedkit.store import format as schema

Array = npt.NDArray[Any]
Self = TypeVar("Self", bound="_Table")


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that could not be read.

    Attributes
    ----------
    id : str
    error : str
        Why, in one line.
    kind : str
        One of `embedkit.errors.FAILURE_KINDS`, a word that a later version knows, or "unknown" in a store that was
        written before there were kinds.
    """

    id: str
    error: str
    kind: str


class _Table:
    """Columns of one length."""

    ids: Array

    def __len__(self) -> int:
        return len(self.ids)

    def take(self: Self, rows: Array) -> Self:
        """Return the given rows, in the given order."""
        return dataclasses.replace(  # type: ignore[type-var]
            self, **{name: column[rows] for name, column in vars(self).items()}
        )

    @classmethod
    def join(cls: type[Self], tables: Sequence[Self]) -> Self:
        """Return all rows of several tables, one table after the other."""
        parts = [cls.empty(), *tables]
        return cls(**{name: np.concatenate([vars(table)[name] for table in parts]) for name in vars(parts[0])})

    @classmethod
    def empty(cls: type[Self]) -> Self:
        """Return a table without rows."""
        return cls(**{name: np.empty(shape, dtype) for name, (shape, dtype) in _COLUMNS.items() if name in _names(cls)})


@dataclass(frozen=True)
class Images(_Table):
    """The images of a store's rows.

    Attributes
    ----------
    ids : array of bytes of shape (n,)
    sizes : uint64 (n,)
        Bytes in the file when it was read.
    mtimes_ns : int64 (n,)
        Its modification time then, in nanoseconds since 1970.
    content_sha256 : uint8 (n, 32)
        SHA-256 of its bytes.
    """

    ids: Array
    sizes: Array
    mtimes_ns: Array
    content_sha256: Array

    @classmethod
    def of(
        cls, ids: Sequence[str], sizes: Sequence[int], mtimes_ns: Sequence[int], content_sha256: Sequence[bytes]
    ) -> Images:
        """Return the columns of images."""
        hashes = np.frombuffer(b"".join(content_sha256), dtype=np.uint8).reshape(-1, 32)
        return cls(schema.encode_texts(ids), np.array(sizes, dtype="<u8"), np.array(mtimes_ns, dtype="<i8"), hashes)


@dataclass(frozen=True)
class Failures(_Table):
    """The images that could not be read; `errors` and `kinds` hold the reasons and their kinds as bytes of (m,)."""

    ids: Array
    errors: Array
    sizes: Array
    mtimes_ns: Array
    kinds: Array

    @classmethod
    def of(cls, errors: Sequence[ImageError], sizes: Sequence[int], mtimes_ns: Sequence[int]) -> Failures:
        """Return the columns of failures."""
        return cls(
            schema.encode_texts([error.id for error in errors]),
            schema.encode_reasons([error.reason for error in errors]),
            np.array(sizes, dtype="<u8"),
            np.array(mtimes_ns, dtype="<i8"),
            schema.encode_kinds([error.kind for error in errors]),
        )

    @classmethod
    def read(cls, column: Callable[[str], Array], names: Container[str]) -> Failures:
        """Return the columns of a file that has datasets of some names; where it has no kinds, they are unknown."""
        ids, errors, sizes, mtimes_ns = (column(f"failures/{name}") for name in ("ids", "errors", "sizes", "mtimes_ns"))
        known = "failures/kinds" in names
        kinds = column("failures/kinds") if known else np.full(len(ids), schema.UNKNOWN_KIND.encode())
        return cls(ids, errors, sizes, mtimes_ns, kinds)

    def datasets(self) -> dict[str, Array]:
        """Return the columns as they are written: without failures no kinds, and the file is as it was before them."""
        names = [name for name in vars(self) if name != "kinds" or len(self)]
        return {f"failures/{name}": vars(self)[name] for name in names}

    def listed(self) -> list[Failure]:
        """Return the failures one by one, whatever is stored."""
        texts = (schema.decode_texts(column) for column in (self.ids, self.errors, self.kinds))
        return [Failure(*texts) for texts in zip(*texts, strict=True)]


_COLUMNS: dict[str, tuple[tuple[int, ...], str]] = {
    "ids": ((0,), "S1"),
    "errors": ((0,), "S1"),
    "kinds": ((0,), "S1"),
    "sizes": ((0,), "<u8"),
    "mtimes_ns": ((0,), "<i8"),
    "content_sha256": ((0, 32), "u1"),
}


def _names(table: type[_Table]) -> set[str]:
    return {field.name for field in dataclasses.fields(table)}  # type: ignore[arg-type]


def is_id(id: bytes) -> bool:
    """Return whether an image may be called so: a path that stays below whatever folder it is joined with."""
    return bool(id) and not id.startswith(b"/") and b"\0" not in id and (b".." not in id or b".." not in id.split(b"/"))


def lookup(sorted_ids: Array, ids: Array) -> npt.NDArray[np.int64]:
    """Return the position of each id among sorted unique ids, -1 where it is not among them."""
    if len(sorted_ids) == len(ids) and np.array_equal(sorted_ids, ids):
        return np.arange(len(ids), dtype=np.int64)
    if not len(sorted_ids):
        return np.full(len(ids), -1, dtype=np.int64)
    at = np.searchsorted(sorted_ids, ids).clip(max=len(sorted_ids) - 1)
    return np.where(sorted_ids[at] == ids, at, -1).astype(np.int64)


@dataclass(frozen=True)
class Inventory:
    """What a store should hold: the images there are now, sorted by the bytes of their ids.

    Attributes
    ----------
    ids : array of bytes of shape (n,)
    sizes, mtimes_ns : int64 (n,)
        As the file system says now.
    labels : int32 (n,), or None
        Codes into `classes`, -1 for none.
    classes : sequence of str
    failures : sequence of ImageError
        What is known to be no image without reading it.
    """

    ids: Array
    sizes: Array
    mtimes_ns: Array
    labels: Array | None = None
    classes: Sequence[str] = ()
    failures: Sequence[ImageError] = ()

    def __len__(self) -> int:
        return len(self.ids)
