"""Clusters: groups of rows that look alike, by k-means on the sphere."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.index.exact import Gallery, Progress
from embedkit.store import Store
from embedkit.text import counted

SAMPLE_BYTES = 512 << 20
POINTS_PER_CENTRE = 256
LEAST_POINTS = 16_384
ITERATIONS = 25

CHOICE_ITERATIONS = 10
CHOICE_ROWS = 10_000  # Half of them are clustered, half tell how well.
CHOICE_POINTS_PER_CENTRE = 10
MOST_CHOSEN = 256
BLOCK_BYTES = 64 << 20

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

log = logging.getLogger("embedkit")


@dataclass(frozen=True)
class Candidate:
    """A number of clusters that was tried: its mean simplified silhouette in [0, 1], and the standard error of that."""

    k: int
    silhouette: float
    standard_error: float


@dataclass(frozen=True, eq=False, repr=False)
class Clusters:
    """Groups of rows, the largest first.

    Attributes
    ----------
    store : Store
        What was clustered.
    assignments : array of int of shape (n,)
        Cluster of every row, from 0.
    similarities : array of shape (n,)
        Cosine similarity of every row to the centre of its cluster.
    centres : array of shape (k, d)
        Of length 1.
    sizes : array of int of shape (k,)
        Rows of each cluster, at least one.
    medoids : array of int of shape (k,)
        The row of each cluster that is nearest to its centre.
    seed : int
        What it was drawn with.
    candidates : tuple of Candidate
        What "auto" measured; empty where the number was given.
    """

    store: Store
    assignments: Rows
    similarities: Vectors
    centres: Vectors
    sizes: Rows
    medoids: Rows
    seed: int
    candidates: tuple[Candidate, ...] = ()

    def __repr__(self) -> str:
        found = f"{counted(len(self), 'cluster')} of {counted(len(self.assignments), 'image')}"
        return f"<Clusters of {self.store.path}: {found}, seed {self.seed}>"

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def mean_similarities(self) -> npt.NDArray[np.float64]:
        """Mean similarity of each cluster's rows to its centre, of shape (k,)."""
        return np.bincount(self.assignments, weights=self.similarities, minlength=len(self)) / self.sizes

    @cached_property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Which rows have a label, of shape (n,)."""
        labels = self.store.labels
        return np.zeros(len(self.assignments), dtype=np.bool_) if labels is None else np.asarray(labels >= 0)

    @property
    def majorities(self) -> dict[int, tuple[str, float]]:
        """The most frequent class of each cluster that has labelled rows, and its share of them."""
        if self.store.labels is None:
            return {}
        c, known = len(self.store.classes), self.labelled
        cells, counts = np.unique(self.assignments[known] * c + self.store.labels[known], return_counts=True)
        numbers, codes = cells // c, cells % c
        sums = np.bincount(numbers, weights=counts, minlength=len(self))
        order = np.lexsort((codes, -counts, numbers))
        first = order[np.unique(numbers[order], return_index=True)[1]]
        return {
            int(numbers[cell]): (self.store.classes[codes[cell]], float(counts[cell] / sums[numbers[cell]]))
            for cell in first
        }

    @property
    def purity(self) -> float | None:
        """Share of the labelled rows that are of the most frequent class of their cluster; None without any."""
        if not self.labelled.any():
            return None
        sizes = np.bincount(self.assignments[self.labelled], minlength=len(self))
        return float(sum(share * sizes[number] for number, (_, share) in self.majorities.items()) / sizes.sum())

    @property
    def nmi(self) -> float | None:
        """Normalised mutual information of clusters and classes, over the labelled rows; None without any."""
        if self.store.labels is None or not self.labelled.any():
            return None
        return normalised_mutual_information(self.assignments[self.labelled], self.store.labels[self.labelled])

    def to_dict(self) -> dict[str, Any]:
        """Return what is known of the clusters, without their rows, as JSON values."""
        ids, majorities = self.store.ids, self.majorities
        found = zip(self.sizes.tolist(), self.mean_similarities.tolist(), self.medoids.tolist(), strict=True)
        clusters: list[dict[str, Any]] = [
            {"cluster": number, "size": size, "similarity": similarity, "medoid": ids[medoid]}
            for number, (size, similarity, medoid) in enumerate(found)
        ]
        for number, (label, share) in majorities.items():
            clusters[number] |= {"label": label, "label_share": share}
        return {
            "k": len(self),
            "purity": self.purity,
            "nmi": self.nmi,
            "seed": self.seed,
            "candidates": [vars(candidate) for candidate in self.candidates],
            "clusters": clusters,
        }


def cluster(
    store: Store | str | os.PathLike[str],
    k: int | str = "auto",
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Clusters:
    """Group the rows of a store by k-means on cosine similarity.

    Parameters
    ----------
    store : Store or path-like
        What to cluster.
    k : int or "auto", default "auto"
        How many clusters; "auto" chooses among 2 to 256 by a silhouette. There can be fewer in the end, where the store
        has fewer different rows.
    seed : int, default 0
        Draws samples and first centres. The same seed gives the same clusters on one machine.
    progress : callable, optional
        Called with the rows that were assigned and their number.

    Returns
    -------
    Clusters
        None of them empty, the largest first.

    Raises
    ------
    StoreFormatError
        When an embedding is not finite.
    EvaluationError
        When `k` is neither "auto" nor a number from 1 to the rows of the store, or the store is empty.

    Notes
    -----
    FAISS's spherical k-means (Dhillon and Modha, 2001) from k-means++ (Arthur and Vassilvitskii, 2007) on a sample of
    at most 512 MiB and, where k allows, 256 rows for each centre; then every row goes to the nearest centre.

    "auto" clusters 5,000 rows and measures the clusters on 5,000 others by the simplified silhouette, the mean of
    1 - a / b, with a and b the cosine distances to the nearest centre and to the second nearest (Hruschka, de Castro
    and Campello, 2004). The smallest number within one standard error of the best is taken.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec
    >>> from embedkit.index.clusters import cluster
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> with StoreWriter(f"{folder.name}/s.h5", spec) as writer:
    ...     writer.append([[1, 0], [1, 0.2], [0, 1], [1, 0.1]], ["a", "b", "c", "d"])
    ...     writer.finalise()
    >>> found = cluster(f"{folder.name}/s.h5", k=2)
    >>> found.assignments.tolist(), found.sizes.tolist(), [found.store.ids[row] for row in found.medoids]
    ([0, 0, 1, 0], [3, 1], ['d', 'c'])
    >>> folder.cleanup()
    """
    opened = store if isinstance(store, Store) else Store.open(store)
    if not len(opened):
        raise EvaluationError(f"{opened.path} is empty: there is nothing to cluster")
    if k != "auto" and (not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= len(opened)):
        raise EvaluationError(
            f'k must be "auto" or a number from 1 to the {len(opened):,} rows of {opened.path}, got {k!r}'
        )
    Gallery(opened).norms  # noqa: B018  # Raises when an embedding is not finite.
    candidates = _candidates(opened, seed) if k == "auto" else ()
    number = _chosen(candidates) if isinstance(k, str) else k
    size = min(max(LEAST_POINTS, POINTS_PER_CENTRE * number), max(number, SAMPLE_BYTES // (4 * opened.dim)))
    sample = _sample(opened, size, seed)
    # Good seeds cost too much where there are many; those that FAISS draws by itself have to do.
    few = number <= MOST_CHOSEN
    seeds = _seeds(sample[:: max(1, len(sample) // CHOICE_ROWS)], number, seed) if few else None
    centres = _centres(sample, number, seed, seeds)
    return _assigned(opened, centres, seed, candidates, progress)


def normalised_mutual_information(left: Rows, right: Rows) -> float:
    """Return the normalised mutual information of two groupings, by the mean of their entropies.

    Parameters
    ----------
    left, right : array of int of shape (n,)
        Group of every item, from 0; at least one item.

    Returns
    -------
    float
        In [0, 1]; 1 also where both groupings have a single group.

    Notes
    -----
    Strehl and Ghosh, "Cluster ensembles", 2002, with the arithmetic mean, as scikit-learn has it.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.index.clusters import normalised_mutual_information
    >>> normalised_mutual_information(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    1.0
    >>> round(normalised_mutual_information(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])), 6)
    0.0
    """
    total = _entropy(left) + _entropy(right)
    # I(U, V) = H(U) + H(V) - H(U, V), and the mean of both entropies is half their sum.
    information = total - _entropy(left * (right.max() + 1) + right)
    return float(np.clip(2 * information / total, 0, 1)) if total > 0 else 1.0


def _entropy(groups: Rows) -> float:
    shares = np.unique(groups, return_counts=True)[1] / len(groups)
    return float(-(shares * np.log(shares)).sum())


def _sample(store: Store, size: int, seed: int) -> Vectors:
    """Return rows of a store, drawn without repeats, of length 1."""
    rows = np.arange(len(store))
    if size < len(store):
        rows = np.sort(np.random.default_rng(seed).choice(len(store), size, replace=False))
    return _unit(store.rows(rows))


def _unit(vectors: Vectors) -> Vectors:
    unit = np.array(vectors, dtype=np.float32, order="C")
    faiss.normalize_L2(unit)
    return unit


def _seeds(vectors: Vectors, k: int, seed: int) -> Vectors:
    """Return k of the vectors to begin with, spread by k-means++; the first of them are those of fewer clusters.

    Each is the best of a few draws, as Arthur and Vassilvitskii propose in their section 7.
    """
    random, draws = np.random.default_rng(seed), 2 + int(np.log(k))
    chosen = np.empty(k, dtype=np.int64)
    chosen[0] = random.integers(len(vectors))
    distances = (1 - vectors @ vectors[chosen[0]]).clip(min=0).astype(np.float64)
    for number in range(1, k):
        cumulated = np.cumsum(distances)
        if not cumulated[-1] > 0:  # Everything lies on a seed already.
            chosen[number:] = chosen[0]
            break
        drawn = np.searchsorted(cumulated, random.random(draws) * cumulated[-1]).clip(max=len(vectors) - 1)
        left = np.minimum(distances[:, None], (1 - vectors @ vectors[drawn].T).clip(min=0))
        best = int(left.sum(axis=0).argmin())
        chosen[number], distances = drawn[best], left[:, best]
    return vectors[chosen]


def _centres(
    vectors: Vectors, k: int, seed: int, seeds: Vectors | None = None, iterations: int = ITERATIONS
) -> Vectors:
    """Return k centres of length 1, moved from seeds where there are some; vectors are of length 1 as well."""
    kmeans = faiss.Kmeans(
        vectors.shape[1], k, niter=iterations, seed=seed, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=len(vectors), init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
    )  # fmt: skip
    kmeans.train(vectors, init_centroids=seeds)
    centres: Vectors = kmeans.centroids
    return centres


def _candidates(store: Store, seed: int) -> tuple[Candidate, ...]:
    """Measure numbers of clusters: first over the whole range, then between the neighbours of the best."""
    vectors = _sample(store, CHOICE_ROWS, seed)
    vectors = vectors[np.random.default_rng(seed).permutation(len(vectors))]
    half = len(vectors) // 2
    # Of a handful of rows no half can be spared.
    train, held_out = (vectors[:half], vectors[half:]) if len(vectors) >= 40 else (vectors, vectors)
    most = min(MOST_CHOSEN, max(2, len(train) // CHOICE_POINTS_PER_CENTRE))
    if len(train) < 2:
        return ()
    log.info("trying numbers of clusters from 2 to %s on %s rows", most, f"{len(vectors):,}")
    seeds = _seeds(train, most, seed)

    def measured(k: int) -> Candidate:
        with _one_thread():
            return _measured(_centres(train, k, seed, seeds[:k], CHOICE_ITERATIONS), held_out)

    # Every number at first, later four between a power of two and the next.
    found = {k: measured(k) for k in range(2, most + 1) if k <= 8 or k % (1 << (k.bit_length() - 3)) == 0}
    while True:
        tried = sorted(found)
        place = tried.index(max(tried, key=lambda k: found[k].silhouette))
        around = tried[max(0, place - 1) : place + 2]
        halfway = {(low + high) // 2 for low, high in pairwise(around)} - found.keys()
        if not halfway:
            return tuple(found[k] for k in tried)
        found |= {k: measured(k) for k in sorted(halfway)}


def _measured(centres: Vectors, held_out: Vectors) -> Candidate:
    """Return the simplified silhouette of clusters on rows that they were not made of."""
    nearest = np.sort(1 - held_out @ centres.T, axis=1)[:, :2].clip(min=0)
    a, b = nearest[:, 0], nearest[:, 1]
    widths = 1 - np.divide(a, b, out=np.ones_like(a), where=b > 0)
    return Candidate(len(centres), float(widths.mean()), float(widths.std() / np.sqrt(len(widths))))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let FAISS work in this thread alone: on little data its threads mostly wait for one another."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _chosen(candidates: tuple[Candidate, ...]) -> int:
    """Return the smallest number that is within one standard error of the best."""
    if not candidates:
        return 1
    best = max(candidates, key=lambda candidate: candidate.silhouette)
    return min(one.k for one in candidates if one.silhouette >= best.silhouette - best.standard_error)


def _assigned(
    store: Store, centres: Vectors, seed: int, candidates: tuple[Candidate, ...], progress: Progress | None
) -> Clusters:
    """Give every row to its nearest centre, leave out empty clusters, and number them by size."""
    n, k = len(store), len(centres)
    assignments, similarities = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.float32)
    start = 0
    if progress is not None:
        progress(0, n)
    for block in store.iter_blocks(max(1, min(8192, BLOCK_BYTES // (4 * k)))):
        likeness = _unit(block) @ centres.T
        stop = start + len(block)
        assignments[start:stop] = likeness.argmax(axis=1)
        similarities[start:stop] = likeness.max(axis=1).clip(-1, 1)
        start = stop
        if progress is not None:
            progress(stop, n)
    sizes = np.bincount(assignments, minlength=k)
    # By cluster, then the most similar first, then by row: where a cluster begins stands its medoid.
    order = np.lexsort((-similarities, assignments))
    medoids = np.full(k, n, dtype=np.int64)
    medoids[sizes > 0] = order[np.r_[0, np.flatnonzero(np.diff(assignments[order])) + 1]]
    largest = np.lexsort((medoids, -sizes))[: int((sizes > 0).sum())]
    number = np.empty(k, dtype=np.int64)
    number[largest] = np.arange(len(largest))
    return Clusters(
        store, number[assignments], similarities, centres[largest], sizes[largest], medoids[largest], seed, candidates
    )
