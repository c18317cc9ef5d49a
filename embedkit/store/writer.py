"""StoreWriter: collects rows beside the target and publishes them as one store."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import FAILURE_KINDS, EmbeddingShapeError, ImageError, StoreExistsError
from embedkit.spec import EmbeddingSpec
from embedkit.store import durable
from embedkit.store.assembling import Content, Gather, Header, publish
from embedkit.store.locking import Lock, now, parts_folder
from embedkit.store.matrix import Matrix, ReadOnlyFile
from embedkit.store.tables import Failures, Images, is_id, lookup


@dataclass
class _Columns:
    ids: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    mtimes_ns: list[int] = field(default_factory=list)
    content_sha256: list[bytes] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    failures: list[tuple[ImageError, int, int]] = field(default_factory=list)


class StoreWriter:
    """Writes one store; nothing appears at the target until `finalise`.

    Rows may come in any order: the finished store is sorted by the bytes of the ids. Memory holds the columns only,
    embeddings wait in a file beside the target. Nothing survives an interruption; `Run` is for what takes hours.

    Parameters
    ----------
    path : path-like
        The store to make.
    spec : EmbeddingSpec
        What produces the embeddings; its `dim` is their width.
    information : mapping, optional
        JSON values that explain the run without deciding the numbers: versions, host, root, how to load the backbone.
    overwrite : bool, default False
        Whether a store that exists at `path` may be replaced. False, because embeddings cost hours.

    Raises
    ------
    StoreExistsError
        When `path` exists and `overwrite` is false.
    StoreBusyError
        When another process is writing the store.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/tiny.h5", spec) as writer:
    ...     writer.append(np.eye(2), ["b.jpg", "a.jpg"])
    ...     writer.finalise()
    >>> Store.open(f"{folder.name}/tiny.h5").ids
    ['a.jpg', 'b.jpg']
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: EmbeddingSpec,
        *,
        information: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        refuse_existing(self.path, overwrite)
        self.header = Header(spec, uuid.uuid4().hex, now(), information=dict(information or {}))
        self._columns = _Columns()
        self._stack = ExitStack()
        self._handle = -1

    def __enter__(self) -> StoreWriter:
        with ExitStack() as stack:  # Should one of these fail, those before it are undone.
            stack.enter_context(Lock(parts_folder(self.path)))
            self._spool = stack.enter_context(durable.aside(parts_folder(self.path)))
            self._handle = durable.create(self._spool)
            stack.callback(os.close, self._handle)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def append(
        self,
        embeddings: npt.ArrayLike,
        ids: Sequence[str],
        *,
        sizes: Sequence[int] | npt.NDArray[Any] | None = None,
        mtimes_ns: Sequence[int] | npt.NDArray[Any] | None = None,
        content_sha256: Sequence[bytes] | npt.NDArray[Any] | None = None,
        labels: Sequence[str | None] | npt.NDArray[Any] | None = None,
    ) -> None:
        """Add rows. After an error none of them is added, and others may be.

        Parameters
        ----------
        embeddings : array of shape (b, d)
            Converted to float32; every number must be finite.
        ids : sequence of str of length b
            Unique in the store; paths that stay below their folder.
        sizes, mtimes_ns : sequence of int, optional
            Size in bytes and modification time of each file when it was read.
        content_sha256 : sequence of bytes, or uint8 array of shape (b, 32), optional
            SHA-256 of each file's bytes.
        labels : sequence of str or None, optional
            Class names.

        Raises
        ------
        EmbeddingShapeError
            When `embeddings` is not (len(ids), spec.dim).
        ValueError
            When a number is not finite, a column has another length than `ids`, or an id is no such path.
        OSError
            When the disk is full.
        """
        with np.errstate(all="ignore"):  # What is too large for float32 becomes infinite, and that is found below.
            rows = np.ascontiguousarray(embeddings, dtype="<f4")
        if rows.shape != (len(ids), self.header.spec.dim):
            raise EmbeddingShapeError(
                f"{self.path} takes {len(ids)} rows of width {self.header.spec.dim}, got shape {rows.shape}"
            )
        wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(wrong):
            raise ValueError(f"the embedding of {ids[wrong[0]]!r} has numbers that are not finite in float32")
        for id in ids:
            _check_id(id)
        count = len(ids)
        more = _Columns(
            list(ids),
            _column("sizes", sizes, count, 0),
            _column("mtimes_ns", mtimes_ns, count, 0),
            [bytes(sha256) for sha256 in _column("content_sha256", content_sha256, count, bytes(32))],
            _column("labels", labels, count, None),
        )
        if any(len(sha256) != 32 for sha256 in more.content_sha256):
            raise ValueError("content_sha256 has a hash that is not 32 bytes; give the digest, not its hexadecimal")
        self._spool_rows(rows)
        for name, column in vars(self._columns).items():
            column.extend(vars(more)[name])

    def _spool_rows(self, rows: npt.NDArray[np.float32]) -> None:
        """Write rows to the end of the spool, or nothing: half of a block would shift all rows that come later."""
        try:
            durable.write_all(self._handle, rows.data)
        except BaseException:
            end = len(self._columns.ids) * rows.itemsize * rows.shape[1]
            os.ftruncate(self._handle, end)
            os.lseek(self._handle, end, os.SEEK_SET)
            raise

    def fail(self, id: str, reason: str, kind: str = "damaged", *, size: int = 0, mtime_ns: int = 0) -> None:
        """Record an image that could not be read, once; it must not have a row as well."""
        _check_id(id)
        if kind not in FAILURE_KINDS:
            raise ValueError(f"{kind!r} is no kind of failure; expected one of {', '.join(FAILURE_KINDS)}")
        self._columns.failures.append((ImageError(id, reason, kind), size, mtime_ns))

    def finalise(self) -> None:
        """Write the store aside, make it durable, and rename it onto the target.

        Raises
        ------
        ValueError
            When two rows have the same id, or a failed image has a row or failed twice.
        OSError
            When the disk is full.
        """
        columns = self._columns
        encoded = [os.fsencode(id) for id in columns.ids]
        order = sorted(range(len(encoded)), key=encoded.__getitem__)
        for left, right in itertools.pairwise(order):
            if encoded[left] == encoded[right]:
                raise ValueError(f"two rows have the id {columns.ids[left]!r}; ids are unique in a store")
        rows = np.array(order, dtype=np.int64)
        images = Images.of(columns.ids, columns.sizes, columns.mtimes_ns, columns.content_sha256).take(rows)
        classes = sorted({label for label in columns.labels if label is not None}, key=os.fsencode)
        codes = {label: code for code, label in enumerate(classes)}
        labels = np.array([-1 if label is None else codes[label] for label in columns.labels], dtype="<i4")[rows]
        dim = self.header.spec.dim
        spool = Matrix(ReadOnlyFile(self._spool, keep=True), 0, (len(rows), dim), np.dtype("<f4"), passing=True)
        gather = Gather([spool], np.zeros(len(rows), dtype=np.int64), rows, dim)
        content = Content(images, self._failures(images), labels if classes else None, classes, gather)
        publish(self.path, self._spool.parent, self.header, content)

    def _failures(self, images: Images) -> Failures:
        given = sorted(self._columns.failures, key=lambda failure: os.fsencode(failure[0].id))
        failures = Failures.of(
            [error for error, _, _ in given], [size for _, size, _ in given], [mtime for *_, mtime in given]
        )
        twice = np.append(failures.ids[1:] == failures.ids[:-1], False) | (lookup(images.ids, failures.ids) >= 0)
        if twice.any():
            id = os.fsdecode(bytes(failures.ids[twice][0]))
            raise ValueError(f"{id!r} failed and has a row, or failed twice; a store knows each image once")
        return failures


def _check_id(id: str) -> None:
    if not is_id(os.fsencode(id)):
        raise ValueError(f"{id!r} cannot be the id of an image; expected a relative path that stays below its folder")


def _column(name: str, values: Any, count: int, missing: Any) -> list[Any]:
    """Return one value for each row; that for missing ones where there is no such column."""
    if values is None:
        return [missing] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} values for {count} rows; give one for each, or none at all")
    return list(values)


def refuse_existing(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise StoreExistsError when a store may not be written to `path`; worth knowing before hours of work."""
    path = Path(path)
    if path.is_dir():
        raise StoreExistsError(f"{path} is a folder; a store is one file: name one, such as {path}.h5")
    if path.exists() and not overwrite:
        raise StoreExistsError(f"{path} exists already; choose another name or pass --overwrite (overwrite=True)")
