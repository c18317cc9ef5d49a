"""How similar two images are that show the same: the threshold of near duplicates, chosen from the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedkit.index.exact import Gallery
from embedkit.text import counted

DEFAULT = 0.97  # Where there is too little to choose from.
SAMPLE = 1000
NEIGHBOURS = 20
CHANCE = 1e-3
HIGHEST = 0.9999  # Decoders and batches round: a threshold above it would tell copies apart.
NEAR = 0.01

Floats = npt.NDArray[np.floating]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Threshold:
    """The least cosine similarity of near duplicates, and where it comes from.

    Attributes
    ----------
    value : float
        The least similarity.
    chosen : bool
        Whether the embeddings chose it.
    sampled : int
        Rows that were looked at for that.
    above, near : int
        How many of them have their nearest neighbour at the threshold or above it, and within 0.01 of it.
    dimension : float
        In how many dimensions the neighbours of a row lie; NaN when not known.
    """

    value: float
    chosen: bool = False
    sampled: int = 0
    above: int = 0
    near: int = 0
    dimension: float = float("nan")

    def __str__(self) -> str:
        """Return one line for people."""
        if not self.chosen:
            why = (
                f" ({counted(self.sampled, 'row')}: too few, or too much alike, to choose it from)"
                if self.sampled
                else ""
            )
            return f"threshold {self.value:.4f}{why}"
        return (
            f"threshold {self.value:.4f}, chosen from {self.sampled:,} rows: {self.above:,} of them have their nearest "
            f"neighbour above it, {self.near:,} within {NEAR} of it"
        )


def checked_threshold(value: float) -> Threshold:
    """Return a threshold that a person chose, or raise ValueError when no similarity can be compared with it."""
    if not 0 < value <= 1:
        raise ValueError(f'a threshold is a cosine similarity above 0 and at most 1, or "auto"; got {value}')
    return Threshold(float(value))


def choose_threshold(
    gallery: Gallery, queries: Gallery | None = None, *, progress: Progress | None = None
) -> Threshold:
    """Choose the least similarity of near duplicates, without labels.

    Parameters
    ----------
    gallery : Gallery
        Where neighbours are looked for; of cosine similarities.
    queries : Gallery, optional
        Whose neighbours; by default those of the gallery's own rows, without themselves.
    progress : callable, optional
        Called with the rows that were compared and their number.

    Returns
    -------
    Threshold
        Its value is 0.97 when there are fewer than 200 rows, or when most rows have 20 copies.

    Notes
    -----
    Images that merely resemble one another fill the space around an image evenly: the number of neighbours within a
    distance r grows as r^D, and D is told by where the 10th and the 20th neighbour lie, as log 2 / log(r20 / r10), in
    the median of a sample, which duplicates do not move. The chance that one of 20 such neighbours comes as close as r
    is then about 20 (r / r20)^D. The threshold is the distance where this chance, in the mean of the sample, is one in
    a thousand: what is nearer is there for another reason than that the space is full. It is never above 0.9999.
    D is estimated from distances of nearest neighbours, as by Pettis, Bailey, Jain and Dubes (1979).
    """
    mine = gallery if queries is None else queries
    random = np.random.default_rng(0)
    rows = np.flatnonzero(mine.norms > 0)
    rows = np.sort(random.permutation(rows)[:SAMPLE])
    if min(len(rows), int(np.count_nonzero(gallery.norms))) < 10 * NEIGHBOURS:
        return Threshold(DEFAULT, sampled=len(rows))
    vectors = mine.store.rows(rows)
    scores, found = gallery.search(vectors, NEIGHBOURS + 1, progress=progress)
    if queries is None:
        scores = _without(scores, found == rows[:, None])
    scores = scores[:, :NEIGHBOURS]
    distances = np.sqrt(np.maximum(0, 2 - 2 * scores.astype(np.float64)))
    half, last = distances[:, NEIGHBOURS // 2 - 1], distances[:, -1]
    usable = half > 1e-3  # Closer is rounding: a row with ten copies says nothing.
    if 2 * np.count_nonzero(usable) < len(rows):
        return Threshold(DEFAULT, sampled=len(rows))
    dimension = float(np.log(2) / max(1e-3, np.median(np.log(last[usable] / half[usable]))))
    distance = _distance_of(CHANCE, last[usable], dimension)
    value = min(HIGHEST, 1 - distance**2 / 2)
    nearest = scores[:, 0]
    near = int(np.count_nonzero(np.abs(nearest - value) <= NEAR))
    return Threshold(value, True, len(rows), int(np.count_nonzero(nearest >= value)), near, dimension)


def _without(scores: Floats, self: npt.NDArray[np.bool_]) -> Floats:
    """Drop the row itself from each line, or the last where copies pushed it out; of shape (q, k)."""
    self[~self.any(axis=1), -1] = True
    return scores[~self].reshape(len(scores), -1)


def _distance_of(chance: float, last: Floats, dimension: float) -> float:
    """Return the distance within which a row has an unrelated neighbour with this chance, in the mean."""
    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        if np.minimum(1, NEIGHBOURS * (middle / last) ** dimension).mean() > chance:
            high = middle
        else:
            low = middle
    return low
