"""Rows that are the same, and the groups that pairs of rows make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedkit.store import Store

BLOCK = 1024  # Rows: 10 MB of a wide store, where a number takes 8 bytes.

Rows = npt.NDArray[np.int64]


class Forest:
    """Union-find over n rows, for arrays of pairs at a time.

    A row points to a lower row of its group or to itself, so that there are never more edges than rows.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.index.duplicates.grouping import Forest
    >>> forest = Forest(5)
    >>> forest.join(np.array([4, 2]), np.array([2, 1]))
    >>> forest.roots(np.arange(5)).tolist()
    [0, 1, 1, 3, 1]
    """

    def __init__(self, n: int) -> None:
        self._parents: Rows = np.arange(n)

    def roots(self, rows: Rows) -> Rows:
        """Return the lowest row of each row's group."""
        roots: Rows = self._parents[rows]
        while True:
            higher: Rows = self._parents[roots]
            if np.array_equal(higher, roots):
                break
            roots = higher
        self._parents[rows] = roots  # Shorter ways for who asks next.
        return roots

    def apart(self, left: Rows, right: Rows) -> npt.NDArray[np.bool_]:
        """Return which pairs are not in one group."""
        different: npt.NDArray[np.bool_] = self.roots(left) != self.roots(right)
        return different

    def join(self, left: Rows, right: Rows) -> None:
        """Make one group of the groups of each pair."""
        while len(left):
            left, right = self.roots(left), self.roots(right)
            # A root that several pairs would hang elsewhere takes the lowest place; the others come round again.
            np.minimum.at(self._parents, np.maximum(left, right), np.minimum(left, right))
            open_still = self.apart(left, right)
            left, right = left[open_still], right[open_still]


def same_content(stores: Sequence[Store]) -> Rows:
    """Return a number for what each row's image was made of, of shape (n,); -1 where no hash is known.

    The rows of several stores follow one another. Equal hashes have equal numbers: those of files, of boxes in them,
    and of pixels in memory are never equal to one another.
    """
    hashes = np.concatenate([store.images.content_sha256 for store in stores])
    known = hashes.any(axis=1)
    numbers: Rows = np.full(len(hashes), -1, dtype=np.int64)
    whole = np.ascontiguousarray(hashes[known]).view("V32").reshape(-1)
    numbers[known] = np.unique(whole, return_inverse=True)[1].reshape(-1)
    return numbers


def copies_among(store: Store, rows: Rows) -> Rows | None:
    """Return a number for each of some rows, the same for byte-identical pictures; None where no two are."""
    firsts = firsts_of(same_content([store])[rows])
    return None if np.array_equal(firsts, np.arange(len(firsts))) else firsts


def firsts_of(numbers: Rows) -> Rows:
    """Return for each number the first place where it stands; of -1 its own place."""
    firsts: Rows = np.arange(len(numbers))
    known = np.flatnonzero(numbers >= 0)
    _, first, inverse = np.unique(numbers[known], return_index=True, return_inverse=True)
    firsts[known] = known[first[inverse.reshape(-1)]]
    return firsts


def same_embedding(store: Store) -> Rows:
    """Return for each row the first row whose embedding is the same number for number, of shape (n,)."""
    weights = np.random.default_rng(0).integers(0, 2**63, store.dim, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    keys = np.empty(len(store), dtype=np.uint64)
    for number, block in enumerate(store.iter_blocks(BLOCK)):
        start = number * BLOCK
        keys[start : start + len(block)] = np.ascontiguousarray(block).view(np.uint32).astype(np.uint64) @ weights
    order = np.argsort(keys, kind="stable")
    # Equal keys are a suspicion: each row is compared with the one before it.
    suspects = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
    same = np.zeros(len(store), dtype=bool)
    for start in range(0, len(suspects), BLOCK):
        places = suspects[start : start + BLOCK]
        same[places] = (store.rows(order[places]) == store.rows(order[places - 1])).all(axis=1)
    begins = np.maximum.accumulate(np.where(same, 0, np.arange(len(store))))
    firsts: Rows = np.empty(len(store), dtype=np.int64)
    firsts[order] = order[begins]
    return firsts
