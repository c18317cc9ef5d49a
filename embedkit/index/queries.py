"""What a search is made with: whatever a person has of an image, as a vector."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EmbeddingShapeError, ImageError, StoreFormatError
from embedkit.images import Region
from embedkit.index.pictures import image_path
from embedkit.sources import content_sha256
from embedkit.sources.items import data_of
from embedkit.store import Store
from embedkit.store.format import is_path

if TYPE_CHECKING:
    from embedkit.backbones import Backbone

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

_FORMS = "a path, an id, a row, an image, or a vector of floats"


@dataclass(frozen=True, eq=False)
class Queries:
    """Vectors to search with, and what they came from.

    Attributes
    ----------
    vectors : array of shape (q, d)
        float32, finite, of any length.
    single : bool
        Whether one query was given by itself, and not in a list.
    store : Store
        Whose rows and ids are meant.
    origins : tuple
        Of every query its row, its image, or its vector; empty where one array of vectors was given.
    """

    vectors: Vectors
    single: bool
    store: Store
    origins: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def own(self) -> list[Rows]:
        """Rows of the store that are the query itself, for each query.

        Of a row or an id it is the row; of an image every row with the same content, by SHA-256: a file's bytes, or
        the pixels of what Python has. A vector is nobody's.

        Raises
        ------
        ImageError
            When a file cannot be read any more.
        """
        nobodys = np.empty(0, dtype=np.int64)
        if not self.origins:
            return [nobodys] * len(self)
        return [nobodys if _is_vector(origin) else self._own(origin) for origin in self.origins]

    def _own(self, origin: Any) -> Rows:
        if isinstance(origin, int):
            return np.array([origin], dtype=np.int64)
        data = origin if isinstance(origin, Region) else data_of(origin, _name_of(origin))
        return _rows_of_content(self.store, content_sha256(data))


def embed_queries(queries: Any, store: Store, backbone: Callable[[], Backbone]) -> Queries:
    """Turn what a person passes into vectors.

    Parameters
    ----------
    queries : path, id, row, image, vector, or a list of them
        A `Path` is an image file. A string is a file where there is one, and otherwise an id of the store. An integer
        is a row. PIL images, bytes of a file and arrays of shape (h, w, 3) are images. Floats of shape (d,) are one
        vector, of shape (q, d) several. A list may mix them; an array of integers or strings is a list.
    store : Store
        Whose rows and ids are meant.
    backbone : callable
        Returns what embeds images. It is called only when there are any, which are then embedded together.

    Returns
    -------
    Queries

    Raises
    ------
    EmbeddingShapeError
        When vectors have another width than the store, or are not finite.
    ImageError
        For an image that cannot be read, or a string that is neither a file nor an id, or both.
    IndexError
        When a row does not exist.
    StoreFormatError
        When the embedding of a row is not finite.
    TypeError
        For anything else.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.index.queries import embed_queries
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/s.h5", spec) as writer:
    ...     writer.append([[1, 0], [2, 2]], ["a.jpg", "b.jpg"])
    ...     writer.finalise()
    >>> store = Store.open(f"{folder.name}/s.h5")
    >>> found = embed_queries([1, "a.jpg", np.array([0.5, 3])], store, backbone=lambda: None)
    >>> found.vectors.tolist(), [rows.tolist() for rows in found.own]
    ([[2.0, 2.0], [1.0, 0.0], [0.5, 3.0]], [[1], [0], []])
    >>> folder.cleanup()
    """
    queries = _as_array(queries)
    if isinstance(queries, np.ndarray) and queries.ndim == 2 and queries.dtype.kind == "f":
        vectors = _checked(queries, store)
        return Queries(vectors, False, store, ())
    several = _several(queries)
    origins = tuple(_origin(query, store) for query in ([queries] if several is None else several))
    vectors = np.empty((len(origins), store.dim), dtype=np.float32)
    rows = [number for number, origin in enumerate(origins) if isinstance(origin, int)]
    images = []
    for number, origin in enumerate(origins):
        if _is_vector(origin):
            vectors[number] = origin
        elif not isinstance(origin, int):
            images.append(number)
    if rows:
        vectors[rows] = _stored(store, [origins[number] for number in rows])
    if images:
        vectors[images] = backbone().embed([origins[number] for number in images])
    return Queries(vectors, several is None, store, origins)


def _several(queries: Any) -> Sequence[Any] | None:
    """Return the queries of a list; None where it is one query."""
    if isinstance(queries, np.ndarray):
        # Rows and ids come as arrays too: from np.flatnonzero, or from what another search found.
        lists = queries.ndim == 4 or (queries.ndim == 1 and queries.dtype.kind in "iuUO")
        return list(queries) if lists else None
    listed = isinstance(queries, list | tuple | range) and not isinstance(queries, Region)
    return queries if listed else None


def _as_array(query: Any) -> Any:
    """Return tensors, series and lists of floats as arrays, and everything else as it is."""
    if hasattr(query, "detach") and hasattr(query, "ndim"):
        if query.ndim == 4:
            return list(query)
        return data_of(query, "query") if query.ndim == 3 else query.detach().cpu().numpy()
    if isinstance(query, list | tuple):
        numbers = all(isinstance(value, float | int | np.number) for value in query)
        floats = any(isinstance(value, float | np.floating) for value in query)
        return np.array(query) if numbers and floats else query
    if hasattr(query, "__array__") and not _is_pillow(query):
        return np.asarray(query)
    return query


def _origin(query: Any, store: Store) -> Any:
    """Return a row as int, a vector as float32 array of shape (d,), or what a backbone embeds."""
    query = _as_array(query)
    if isinstance(query, np.ndarray) and query.ndim == 0:
        query = query.item()
    if isinstance(query, str):
        return _named(query, store)
    if isinstance(query, int) and not isinstance(query, bool):
        if not 0 <= query < len(store):
            raise IndexError(f"row {query} does not exist; {store.path} has {len(store)} rows")
        return query
    if isinstance(query, os.PathLike | bytes | Region) or _is_pillow(query):
        return query
    if isinstance(query, np.ndarray):
        if query.dtype.kind == "f" and query.ndim < 3:
            return _checked(query[None], store)[0]
        if query.dtype.kind in "uif" and query.ndim > 1:
            return query
        raise TypeError(f"a query is {_FORMS}, not an array of {query.dtype} of shape {query.shape}")
    raise TypeError(f"a query is {_FORMS}, not {type(query).__name__}")


def _named(name: str, store: Store) -> int | Path:
    """Return the file or the row that a string means."""
    row = _row_of(store, name)
    if row is None and os.path.lexists(name):
        return Path(name)
    if row is None:
        looks = f"; ids look like {store.ids[0]!r}" if len(store) else ""
        raise ImageError(name, f"the file is missing, and {store.path} has no such id{looks}", "missing")
    if not os.path.isfile(name):
        return row
    if row in _rows_of_content(store, content_sha256(data_of(name, name))):
        return row  # The file as it was embedded: no backbone has to be loaded for it.
    path = image_path(store, name)
    if path is not None and path.exists() and os.path.samefile(path, name):
        return Path(name)
    raise ImageError(
        name,
        f"this is a file and also an id of {store.path}, of another image; say which: a path such as "
        f"{os.path.join(os.curdir, name)!r}, or row {row}",
        "refused",
    )


def _row_of(store: Store, id: str) -> int | None:
    """Return the row of an id; ids are sorted, and need not all be decoded for it."""
    if not is_path(id):
        return None
    ids, wanted = store.images.ids, os.fsencode(id)
    if len(wanted) > ids.dtype.itemsize:  # A comparison would widen every id.
        return None
    row = int(np.searchsorted(ids, np.array(wanted, dtype=ids.dtype)))
    return row if row < len(ids) and ids[row] == wanted else None


def _rows_of_content(store: Store, sha256: bytes) -> Rows:
    """Return the rows of the images with this SHA-256."""
    hashes, wanted = store.images.content_sha256.view(np.uint64), np.frombuffer(sha256, dtype=np.uint64)
    alike: Rows = np.flatnonzero(hashes[:, 0] == wanted[0])
    same: npt.NDArray[np.bool_] = (hashes[alike] == wanted).all(axis=1)
    return alike[same]


def _stored(store: Store, rows: Sequence[int]) -> Vectors:
    vectors = store.rows(rows)
    if not np.isfinite(vectors).all():
        raise StoreFormatError(f"{store.path} has embeddings that are not finite; find them with: embedkit verify")
    return vectors


def _checked(vectors: npt.NDArray[Any], store: Store) -> Vectors:
    """Return vectors of the store's width as float32."""
    if vectors.ndim != 2 or vectors.shape[1] != store.dim:
        raise EmbeddingShapeError(
            f"{store.path} holds embeddings of width {store.dim}, the query has shape {vectors.shape[1:]}"
        )
    with np.errstate(over="ignore"):
        narrow = np.asarray(vectors, dtype=np.float32)
    if not np.isfinite(narrow).all():
        raise EmbeddingShapeError("the query holds infinities or NaN; a similarity needs finite numbers")
    return narrow


def _is_vector(origin: Any) -> bool:
    return isinstance(origin, np.ndarray) and origin.ndim == 1


def _is_pillow(image: object) -> bool:
    # By name: only one room imports Pillow.
    return any(kind.__module__.startswith("PIL.") for kind in type(image).__mro__)


def _name_of(image: object) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else "query"
