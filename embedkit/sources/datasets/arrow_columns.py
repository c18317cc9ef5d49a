"""The columns of a dataset's Arrow table that hold images and their classes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError

_OFFSETS = {"binary": np.int32, "large_binary": np.int64}


@dataclass(frozen=True, eq=False, repr=False)
class ImageColumn:
    """Images in an Arrow table: bytes, names of files, or both, in chunks that are read by any number of threads.

    Attributes
    ----------
    bytes_chunks, path_chunks : sequence of arrow array or None
        None where the column has no such part.
    starts : (chunks,) int64
        The first row of each chunk.
    sizes : (rows,) int64
        Of the bytes; 0 of a row without bytes.
    absent : (rows,) bool
        Whether there is neither.
    stored : (rows,) bool
        Whether there are bytes.
    """

    bytes_chunks: Sequence[Any] | None
    path_chunks: Sequence[Any] | None
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    absent: npt.NDArray[np.bool_]
    stored: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, dataset: Any, name: str, where: str) -> ImageColumn:
        """Look at a column of a dataset; what Arrow finds wrong with it, or cannot be images, is an ImageError."""
        column = dataset.data.table.column(name)
        try:
            column.validate(full=True)  # A damaged file may point anywhere, and Arrow follows without asking.
        except Exception as error:
            told = " ".join(str(error).split())[:200]
            raise ImageError(where, f"column {name} is damaged: {told}") from error
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        data, paths = _parts(column.type, chunks)
        if data is None and paths is None:
            raise ImageError(where, f"column {name} holds {column.type}, and no images", "not-an-image")
        lengths = np.array([len(chunk) for chunk in chunks], dtype=np.int64)
        null = _joined([_nulls(chunk) for chunk in chunks], bool)
        stored = ~null & (_joined([~_nulls(part) for part in data], bool) if data is not None else False)
        named = ~null & (_joined([~_nulls(part) for part in paths], bool) if paths is not None else False)
        sizes = (
            _joined([_sizes(part) for part in data], np.int64) if data is not None else np.zeros(len(null), np.int64)
        )
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)[: len(lengths)]
        return cls(data, paths, starts, np.where(stored, sizes, 0), ~stored & ~named, stored)

    def data(self, row: int) -> bytes | None:
        """Return the bytes of a row, where it has some."""
        if self.bytes_chunks is None or not self.stored[row]:
            return None
        chunk = int(np.searchsorted(self.starts, row, "right")) - 1
        found: bytes | None = self.bytes_chunks[chunk][row - int(self.starts[chunk])].as_py()
        return found

    def path(self, row: int) -> str | None:
        """Return the name of a file that a row has."""
        if self.path_chunks is None:
            return None
        chunk = int(np.searchsorted(self.starts, row, "right")) - 1
        found: str | None = self.path_chunks[chunk][row - int(self.starts[chunk])].as_py()
        return found

    def paths(self) -> Iterator[str | None]:
        """Yield the names of all rows."""
        if self.path_chunks is None:
            yield from itertools.repeat(None, len(self.sizes))
        else:
            for chunk in self.path_chunks:
                yield from chunk.to_pylist()

    def flaws(self, max_bytes: int) -> Iterator[tuple[int, str, str]]:
        """Yield row, reason and kind of what cannot be an image."""
        for row in np.flatnonzero(self.absent).tolist():
            yield row, "there is no image in this row", "empty"
        for row in np.flatnonzero(self.stored & (self.sizes == 0)).tolist():
            yield row, "the file is empty", "empty"
        for row in np.flatnonzero(self.sizes > max_bytes).tolist():
            yield row, f"{self.sizes[row]:,} bytes, and the limit is {max_bytes:,}", "too-large"


def find_image_column(dataset: Any, wanted: str | None, where: str) -> str:
    """Return the name of the column of images: the one that is wanted, or the only one."""
    features: dict[str, Any] = dict(dataset.features)
    if wanted is not None:
        return _present(features, wanted, where)
    found = [name for name, feature in features.items() if _is_image(feature)]
    if len(found) == 1:
        return found[0]
    columns = ", ".join(found or features)
    problem = "several columns of images" if found else "no column of images"
    raise ImageError(where, f"{problem}; name one of its columns: {columns}", "not-an-image")


def find_label_column(dataset: Any, wanted: str | None, where: str) -> str | None:
    """Return the name of the column of classes, where there is one: the one that is wanted, or the only one."""
    features: dict[str, Any] = dict(dataset.features)
    if wanted is not None:
        return _present(features, wanted, where)
    found = [name for name, feature in features.items() if hasattr(feature, "int2str")]
    if len(found) > 1 and "label" not in found:
        raise ImageError(where, f"several columns of classes; name one of them: {', '.join(found)}", "refused")
    return "label" if len(found) > 1 else next(iter(found), None)


def read_labels(dataset: Any, name: str | None, where: str) -> list[str | None]:
    """Return the class names of all rows, or nothing where there is no such column; -1 stands for no class."""
    if name is None:
        return []
    column, feature = dataset.data.table.column(name), dataset.features[name]
    classes = getattr(feature, "names", None) if hasattr(feature, "int2str") else None
    try:
        column.validate(full=True)
        values = column.to_pylist()
    except Exception as error:
        raise ImageError(where, f"column {name} is damaged") from error
    if classes is None:
        if not all(value is None or isinstance(value, str | int) for value in values):
            raise ImageError(where, f"column {name} holds {column.type}, and no names of classes", "refused")
        return [None if value is None else str(value) for value in values]
    labels: list[str | None] = []
    for row, value in enumerate(values):
        if value is not None and not (isinstance(value, int) and -1 <= value < len(classes)):
            raise ImageError(where, f"row {row} of column {name} is of class {value}, of {len(classes)} classes")
        labels.append(None if value is None or value == -1 else str(classes[value]))
    return labels


def _present(features: dict[str, Any], wanted: str, where: str) -> str:
    if wanted not in features:
        raise ImageError(where, f"no column {wanted}; its columns: {', '.join(features)}", "missing")
    return wanted


def _is_image(feature: Any) -> bool:
    """Return whether a feature is an image, or looks like one that lost its type."""
    return type(feature).__name__ == "Image" or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _parts(kind: Any, chunks: list[Any]) -> tuple[list[Any] | None, list[Any] | None]:
    """Return the chunks of the bytes and of the names in a column of a type."""
    if str(kind) in _OFFSETS:
        return chunks, None
    if not str(kind).startswith("struct<"):
        return None, None
    types = {part.name: str(part.type) for part in kind}
    data = [chunk.field("bytes") for chunk in chunks] if types.get("bytes") in _OFFSETS else None
    paths = [chunk.field("path") for chunk in chunks] if types.get("path") in ("string", "large_string") else None
    return data, paths


def _nulls(chunk: Any) -> npt.NDArray[np.bool_]:
    return np.asarray(chunk.is_null().to_numpy(zero_copy_only=False), dtype=bool)


def _sizes(chunk: Any) -> npt.NDArray[np.int64]:
    """Return how long the values of an array of bytes are, by its offsets alone."""
    offsets = np.frombuffer(chunk.buffers()[1], dtype=_OFFSETS[str(chunk.type)]).astype(np.int64)
    return offsets[chunk.offset + 1 : chunk.offset + len(chunk) + 1] - offsets[chunk.offset : chunk.offset + len(chunk)]


def _joined(parts: list[Any], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
