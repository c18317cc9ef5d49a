"""What a search leaves out: rows that nobody asked for, and a query's own."""

from __future__ import annotations

import difflib
from collections.abc import Sequence, Set
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.store import Store
from embedkit.store.combining import rows_matching
from embedkit.text import counted

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

Where: TypeAlias = str | Sequence[str] | Sequence[int] | Set[int] | npt.NDArray[np.bool_] | npt.NDArray[np.integer]


def mask_of(where: Where | None, store: Store) -> Mask | None:
    """Return which rows are searched in.

    Parameters
    ----------
    where : str, sequence of str, mask, rows, or None
        ``label=PATTERN`` or ``id=PATTERN``, where ``*``, ``?`` and ``[...]`` stand for other signs, as in a shell; of
        several patterns all have to match. Or a bool array of shape (n,), or row numbers as a list, set or array. None
        for every row.
    store : Store
        What is searched in.

    Returns
    -------
    array of bool of shape (n,), or None
        All false where the filter keeps nothing. None for every row.

    Raises
    ------
    EvaluationError
        When a pattern has another form, no class matches it, naming the closest, or it is an id that does not exist.
    IndexError
        When a mask has another shape, or a row does not exist.
    TypeError
        For anything else.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.index.filters import mask_of
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/s.h5", spec) as writer:
    ...     writer.append(np.ones((3, 2)), ["2023/a.jpg", "2024/b.jpg", "2024/c.jpg"], labels=["cat", "cat", "dog"])
    ...     writer.finalise()
    >>> store = Store.open(f"{folder.name}/s.h5")
    >>> mask_of("id=2024/*", store).tolist(), mask_of(["id=2024/*", "label=cat"], store).tolist()
    ([False, True, True], [False, True, False])
    >>> mask_of({0, 2}, store).tolist()
    [True, False, True]
    >>> folder.cleanup()
    """
    if where is None:
        return None
    chosen = np.asarray([where] if isinstance(where, str) else list(where) if isinstance(where, Set) else where)
    kind = chosen.dtype.kind
    if kind == "b":
        if chosen.shape != (len(store),):
            raise IndexError(f"the mask has shape {chosen.shape}, but {store.path} has {counted(len(store), 'row')}")
        return chosen
    mask = np.zeros(len(store), dtype=bool)
    if not chosen.size:
        return mask
    if chosen.ndim == 1 and (kind == "U" or (kind == "O" and all(isinstance(value, str) for value in chosen))):
        mask[:] = np.logical_and.reduce([_matching(store, pattern) for pattern in chosen.tolist()])
        return mask
    if chosen.ndim != 1 or kind not in "iu":
        raise TypeError(
            f"where is label=PATTERN, id=PATTERN, a mask or rows, not {type(where).__name__} of {chosen.dtype}"
        )
    outside = (chosen < 0) | (chosen >= len(store))
    if outside.any():
        raise IndexError(f"row {chosen[outside][0]} does not exist; {store.path} has {len(store)} rows")
    mask[chosen] = True
    return mask


def _matching(store: Store, pattern: str) -> Mask:
    """Return which rows match a pattern; a class that does not exist is more likely a slip than a question."""
    found = rows_matching(store, pattern)
    field, _, name = pattern.partition("=")
    if found.any() or (field == "id" and any(sign in name for sign in "*?[")):
        return found
    if field == "id":
        raise EvaluationError(f"{store.path} has no id {name!r}; ids that begin so are {f'id={name}*'!r}")
    if not store.classes:
        raise EvaluationError(f"{store.path} has no labels, so that {pattern!r} matches nothing; use id=PATTERN")
    lower = {known.lower(): known for known in store.classes}
    closest = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    meant = [repr(lower[known]) for known in closest] or [repr(known) for known in store.classes[:10]]
    hint = f"did you mean {' or '.join(meant)}?" if closest else f"it has {', '.join(meant)}"
    hint += ", ..." if not closest and len(store.classes) > len(meant) else ""
    raise EvaluationError(f"no class of {store.path} matches {name!r}; {hint}")


def drop_own(scores: Scores, rows: Rows, own: Sequence[Rows], k: int | None = None) -> tuple[Scores, Rows]:
    """Return the best hits of each query that are not the query itself.

    Parameters
    ----------
    scores, rows : arrays of shape (q, m)
        What a search found, best first, m being k and the most own rows that a query has; -1 for no row.
    own : sequence of q arrays
        Rows of the store that are the query itself, of any length, as `Queries.own` has them; empty for none.
    k : int, optional
        Hits of each query; by default all that are left.

    Returns
    -------
    scores, rows : arrays of shape (q, at most k)
        NaN and -1 behind the last hit of a query, and as wide as the query with the most hits.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.index.filters import drop_own
    >>> scores, rows = np.float32([[1, 0.8, 0.7], [0.9, 0.6, 0.5]]), np.array([[4, 2, 7], [1, 4, 0]])
    >>> drop_own(scores, rows, [np.array([4]), np.array([], dtype=int)], k=2)[1].tolist()
    [[2, 7], [1, 4]]
    """
    gone = rows < 0
    mine = np.concatenate([np.empty(0, dtype=np.int64), *own])
    if len(mine):
        # A query and a row in one number, so that all are looked up at once.
        span = int(max(rows.max(initial=0), mine.max())) + 1
        owners = np.repeat(np.arange(len(own)), [len(of_one) for of_one in own])
        gone |= np.isin(rows + span * np.arange(len(rows))[:, None], mine + span * owners)
    order = np.argsort(gone, axis=1, kind="stable")
    order = order[:, : min(len(gone.T) if k is None else k, int((~gone).sum(axis=1).max(initial=0)))]
    gone = np.take_along_axis(gone, order, axis=1)
    scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return np.where(gone, np.float32(np.nan), scores), np.where(gone, -1, rows)
