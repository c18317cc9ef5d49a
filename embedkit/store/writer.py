"""StoreWriter: collects rows beside the target and publishes them as one file by a rename."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbeddingShapeError, StoreExistsError
from embedkit.spec import EmbeddingSpec, canonical_json
from embedkit.store import format as schema


@dataclass
class _Columns:
    ids: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    mtimes_ns: list[int] = field(default_factory=list)
    content_sha256: list[bytes] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    failures: list[tuple[str, str, int, int]] = field(default_factory=list)


class StoreWriter:
    """Writes one store; nothing appears at the target until `finalise`.

    Rows may come in any order: the finished store is sorted by the bytes of the ids. Memory holds the columns only,
    embeddings wait in a nameless temporary file beside the target.

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
        self.path = Path(path)
        self.spec = spec
        self.information = dict(information or {})
        refuse_existing(self.path, overwrite)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = _Columns()
        self._spool = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    def append(
        self,
        embeddings: npt.ArrayLike,
        ids: Sequence[str],
        *,
        sizes: Sequence[int] | None = None,
        mtimes_ns: Sequence[int] | None = None,
        content_sha256: Sequence[bytes] | None = None,
        labels: Sequence[str | None] | None = None,
    ) -> None:
        """Add rows.

        Parameters
        ----------
        embeddings : array of shape (b, d)
            Converted to float32.
        ids : sequence of str of length b
            Unique in the store.
        sizes, mtimes_ns : sequence of int, optional
            Size in bytes and modification time of each file when it was read.
        content_sha256 : sequence of bytes, optional
            SHA-256 of each file's bytes, 32 bytes each.
        labels : sequence of str or None, optional
            Class names.

        Raises
        ------
        EmbeddingShapeError
            When `embeddings` is not (len(ids), spec.dim).
        """
        rows = np.ascontiguousarray(embeddings, dtype="<f4")
        if rows.shape != (len(ids), self.spec.dim):
            raise EmbeddingShapeError(
                f"{self.path} takes {len(ids)} rows of width {self.spec.dim}, got shape {rows.shape}"
            )
        self._spool.write(rows.tobytes())
        columns, count = self._columns, len(ids)
        columns.ids.extend(ids)
        columns.sizes.extend(sizes or [0] * count)
        columns.mtimes_ns.extend(mtimes_ns or [0] * count)
        columns.content_sha256.extend(content_sha256 or [bytes(32)] * count)
        columns.labels.extend(labels or [None] * count)

    def fail(self, id: str, reason: str, *, size: int = 0, mtime_ns: int = 0) -> None:
        """Record an image that could not be read."""
        self._columns.failures.append((id, reason, size, mtime_ns))

    def finalise(self) -> None:
        """Write the store aside, make it durable, and rename it onto the target.

        Raises
        ------
        ValueError
            When two rows have the same id.
        """
        columns = self._columns
        encoded = [os.fsencode(id) for id in columns.ids]
        order = sorted(range(len(encoded)), key=encoded.__getitem__)
        for left, right in itertools.pairwise(order):
            if encoded[left] == encoded[right]:
                raise ValueError(f"two rows have the id {columns.ids[left]!r}; ids are unique in a store")
        # The file's own name, so that another writer's leftovers are never mistaken for ours.
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            with h5py.File(aside, "x", libver=schema.LIBVER, **schema.ALIGNMENT) as file:
                self._write(file, np.array(order, dtype=np.int64))
            _fsync(aside)
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)
        _fsync(self.path.parent)

    def _write(self, file: h5py.File, order: npt.NDArray[np.int64]) -> None:
        columns = self._columns
        digests = self._write_embeddings(file, order)
        facts = [("embeddings", "<f4", (len(order), self.spec.dim), digests)]

        def column(name: str, data: schema.Array, *, identity: bool = False) -> None:
            sha256 = schema.write_dataset(file, name, data)
            if identity:
                facts.append((name, data.dtype.str, data.shape, sha256))

        column("ids", schema.encode_texts([columns.ids[row] for row in order]), identity=True)
        column("sizes", np.array(columns.sizes, dtype="<u8")[order])
        column("mtimes_ns", np.array(columns.mtimes_ns, dtype="<i8")[order])
        hashes = np.frombuffer(b"".join(columns.content_sha256), dtype=np.uint8).reshape(-1, 32)
        column("content_sha256", hashes[order], identity=True)
        classes = sorted({label for label in columns.labels if label is not None}, key=os.fsencode)
        if classes:
            codes = {label: code for code, label in enumerate(classes)}
            labels = [-1 if label is None else codes[label] for label in columns.labels]
            column("labels", np.array(labels, dtype="<i4")[order], identity=True)
            column("label_names", schema.encode_texts(classes), identity=True)
        self._write_failures(file)
        self._write_attributes(file, schema.content_id(self.spec.digest, facts))

    def _write_embeddings(self, file: h5py.File, order: npt.NDArray[np.int64]) -> str:
        """Copy the rows from the spool in sorted order, hashing every block, and return the hash of the hashes."""
        dataset = schema.create_dataset(file, "embeddings", (len(order), self.spec.dim), "<f4")
        self._spool.flush()
        blocks = []
        if len(order):
            spooled = np.memmap(self._spool, dtype="<f4", mode="r", shape=(len(order), self.spec.dim))
            for start in range(0, len(order), schema.BLOCK_ROWS):
                block = spooled[order[start : start + schema.BLOCK_ROWS]]
                dataset[start : start + len(block)] = block
                blocks.append(hashlib.sha256(block.tobytes()).digest())
        digests = np.frombuffer(b"".join(blocks), dtype=np.uint8).reshape(-1, 32)
        checksums = file.create_group("checksums")
        sha256 = schema.write_dataset(checksums, "embeddings", digests)
        checksums["embeddings"].attrs["block_rows"] = np.int64(schema.BLOCK_ROWS)
        schema.set_text(checksums["embeddings"], "algorithm", "sha256")
        return schema.seal(dataset, sha256)

    def _write_failures(self, file: h5py.File) -> None:
        failures = sorted(self._columns.failures, key=lambda failure: os.fsencode(failure[0]))
        group = file.create_group("failures")
        schema.write_dataset(group, "ids", schema.encode_texts([id for id, *_ in failures]))
        schema.write_dataset(group, "errors", schema.encode_texts([reason for _, reason, *_ in failures]))
        schema.write_dataset(group, "sizes", np.array([size for *_, size, _ in failures], dtype="<u8"))
        schema.write_dataset(group, "mtimes_ns", np.array([mtime for *_, mtime in failures], dtype="<i8"))

    def _write_attributes(self, file: h5py.File, content_id: str) -> None:
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        identity = self.spec.to_dict()
        provenance = canonical_json({"identity": identity, "information": {**self.information, "created": created}})
        if len(provenance) > schema.MAX_PROVENANCE_BYTES:
            raise ValueError(f"the provenance of {self.path} has {len(provenance)} bytes; HDF5 attributes hold 64 KiB")
        schema.set_text(file, "format", schema.FORMAT)
        file.attrs["schema_version"] = np.int64(schema.SCHEMA_VERSION)
        schema.set_text(file, "provenance", provenance)
        schema.set_text(file, "digest", self.spec.digest)
        schema.set_text(file, "content_id", content_id)
        schema.set_text(file, "run_id", uuid.uuid4().hex)
        schema.set_text(file, "created", created)
        schema.set_text(file, "backbone", self.spec.backbone)
        file.attrs["dim"] = np.int64(self.spec.dim)
        schema.set_text(file, "pooling", self.spec.pool)


def refuse_existing(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise StoreExistsError when a store may not be written to `path`; worth knowing before hours of work."""
    path = Path(path)
    if path.is_dir():
        raise StoreExistsError(f"{path} is a folder; a store is one file: name one, such as {path}.h5")
    if path.exists() and not overwrite:
        raise StoreExistsError(f"{path} exists already; choose another name or pass --overwrite (overwrite=True)")


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle for a folder; its renames are journalled.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
