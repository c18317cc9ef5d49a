"""Store: a finished store, read-only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbeddingShapeError, StoreFormatError, StoreNotFoundError
from embedkit.spec import EmbeddingSpec
from embedkit.store import format as schema
from embedkit.store.hdf5 import Dataset, LayoutError, read_layout
from embedkit.store.matrix import Matrix, ReadOnlyFile
from embedkit.store.tables import Failure, Failures, Images

if TYPE_CHECKING:
    import pandas
    import pyarrow

    from embedkit.store.status import Status
    from embedkit.store.verification import Problem


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
    layer: str | None
    layers: dict[str, EmbeddingSpec]
    main_spec: EmbeddingSpec  # Of /embeddings, whichever layer this store shows.

    def __init__(self) -> None:
        raise TypeError("open a store with Store.open(path)")

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, layer: str | None = None) -> Store:
        """Open a store and check its format, shapes and extent.

        Parameters
        ----------
        path : path-like
            The store.
        layer : str, optional
            Which of its ``layers`` takes the place of the embeddings: the store that is returned has that layer's
            embeddings, spec and digest, and the same ids and labels.

        Returns
        -------
        Store
            The store; no row has been read yet.

        Raises
        ------
        StoreNotFoundError
            When there is no such file.
        StoreFormatError
            When the file is not a store, was written by a newer embedkit, has no such layer, or is damaged.
        """
        store = cls.__new__(cls)
        # Absolute, so that it also pickles into a process with another working folder.
        store.path = Path(os.path.abspath(path))
        if not store.path.is_file():
            if found := sorted(store.path.glob("*.h5")):  # Of a run, say.
                raise StoreNotFoundError(f"{path} is a folder; name a store in it, such as {found[0].name}")
            what = "is a folder" if store.path.is_dir() else "does not exist"
            raise StoreNotFoundError(f"{path} {what}; make a store with: embedkit extract IMAGES -o STORE")
        # The open file stays the same when a newer store takes its name.
        store._file = ReadOnlyFile(store.path, keep=True)
        try:
            layout = read_layout(store._file.read, store._file.size)
        except LayoutError as error:
            raise StoreFormatError(
                f"{path} is not an embedkit store, was changed by another program, or is damaged: {error}"
            ) from error
        store._datasets = layout.datasets
        store.provenance, store.spec, store.layers = schema.read_header(store.path, layout.attributes)
        store.content_id = str(layout.attributes["content_id"])
        store.run_id = str(layout.attributes.get("run_id"))
        schema.check_columns(store.path, layout.datasets, store.spec, store.layers)
        store._choose(layer)
        return store

    _file: ReadOnlyFile
    _datasets: Mapping[str, Dataset]
    _matrix: Matrix

    def _choose(self, layer: str | None) -> None:
        self.layer = layer
        self.main_spec = self.spec
        if layer is not None:
            if layer not in self.layers:
                raise StoreFormatError(f"{self.path} has no layer {layer!r}; it has {', '.join(self.layers) or 'none'}")
            self.spec = self.layers[layer]
        self._matrix = self._matrix_of("embeddings" if layer is None else f"layers/{layer}")

    def _matrix_of(self, name: str) -> Matrix:
        found = self._dataset(name)
        return Matrix(self._file, found.offset, (found.shape[0], found.shape[1]), found.dtype)

    def _dataset(self, name: str) -> Dataset:
        try:
            return self._datasets[name]
        except KeyError:
            raise StoreFormatError(f"{self.path} is not an embedkit store: it has no dataset /{name}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.layer, self.content_id)

    def __len__(self) -> int:
        return len(self._matrix)

    def __repr__(self) -> str:
        return f"<Store {self.path}: {len(self)} x {self.dim}, {self.spec.name_of(self.recipe)}>"

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
        return self._matrix.dtype

    @property
    def embeddings(self) -> npt.NDArray[np.float32]:
        """All embeddings as a read-only array of shape (n, d), mapped from the file without a copy."""
        return self._matrix.map

    @property
    def tokens(self) -> npt.NDArray[np.float32]:
        """All embeddings as a read-only array of shape (n, t, d): t vectors an image, one for the pooled ones."""
        return self.embeddings.reshape(len(self), self.spec.tokens or 1, -1)

    def load(self, dtype: npt.DTypeLike = np.float32, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return all embeddings in memory.

        Parameters
        ----------
        dtype : dtype-like, default float32
            Of the array that is returned.
        out : array of shape (n, d), optional
            Filled and returned instead of a new one; its type counts then.

        Returns
        -------
        array of shape (n, d)

        Raises
        ------
        EmbeddingShapeError
            When `out` has another shape.
        """
        if out is not None and out.shape != self._matrix.shape:
            raise EmbeddingShapeError(f"{self.path} has shape {self._matrix.shape}, the array to fill {out.shape}")
        if out is None:
            out = np.empty(self._matrix.shape, dtype=dtype)
        if out.dtype == self.dtype and out.flags.c_contiguous:
            return self._matrix.read(0, len(self), out)
        for start in range(0, len(self), schema.BLOCK_ROWS):
            stop = min(start + schema.BLOCK_ROWS, len(self))
            out[start:stop] = self._matrix.read(start, stop)
        return out

    def iter_blocks(self, rows: int = 8192) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the embeddings in blocks of at most `rows` rows, in order, as float32."""
        for start in range(0, len(self), rows):
            yield np.asarray(self.embeddings[start : start + rows], dtype=np.float32)

    def rows(
        self, rows: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None, *, ids: Sequence[str] | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the embeddings of some rows, in the given order, with repeats.

        Parameters
        ----------
        rows : sequence of int
            Row numbers; negative ones count from the end.
        ids : sequence of str
            Instead of `rows`: ids.

        Returns
        -------
        array of shape (len(rows), d)
            float32.

        Raises
        ------
        IndexError
            When the store has no such row.
        KeyError
            When the store has no such id.
        """
        if (rows is None) == (ids is None):
            raise TypeError("name rows or ids, and not both")
        wanted = np.array([self.index_of(id) for id in ids] if ids is not None else rows, dtype=np.int64).reshape(-1)
        outside = (wanted < -len(self)) | (wanted >= len(self))
        if outside.any():
            raise IndexError(f"row {wanted[outside][0]} does not exist; {self.path} has {len(self)} rows")
        return np.asarray(self._matrix.take(np.where(wanted < 0, wanted + len(self), wanted)), dtype=np.float32)

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
        if "labels" not in self._datasets:
            return None
        codes: npt.NDArray[np.int64] = self._column("labels").astype(np.int64)
        if len(codes) and (codes.min() < -1 or codes.max() >= len(self.classes)):
            raise StoreFormatError(f"{self.path}: /labels has codes that name no class; the file is damaged")
        return codes

    @cached_property
    def classes(self) -> list[str]:
        """Class names: code c of `labels` means ``classes[c]``. Empty when the store has no labels."""
        names = self._texts("label_names") if "labels" in self._datasets else []
        if len(set(names)) < len(names):
            raise StoreFormatError(f"{self.path}: /label_names has a name twice; the file is damaged")
        return names

    @cached_property
    def content_sha256(self) -> npt.NDArray[np.uint8]:
        """SHA-256 of every image file as uint8 of shape (n, 32)."""
        hashes: npt.NDArray[np.uint8] = self._column("content_sha256")
        return hashes

    @cached_property
    def failures(self) -> list[Failure]:
        """Images that could not be read, sorted by id."""
        failed = self.failed
        if not all(map(schema.is_kind, set(failed.kinds.tolist()))):
            raise StoreFormatError(f"{self.path}: /failures/kinds has what is no kind; the file is damaged")
        return failed.listed()

    @property
    def information(self) -> dict[str, Any]:
        """What explains the run without deciding the numbers: versions, host, root, recipe."""
        information = self.provenance.get("information")
        return information if isinstance(information, dict) else {}

    @property
    def root(self) -> Path | None:
        """The folder that the ids are relative to, as it was when the store was made; None when unknown."""
        root = self.information.get("root")
        return Path(root) if schema.is_path(root) else None

    @property
    def recipe(self) -> dict[str, Any]:
        """How the backbone was loaded, for `Backbone.reload`; empty when unknown."""
        recipe = self.information.get("recipe")
        if not isinstance(recipe, dict):
            return {}
        return recipe if self.layer is None else {**recipe, "pool": self.layer}

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
            "bytes": self._file.size,
            "classes": self.class_counts(),
            "layers": {name: spec.dim for name, spec in self.layers.items()},
            "failures": [{"id": one.id, "kind": one.kind, "error": one.error} for one in self.failures],
            "digest": self.digest,
            "content_id": self.content_id,
            "spec": self.spec.to_dict(),
            "information": self.information,
        }

    @cached_property
    def images(self) -> Images:
        """The columns of the rows as they are stored: ids as bytes, sizes, times and hashes of the files."""
        return Images(*(self._column(name) for name in ("ids", "sizes", "mtimes_ns", "content_sha256")))

    @property
    def failed(self) -> Failures:
        """The columns of the failures as they are stored."""
        return Failures.read(self._column, self._datasets)

    @property
    def matrices(self) -> dict[str, Matrix]:
        """Where the embeddings lie, under the empty name, and every layer."""
        layers = {name: self._matrix_of(f"layers/{name}") for name in self.layers}
        return {"": self._matrix_of("embeddings"), **layers}

    def verify(self, *, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Compare every byte with the checksums that were written with it; see `embedkit.store.verify`."""
        from embedkit.store.verification import verify

        return verify(self, progress=progress)

    @staticmethod
    def status(path: str | os.PathLike[str]) -> Status:
        """Say whether there is nothing at a path, an unfinished run, a run in progress, or a finished store."""
        from embedkit.store.status import find_status

        return find_status(path)

    @staticmethod
    def merge(
        stores: Sequence[Store | str | os.PathLike[str]],
        output: str | os.PathLike[str],
        *,
        on_conflict: str = "error",
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Store:
        """Make one store of several that were made alike; see `embedkit.store.merge`."""
        from embedkit.store.combining import merge

        return merge(stores, output, on_conflict=on_conflict, overwrite=overwrite, progress=progress)

    def select(
        self,
        output: str | os.PathLike[str],
        rows: Sequence[int] | npt.NDArray[Any],
        *,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Store:
        """Write some rows as a store of their own; see `embedkit.store.select`."""
        from embedkit.store.combining import select

        return select(self, output, rows, overwrite=overwrite, progress=progress)

    def export(
        self,
        output: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Path]:
        """Write the store as .parquet, .npy, .safetensors, .csv or .lance; see `embedkit.store.export`."""
        from embedkit.store.exporting import export

        return export(self, output, overwrite=overwrite, progress=progress)

    @staticmethod
    def import_from(
        source: str | os.PathLike[str],
        output: str | os.PathLike[str],
        *,
        names: str | os.PathLike[str] | None = None,
        name: str | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Store:
        """Make a store of embeddings in another format; see `embedkit.store.import_embeddings`."""
        from embedkit.store.importing import import_embeddings

        return import_embeddings(source, output, names=names, name=name, overwrite=overwrite, progress=progress)

    def to_pandas(self, *, embeddings: bool = False) -> pandas.DataFrame:
        """Return a data frame indexed by id: label, size, modification time and content hash of every row.

        With `embeddings`, there is a column for each dimension too, ``e0`` to ``e{d-1}``. Raises `MissingExtraError`
        when pandas is not installed: ``pip install 'embedkit[pandas]'``.
        """
        from embedkit.store.frames import to_pandas

        return to_pandas(self, embeddings=embeddings)

    def to_arrow(self) -> pyarrow.Table:
        """Return an Arrow table: id, label, size, modification time, content hash, embedding and layers of every row.

        Raises
        ------
        MissingExtraError
            When pyarrow is not installed: ``pip install 'embedkit[parquet]'``.
        """
        from embedkit.store.frames import to_arrow

        return to_arrow(self)

    def _column(self, name: str) -> Any:
        found = self._dataset(name)
        return self._file.array(found.offset, found.shape, found.dtype)

    def _texts(self, name: str) -> list[str]:
        return schema.decode_texts(self._column(name))


def _reopen(path: Path, layer: str | None, content_id: str) -> Store:
    """Open a store that was pickled in another process, and make sure that it is still the same one."""
    store = Store.open(path, layer=layer)
    if store.content_id != content_id:
        raise StoreFormatError(f"{path} was replaced by another store since it was opened; open it again")
    return store
