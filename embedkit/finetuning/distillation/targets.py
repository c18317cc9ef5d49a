"""Targets: what a student is to reproduce, made of the embeddings of one teacher or of several."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedkit.errors import FinetuneError
from embedkit.evaluation.cells import write_whole
from embedkit.index.whitening import FLOOR, Whitening, principal_directions
from embedkit.store import Store
from embedkit.store.durable import aside, naming, publish_over, sync, sync_folder

_BLOCK = 8192


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of all views, in a file that is mapped and never in memory as a whole.

    Attributes
    ----------
    values : array of shape (n, d)
        float16, mapped: those of every teacher beside one another.
    widths : tuple of int
        How many of the d belong to each teacher.
    """

    values: npt.NDArray[np.float16]
    widths: tuple[int, ...]

    def rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the targets of some rows, of shape (len(rows), d)."""
        return np.asarray(self.values[rows], dtype=np.float32)


def fit_target_map(store: Store, width: int, whitening: float, *, seed: int = 0) -> Whitening:
    """Learn the linear map that turns a teacher's embeddings into targets.

    The mean is taken away, and directions are kept in the order of their variance. A direction of variance v is divided
    by v to the power `whitening` / 2, and all of them by one number, so that their variances have the mean 1 and every
    teacher of a width counts alike.

    Parameters
    ----------
    store : Store
        A teacher's embeddings.
    width : int
        Directions to keep; fewer where the store varies in fewer.
    whitening : float
        0 keeps the teacher's own geometry, 1 makes all directions equally loud.
    seed : int, default 0
        Draws the sample that is learned from.

    Returns
    -------
    Whitening

    Raises
    ------
    FinetuneError
        When all embeddings are alike.
    """
    mean, variances, directions = principal_directions(store, seed=seed)
    kept = np.flatnonzero(variances > FLOOR * max(variances[-1], 0))[::-1][:width]
    if not len(kept):
        raise FinetuneError(
            f"{store.path}: all {len(store):,} embeddings are alike, and nothing can be learned from them"
        )
    scale = variances[kept] ** (-whitening / 2)
    scale /= np.sqrt((variances[kept] * scale**2).mean())
    matrix = (directions[:, kept] * scale).T
    return Whitening(mean.astype(np.float32), np.ascontiguousarray(matrix, dtype=np.float32))


def build_targets(
    stores: Sequence[Store],
    ids: npt.NDArray[np.bytes_],
    path: str | os.PathLike[str],
    *,
    width: int = 512,
    whitening: float = 0.0,
    seed: int = 0,
) -> Targets:
    """Make the targets of some ids from the stores of all teachers, or map those that lie there already.

    Parameters
    ----------
    stores : sequence of Store
        One for each teacher; each has every id.
    ids : array of shape (n,)
        Bytes, in the order of the targets' rows.
    path : path-like
        The file: a NumPy array of float16. Beside it lies ``PATH.json``, which says what it was made of.
    width, whitening, seed
        As for `fit_target_map`, of each teacher.

    Returns
    -------
    Targets

    Raises
    ------
    FinetuneError
        When a teacher's embeddings are all alike.
    """
    path = Path(path)
    note = path.with_name(path.name + ".json")
    made_of = {
        "stores": [store.content_id for store in stores], "ids": hashlib.sha256(b"\0".join(ids.tolist())).hexdigest(),
        "width": width, "whitening": whitening, "seed": seed,
    }  # fmt: skip
    found = _existing(path, note, made_of, len(ids))
    if found is not None:
        return found
    maps = [fit_target_map(store, width, whitening, seed=seed) for store in stores]
    widths = tuple(found.dim for found in maps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path.parent) as fresh:
        values = np.lib.format.open_memmap(fresh, mode="w+", dtype=np.float16, shape=(len(ids), sum(widths)))
        for number, (store, map_) in enumerate(zip(stores, maps, strict=True)):
            columns = slice(sum(widths[:number]), sum(widths[: number + 1]))
            rows = np.searchsorted(store.images.ids, ids)
            for start in range(0, len(ids), _BLOCK):
                span = slice(start, start + _BLOCK)
                values[span, columns] = map_.apply(store.rows(rows[span]))
        values.flush()
        del values
        with fresh.open("rb+") as file, naming(path):
            sync(file.fileno())
        note.unlink(missing_ok=True)
        sync_folder(path.parent)  # After a power cut, no note speaks of other targets than those beside it.
        publish_over(fresh, path)
    write_whole(note, json.dumps({**made_of, "widths": widths}).encode())
    return Targets(np.load(path, mmap_mode="r", allow_pickle=False), widths)


def _existing(path: Path, note: Path, made_of: dict[str, object], count: int) -> Targets | None:
    """Return the targets that lie there, if they were made of the same things and whole."""
    try:
        said = json.loads(note.read_bytes())
        widths = tuple(int(width) for width in said.pop("widths"))
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None  # None there, or half of one: it is made in seconds.
    if said != made_of or values.shape != (count, sum(widths)) or values.dtype != np.float16:
        return None
    return Targets(values, widths)
