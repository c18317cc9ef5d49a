"""merge and select: stores made from the rows of others."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError, StoreExistsError, StoreFormatError
from embedkit.spec import canonical_json
from embedkit.store.assembling import Content, Gather, Header, publish
from embedkit.store.format import is_path
from embedkit.store.locking import Lock, now, parts_folder
from embedkit.store.plans import require_same_specs
from embedkit.store.reader import Store
from embedkit.store.tables import Failures, Images
from embedkit.store.verification import verify
from embedkit.store.writer import refuse_existing

ON_CONFLICT = ("error", "first", "newest")
_FIRST = 8  # Of merged stores, these are named one by one: the provenance has no room for thousands.


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
    OSError
        When there are more stores than a process may have open files.

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
    opened = _opened(stores)
    for store in opened[1:]:
        message = f"{opened[0].path} and {store.path} cannot be merged"
        require_same_specs(message, (opened[0].main_spec, opened[0].layers), (store.main_spec, store.layers))
    ids = [store.content_id for store in opened]
    merged = {"count": len(ids), "sha256": hashlib.sha256(canonical_json(ids).encode()).hexdigest()}
    header = _header(opened[0], _inherited(opened) | {"merged_from": {**merged, "first": ids[:_FIRST]}})
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
    content = _content(opened, images.take(chosen), failures, labels[chosen], classes, source[chosen], row[chosen])
    return _publish(target, header, content)


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
    EvaluationError
        When no row is chosen.
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
    chosen = np.unique(every[np.asarray(rows)]) if len(rows) else every[:0]
    if not len(chosen):
        raise EvaluationError(f"no row of {store.path} is chosen; choose one of its {len(store):,} rows at least")
    header = _header(store, _inherited([store]) | {"selected_from": store.content_id})
    _require_whole(store, progress)
    labels = _recoded(store, store.classes)[chosen]
    content = _content(
        [store], store.images.take(chosen), Failures.empty(), labels, store.classes, np.zeros_like(chosen), chosen
    )
    return _publish(target, header, content)


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
        When a pattern has another form, or no row matches it, or all of them.
    """
    chosen = np.ones(len(store), dtype=bool)
    for pattern in patterns:
        found = rows_matching(store, pattern)
        if not found.any():
            labels = pattern.startswith("label=")
            some = f"its labels are {', '.join(store.classes[:10])}" if labels else f"such as {store.ids[:1]}"
            raise EvaluationError(f"no row of {store.path} matches {pattern!r}; {some}")
        chosen &= found
    if patterns and not chosen.any():
        raise EvaluationError(
            f"no row of {store.path} matches all of {', '.join(map(repr, patterns))}, though each alone"
        )
    return chosen


def rows_matching(store: Store, pattern: str) -> npt.NDArray[np.bool_]:
    """Return which rows match one of the patterns that `matching` takes, if any do.

    Raises
    ------
    EvaluationError
        When the pattern has another form.
    """
    field, equals, glob = pattern.partition("=")
    matches = re.compile(fnmatch.translate(glob)).match
    if field == "id" and equals:
        prefix = glob.removesuffix("*")
        if prefix != glob and is_path(prefix) and not re.search(r"[*?[]", prefix):
            found: npt.NDArray[np.bool_] = np.char.startswith(store.images.ids, os.fsencode(prefix))
            return found  # The commonest pattern: no id has to be decoded for it.
        return np.fromiter((matches(id) is not None for id in store.ids), dtype=bool, count=len(store))
    if field == "label" and equals:
        hits = np.array([*(matches(name) is not None for name in store.classes), False], dtype=bool)
        return hits[_recoded(store, store.classes)]
    raise EvaluationError(f"{pattern!r} is not of the form label=PATTERN or id=PATTERN")


def named(store: Store, ids: Iterable[str], *, all_of_them: bool = False) -> npt.NDArray[np.bool_]:
    """Return which rows have one of the given ids.

    Raises
    ------
    EvaluationError
        When there are no ids, or the store has none of them, or, if `all_of_them`, lacks one.
    """
    wanted = list(ids)
    if not wanted:
        raise EvaluationError(f"no id is named; name some that {store.path} has, such as {store.ids[:1]}")
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


def _opened(stores: Sequence[Store | str | os.PathLike[str]]) -> list[Store]:
    """Return the stores open, all at once: whatever takes a store's name meanwhile, what was verified is copied."""
    opened: list[Store] = []
    try:
        for store in stores:
            opened.append(store if isinstance(store, Store) else Store.open(store))
    except OSError as error:
        if error.errno == errno.EMFILE:
            error.strerror = (
                f"only {len(opened):,} of {len(stores):,} stores can be open at once here; raise the limit of open "
                "files (ulimit -n), or merge some of them first"
            )
        raise
    return opened


def _require_whole(store: Store, progress: Callable[[int, int], None] | None) -> None:
    for problem in verify(store, progress=progress):
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
        pairs = order[:-1][~front[1:]], order[1:][~front[1:]]
        _require_no_conflict(stores, images, labels, source, *pairs)
    return np.asarray(order[front])


def _require_no_conflict(
    stores: Sequence[Store],
    images: Images,
    labels: npt.NDArray[np.int32],
    source: npt.NDArray[Any],
    left: npt.NDArray[np.int64],
    right: npt.NDArray[np.int64],
) -> None:
    """Raise when two rows of one id have different content or labels, or when that cannot be told."""
    hashes = images.content_sha256
    hashed = hashes[left].any(axis=1) & hashes[right].any(axis=1)
    conflict = (labels[left] != labels[right]) | (hashed & (hashes[left] != hashes[right]).any(axis=1))
    for wrong, what in (
        (conflict, "stand for different images or labels"),
        (~hashed, "may stand for different images: there is no content hash to tell"),
    ):
        if wrong.any():
            one, other = left[wrong][0], right[wrong][0]
            raise StoreExistsError(
                f"{int(wrong.sum()):,} ids {what}; the first is "
                f"{os.fsdecode(bytes(images.ids[one]))!r} in {stores[source[one]].path} and "
                f"{stores[source[other]].path}; choose with --on-conflict first or newest"
            )


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


def _header(like: Store, information: Mapping[str, Any]) -> Header:
    header = Header(like.main_spec, uuid.uuid4().hex, now(), like.layers, information)
    header.provenance()  # Too long? Better known before gigabytes are verified and copied.
    return header


def _publish(target: Path, header: Header, content: Content) -> Store:
    with Lock(parts_folder(target)) as lock:
        publish(target, lock.folder, header, content)
    return Store.open(target)
