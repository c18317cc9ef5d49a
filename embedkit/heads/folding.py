"""Folding: which training rows are held out, and which fold each row falls into.

Byte-identical pictures are one unit: they are never on both sides, or the one would give the other away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]


def hold_out(n: int, fraction: float, seed: int, *, strata: Codes | None = None, groups: Codes | None = None) -> Any:
    """Return which rows to hold out: of each class its share, at least one row where it has two, never all.

    Parameters
    ----------
    n : int
        Number of rows.
    fraction : float
        Share of each class, between 0 and 1.
    seed : int
        Draws the rows.
    strata : array of int of shape (n,), optional
        Class code of each row; without it all rows are alike.
    groups : array of int of shape (n,), optional
        Rows of equal numbers stay on one side.

    Returns
    -------
    array of bool of shape (n,)
        True for the rows that are held out.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.heads.folding import hold_out
    >>> hold_out(10, 0.2, 0, strata=np.repeat([0, 1], 5)).reshape(2, 5).sum(axis=1).tolist()
    [1, 1]
    >>> hold_out(4, 0.5, 0, groups=np.array([0, 0, 1, 1])).reshape(2, 2).sum(axis=1).tolist() in ([0, 2], [2, 0])
    True
    """
    units, classes = _units(n, strata, groups)
    counts = np.bincount(classes)
    shares = np.minimum(np.maximum(np.rint(fraction * counts), 1), counts - 1)
    order, rank = _dealt(classes, counts, seed)
    held = np.zeros(len(classes), dtype=np.bool_)
    held[order] = rank < np.repeat(shares, counts)
    mask = held[units]
    if strata is not None and groups is not None:
        # A class whose every row is the copy of another class's row must not leave the fitted part with it.
        left = np.unique(strata[~mask])
        orphans = np.unique(units[mask & ~np.isin(strata, left)])
        mask &= ~np.isin(units, orphans)
    return mask


def assign_folds(
    n: int, folds: int, seed: int, *, strata: Codes | None = None, groups: Codes | None = None
) -> npt.NDArray[np.int64]:
    """Return the fold of each row, of folds of equal size that each have their share of every class.

    Parameters
    ----------
    n, seed, strata, groups
        As in `hold_out`.
    folds : int
        Number of folds.

    Returns
    -------
    array of int of shape (n,)
        Numbers below `folds`.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.heads.folding import assign_folds
    >>> folds = assign_folds(6, 3, 0, strata=np.array([0, 0, 0, 1, 1, 1]))
    >>> np.sort(folds[:3]).tolist(), np.sort(folds[3:]).tolist()
    ([0, 1, 2], [0, 1, 2])
    """
    units, classes = _units(n, strata, groups)
    order, _ = _dealt(classes, np.bincount(classes), seed)
    fold = np.empty(len(classes), dtype=np.int64)
    # Dealt like cards, one class after the other: each fold gets its share of each, and folds differ by one unit.
    fold[order] = np.arange(len(order)) % folds
    return fold[units]


def _units(n: int, strata: Codes | None, groups: Codes | None) -> tuple[Codes, Codes]:
    """Return the unit of each row, and the class of each unit: that of its first row."""
    rows = np.arange(n)
    first, units = (rows, rows) if groups is None else np.unique(groups, return_index=True, return_inverse=True)[1:]
    if groups is not None:
        # Numbered in the order of their first rows, so that without copies the units are the rows themselves.
        place = np.empty(len(first), dtype=np.int64)
        place[np.argsort(first)] = np.arange(len(first))
        first, units = np.sort(first), place[units]
    if strata is None:
        return units, np.zeros(len(first), dtype=np.int64)
    return units, np.unique(strata[first], return_inverse=True)[1]


def _dealt(classes: Codes, counts: Codes, seed: int) -> tuple[Codes, Codes]:
    """Return the units class by class, shuffled within each, and the place of each within its class."""
    shuffled = np.random.default_rng(seed).permutation(len(classes))
    order = shuffled[np.argsort(classes[shuffled], kind="stable")]
    return order, np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
