"""Store: a finished store, read-only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from embedkit.errors import StoreFormatError, StoreNotFoundError
from embedkit.spec import EmbeddingSpec
from embedkit.store import format as schema


@dataclass(frozen=True)
class Failure:
    """An image that could not be read, and why."""

    id: str
    error: str


class Store:
    """A finished store, opened read-only with `Store.open`.

    The file is immutable, so nothing is locked and any number of processes may read. The object pickles by its path
    and keeps no HDF5 handle open, so it may be passed to forked and spawned workers alike.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/pets.h5", spec) as writer:
    ...     writer.append(np.eye(2), ["cat/1.jpg", "dog/1.jpg"], labels=["cat", "dog"])
    ...     writer.finalise()
    >>> store = Store.open(f"{folder.name}/pets.h5")
    >>> len(store), store.classes, store.labels.tolist()
    (2, ['cat', 'dog'], [0, 1])
    >>> store.embeddings[store.index_of("dog/1.jpg")].tolist()
    [0.0, 1.0]
    >>> folder.cleanup()
    """

    path: Path
    spec: EmbeddingSpec
    provenance: dict[str, Any]
    content_id: str
    run_id: str

    def __init__(self) -> None:
        raise TypeError("open a store with Store.open(path)")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a store and check its format, shapes and extent.

        Parameters
        ----------
        path : path-like
            The store.

        Returns
        -------
        Store
            The store; no row has been read yet.

        Raises
        ------
        StoreNotFoundError
            When there is no such file.
        StoreFormatError
            When the file is not a store, was written by a newer embedkit, or is damaged.
        """
        store = cls.__new__(cls)
        # Absolute, so that it also pickles into a process with another working folder.
        store.path = Path(os.path.abspath(path))
        if not store.path.is_file():
            found = "is a folder" if store.path.is_dir() else "does not exist"
            raise StoreNotFoundError(f"{path} {found}; make a store with: embedkit extract IMAGES -o STORE")
        try:
            with store._file() as file:
                store._check(file)
        except OSError as error:
            raise StoreFormatError(f"{path} is not a readable HDF5 file: {error}") from error
        except KeyError as error:
            raise StoreFormatError(f"{path} is not an embedkit store: {error.args[0]}") from error
        return store

    def _file(self) -> h5py.File:
        # A finished store never changes, so nothing is locked: that would fail on some network file systems.
        try:
            return h5py.File(self.path, "r", locking=False)
        except OSError as error:
            if "locking flag" not in str(error):
                raise
            return h5py.File(self.path, "r")  # This process has it open with locks, by h5py itself.

    def _check(self, file: h5py.File) -> None:
        if "format" not in file.attrs or schema.get_text(file, "format") != schema.FORMAT:
            raise StoreFormatError(f"{self.path} is an HDF5 file, but not an embedkit store")
        version = int(file.attrs["schema_version"])
        if version != schema.SCHEMA_VERSION:
            raise StoreFormatError(
                f"{self.path} has schema version {version}, this embedkit reads {schema.SCHEMA_VERSION}; "
                "install the embedkit that wrote it, or a newer one"
            )
        try:
            self.provenance = json.loads(schema.get_text(file, "provenance"))
            self.spec = EmbeddingSpec.from_dict(self.provenance["identity"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreFormatError(f"{self.path}: its provenance cannot be read: {error}") from error
        if self.spec.digest != schema.get_text(file, "digest"):
            raise StoreFormatError(f"{self.path}: its digest does not match its own spec; the file was altered")
        self.content_id = schema.get_text(file, "content_id")
        self.run_id = schema.get_text(file, "run_id")
        self._check_embeddings(file["embeddings"])
        for name in ("ids", "sizes", "mtimes_ns", "content_sha256", "labels"):
            if (name in file or name != "labels") and file[name].shape[:1] != (self._shape[0],):
                raise StoreFormatError(f"{self.path}: /{name} has shape {file[name].shape} for {self._shape[0]} rows")
        self._labelled = "labels" in file

    def _check_embeddings(self, dataset: h5py.Dataset) -> None:
        shape, dtype, offset = dataset.shape, dataset.dtype, dataset.id.get_offset()
        if len(shape) != 2 or shape[1] != self.spec.dim or dtype.str not in ("<f4", "<f2"):
            raise StoreFormatError(
                f"{self.path}: /embeddings is {dtype} of shape {shape}; expected float rows of width {self.spec.dim}"
            )
        extent = shape[0] * shape[1] * dtype.itemsize
        if extent and (offset is None or offset + extent > self.path.stat().st_size):
            raise StoreFormatError(f"{self.path}: /embeddings is not contiguous or reaches past the end of the file")
        self._shape, self._dtype, self._offset = shape, dtype, offset

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path,)

    def __len__(self) -> int:
        return int(self._shape[0])

    def __repr__(self) -> str:
        return f"<Store {self.path}: {len(self)} x {self.dim}, {self.spec.backbone}>"

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.spec.dim

    @property
    def digest(self) -> str:
        """Digest of the spec: equal digests may be compared."""
        return self.spec.digest

    @property
    def dtype(self) -> np.dtype[Any]:
        """Number format of the embeddings as stored."""
        dtype: np.dtype[Any] = self._dtype
        return dtype

    @cached_property
    def embeddings(self) -> npt.NDArray[np.float32]:
        """All embeddings as a read-only array of shape (n, d), mapped from the file without a copy."""
        if not len(self):
            return np.empty(self._shape, dtype=self._dtype)
        return np.memmap(self.path, dtype=self._dtype, mode="r", offset=self._offset, shape=self._shape)

    def load(self) -> npt.NDArray[np.float32]:
        """Return all embeddings in memory, as float32 of shape (n, d)."""
        with self._file() as file:
            return np.asarray(file["embeddings"][()], dtype=np.float32)

    def iter_blocks(self, rows: int = 8192) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the embeddings in blocks of at most `rows` rows, in order, as float32."""
        for start in range(0, len(self), rows):
            yield np.asarray(self.embeddings[start : start + rows], dtype=np.float32)

    def rows(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """Return the embeddings of the given rows, in the given order, as float32 of shape (len(rows), d)."""
        return np.asarray(self.embeddings[np.asarray(rows, dtype=np.int64)], dtype=np.float32)

    @cached_property
    def ids(self) -> list[str]:
        """Image paths relative to the root, sorted by their bytes; row i belongs to ``ids[i]``."""
        return self._texts("ids")

    @cached_property
    def _rows_by_id(self) -> dict[str, int]:
        return {id: row for row, id in enumerate(self.ids)}

    def index_of(self, id: str) -> int:
        """Return the row of an id.

        Raises
        ------
        KeyError
            When the store has no such id.
        """
        return self._rows_by_id[id]

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Class code of every row as int64 of shape (n,), -1 for none; None when the store has no labels."""
        return self._column("labels").astype(np.int64) if self._labelled else None

    @cached_property
    def classes(self) -> list[str]:
        """Class names: code c of `labels` means ``classes[c]``. Empty when the store has no labels."""
        return self._texts("label_names") if self._labelled else []

    @cached_property
    def content_sha256(self) -> npt.NDArray[np.uint8]:
        """SHA-256 of every image file as uint8 of shape (n, 32)."""
        hashes: npt.NDArray[np.uint8] = self._column("content_sha256")
        return hashes

    @cached_property
    def failures(self) -> list[Failure]:
        """Images that could not be read, sorted by id."""
        ids, errors = self._texts("failures/ids"), self._texts("failures/errors")
        return [Failure(id, error) for id, error in zip(ids, errors, strict=True)]

    @property
    def information(self) -> dict[str, Any]:
        """What explains the run without deciding the numbers: versions, host, root, recipe."""
        information = self.provenance.get("information")
        return information if isinstance(information, dict) else {}

    @property
    def root(self) -> Path | None:
        """The folder that the ids are relative to, as it was when the store was made; None when unknown."""
        root = self.information.get("root")
        return Path(root) if isinstance(root, str) else None

    @property
    def recipe(self) -> dict[str, Any]:
        """How the backbone was loaded, for `Backbone.reload`; empty when unknown."""
        recipe = self.information.get("recipe")
        return recipe if isinstance(recipe, dict) else {}

    def class_counts(self) -> dict[str, int]:
        """Return the number of rows of each class."""
        if self.labels is None:
            return {}
        counts = np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def summary(self) -> dict[str, Any]:
        """Return what `embedkit info` shows, as JSON values."""
        return {
            "path": os.fspath(self.path),
            "rows": len(self),
            "dim": self.dim,
            "dtype": self.dtype.name,
            "bytes": self.path.stat().st_size,
            "classes": self.class_counts(),
            "failures": [{"id": failure.id, "error": failure.error} for failure in self.failures],
            "digest": self.digest,
            "content_id": self.content_id,
            "spec": self.spec.to_dict(),
            "information": self.information,
        }

    def _column(self, name: str) -> Any:
        with self._file() as file:
            try:
                return file[name][()]
            except KeyError as error:
                raise StoreFormatError(f"{self.path} has no dataset /{name}; the file is damaged") from error

    def _texts(self, name: str) -> list[str]:
        return schema.decode_texts(self._column(name))
