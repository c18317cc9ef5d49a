"""merge and select: stores made from the rows of others."""

from __future__ import annotations

import fnmatch
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError, StoreExistsError, StoreFormatError
from embedkit.store.assembling import Content, Gather, Header, publish
from embedkit.store.locking import Lock, now, parts_folder
from embedkit.store.plans import require_same_specs
from embedkit.store.reader import Store
from embedkit.store.tables import Failures, Images
from embedkit.store.verification import verify
from embedkit.store.writer import refuse_existing

ON_CONFLICT = ("error", "first", "newest")


def merge(
    stores: Sequence[Store | str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    on_conflict: str = "error",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Make one store of several that were made alike.

    Every store is verified first, so that no damage is copied under new checksums. Ids are taken as they are: stores of
    different folders are merged well only when their ids say where each image came from. An image that failed in one
    store and was embedded in another counts as embedded.

    Parameters
    ----------
    stores : sequence of Store or path-like
        At least one; all with the same spec and layers.
    output : path-like
        The store to make.
    on_conflict : {"error", "first", "newest"}, default "error"
        Which row stays when an id stands for different content, or has different labels: none, that of the store named
        first, or that of the file modified last.
    overwrite : bool, default False
        Whether a store that exists at `output` may be replaced.
    progress : callable, optional
        Called with bytes verified and bytes in all, of each store.

    Returns
    -------
    Store
        Opened. Its ``content_id`` is that of one extraction of all the images.

    Raises
    ------
    SpecMismatchError
        When two of the stores were made differently, naming the fields that differ.
    StoreExistsError
        When an id stands for different content and `on_conflict` is "error"; when `output` exists.
    StoreFormatError
        When a store is damaged.

    Examples
    --------
    >>> from embedkit import Store
    >>> Store.merge(["monday.h5", "tuesday.h5"], "week.h5", on_conflict="newest")  # doctest: +SKIP
    """
    if on_conflict not in ON_CONFLICT:
        raise ValueError(f"on_conflict is one of {', '.join(ON_CONFLICT)}, got {on_conflict!r}")
    if not stores:
        raise ValueError("there is nothing to merge: name at least one store")
    target = Path(os.path.realpath(output))
    refuse_existing(target, overwrite)
    opened = [store if isinstance(store, Store) else Store.open(store) for store in stores]
    for store in opened[1:]:
        message = f"{opened[0].path} and {store.path} cannot be merged"
        require_same_specs(message, (opened[0].main_spec, opened[0].layers), (store.main_spec, store.layers))
    for store in opened:
        _require_whole(store, progress)
    classes = sorted({name for store in opened for name in store.classes}, key=os.fsencode)
    images = Images.join([store.images for store in opened])
    labels = np.concatenate([_recoded(store, classes) for store in opened])
    lengths = [len(store) for store in opened]
    source = np.repeat(np.arange(len(opened)), lengths)
    row = np.concatenate([np.arange(length) for length in lengths])
    chosen = _choose(opened, images, labels, on_conflict, source)
    failures = Failures.join([store.failed for store in opened])
    _, first = np.unique(failures.ids, return_index=True)
    failures = failures.take(first[~np.isin(failures.ids[first], images.ids)])
    information = _inherited(opened) | {"merged_from": [store.content_id for store in opened]}
    content = _content(opened, images.take(chosen), failures, labels[chosen], classes, source[chosen], row[chosen])
    return _publish(target, opened[0], information, content)


def select(
    store: Store,
    output: str | os.PathLike[str],
    rows: Sequence[int] | npt.NDArray[Any],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Write some rows of a store as a store of their own, without its failures.

    Parameters
    ----------
    store : Store
        Verified first.
    output : path-like
        The store to make.
    rows : sequence of int, or bool array of shape (n,)
        Which rows; their order and repeats do not matter, for stores are sorted by id.
    overwrite : bool, default False
        Whether a store that exists at `output` may be replaced.
    progress : callable, optional
        Called with bytes verified and bytes in all.

    Returns
    -------
    Store
        Opened.

    Raises
    ------
    IndexError
        When the store has no such row.
    StoreExistsError
        When `output` exists and `overwrite` is false.
    StoreFormatError
        When the store is damaged.

    Examples
    --------
    >>> store = Store.open("photos.h5")  # doctest: +SKIP
    >>> store.select("cats.h5", store.labels == store.classes.index("cat"))  # doctest: +SKIP
    """
    target = Path(os.path.realpath(output))
    refuse_existing(target, overwrite)
    every = np.arange(len(store))
    chosen = np.unique(every[np.asarray(rows if len(rows) else [], dtype=None if len(rows) else np.int64)])
    _require_whole(store, progress)
    labels = _recoded(store, store.classes)[chosen]
    information = _inherited([store]) | {"selected_from": store.content_id}
    content = _content(
        [store], store.images.take(chosen), Failures.empty(), labels, store.classes, np.zeros_like(chosen), chosen
    )
    return _publish(target, store, information, content)


def matching(store: Store, patterns: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return which rows match every pattern.

    Parameters
    ----------
    store : Store
    patterns : sequence of str
        ``label=PATTERN`` or ``id=PATTERN``, where ``*``, ``?`` and ``[...]`` stand for other signs, as in a shell, and
        ``*`` for slashes too.

    Returns
    -------
    bool array of shape (n,)

    Raises
    ------
    EvaluationError
        When a pattern has another form, or matches nothing.
    """
    chosen = np.ones(len(store), dtype=bool)
    for pattern in patterns:
        field, equals, glob = pattern.partition("=")
        matches = re.compile(fnmatch.translate(glob)).match
        if field == "id" and equals:
            found = np.fromiter((matches(id) is not None for id in store.ids), dtype=bool, count=len(store))
        elif field == "label" and equals:
            hits = np.array([*(matches(name) is not None for name in store.classes), False], dtype=bool)
            found = hits[_recoded(store, store.classes)]
        else:
            raise EvaluationError(f"{pattern!r} is not of the form label=PATTERN or id=PATTERN")
        if not found.any():
            some = f"its labels are {', '.join(store.classes[:10])}" if field == "label" else f"such as {store.ids[:1]}"
            raise EvaluationError(f"no row of {store.path} matches {pattern!r}; {some}")
        chosen &= found
    return chosen


def named(store: Store, ids: Iterable[str], *, all_of_them: bool = False) -> npt.NDArray[np.bool_]:
    """Return which rows have one of the given ids.

    Raises
    ------
    EvaluationError
        When the store has none of them, or, if `all_of_them`, lacks one.
    """
    wanted = list(ids)
    there = {id: row for row, id in enumerate(store.ids)}
    missing = [id for id in wanted if id not in there]
    if len(missing) == len(wanted) or (all_of_them and missing):
        raise EvaluationError(
            f"{store.path} lacks {len(missing):,} of {len(wanted):,} ids, such as {missing[:1]}; its ids look like "
            f"{store.ids[:1]}"
        )
    chosen = np.zeros(len(store), dtype=bool)
    chosen[[there[id] for id in wanted if id in there]] = True
    return chosen


def _require_whole(store: Store, progress: Callable[[int, int], None] | None) -> None:
    for problem in verify(store.path, progress=progress):
        raise StoreFormatError(f"{store.path} is damaged and is not copied: {problem}; mend it with extract --repair")


def _recoded(store: Store, classes: Sequence[str]) -> npt.NDArray[np.int32]:
    """Return a store's labels as codes into other classes, -1 where it has none."""
    if store.labels is None:
        return np.full(len(store), -1, dtype=np.int32)
    codes = {name: code for code, name in enumerate(classes)}
    return np.array([*(codes[name] for name in store.classes), -1], dtype=np.int32)[store.labels]


def _choose(
    stores: Sequence[Store], images: Images, labels: npt.NDArray[np.int32], on_conflict: str, source: npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """Return one row for each id, sorted by the bytes of the ids."""
    # The last sort key counts first; among equal ids the newest, or else the first, comes to the front.
    keys = (np.arange(len(images)), images.ids)
    order = np.lexsort((keys[0], -images.mtimes_ns, keys[1]) if on_conflict == "newest" else keys)
    ids = images.ids[order]
    front = np.append(np.ones(min(1, len(ids)), dtype=bool), ids[1:] != ids[:-1])
    if on_conflict == "error":
        left, right = order[:-1][~front[1:]], order[1:][~front[1:]]
        known = images.content_sha256[left].any(axis=1)
        same = (images.content_sha256[left] == images.content_sha256[right]).all(axis=1) & known
        conflicts = np.flatnonzero(~(same & (labels[left] == labels[right])))
        if len(conflicts):
            one, other = left[conflicts[0]], right[conflicts[0]]
            raise StoreExistsError(
                f"{len(conflicts):,} ids stand for different images or labels; the first is "
                f"{os.fsdecode(bytes(images.ids[one]))!r} in {stores[source[one]].path} and "
                f"{stores[source[other]].path}; choose with --on-conflict first or newest"
            )
    return np.asarray(order[front])


def _content(
    stores: Sequence[Store],
    images: Images,
    failures: Failures,
    labels: npt.NDArray[np.int32],
    classes: Sequence[str],
    source: npt.NDArray[np.int64],
    row: npt.NDArray[np.int64],
) -> Content:
    gathers = {
        name: Gather([store.matrices[name] for store in stores], source, row, matrix.shape[1])
        for name, matrix in stores[0].matrices.items()
    }
    return Content(images, failures, labels, classes, gathers.pop(""), gathers)


def _inherited(stores: Sequence[Store]) -> dict[str, Any]:
    """Return what all the stores say of themselves alike: how to load the backbone, and perhaps the root."""
    first, *others = (store.information for store in stores)
    kept = {name: value for name, value in first.items() if name in ("root", "recipe", "provenance")}
    return {name: value for name, value in kept.items() if all(other.get(name) == value for other in others)}


def _publish(target: Path, like: Store, information: Mapping[str, Any], content: Content) -> Store:
    header = Header(like.main_spec, uuid.uuid4().hex, now(), like.layers, information)
    with Lock(parts_folder(target)) as lock:
        publish(target, lock.folder, header, content)
    return Store.open(target)
