"""Whitening: embeddings turned, scaled and shortened so that no direction outweighs the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.store import Store

SAMPLE = 100_000  # Rows. A covariance of a few thousand directions needs no more.
FLOOR = 1e-6  # Of the largest variance. What varies less is rounding, and would be made as loud as the rest.


@dataclass(frozen=True, eq=False)
class Whitening:
    """A linear map after which all directions vary alike.

    Attributes
    ----------
    mean : array of shape (d,)
        What is taken away first, float32.
    matrix : array of shape (m, d)
        What is multiplied with then, float32.
    """

    mean: npt.NDArray[np.float32]
    matrix: npt.NDArray[np.float32]

    @classmethod
    def of(cls, mean: npt.NDArray[Any], matrix: npt.NDArray[Any], dim: int) -> Whitening:
        """Return a whitening of embeddings of width `dim` that was read from a file.

        Raises
        ------
        ValueError
            When it is none.
        """
        fits = mean.shape == (dim,) and matrix.ndim == 2 and matrix.shape[1] == dim and 1 <= len(matrix) <= dim
        if not fits or mean.dtype != np.float32 or matrix.dtype != np.float32:
            raise ValueError(f"a whitening of shapes {mean.shape} and {matrix.shape} does not fit width {dim}")
        return cls(mean, matrix)

    @property
    def dim(self) -> int:
        """Width of whitened embeddings."""
        return len(self.matrix)

    def apply(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return vectors of shape (n, d) whitened, of shape (n, m)."""
        whitened: npt.NDArray[np.float32] = (vectors - self.mean) @ self.matrix.T
        return whitened


def fit_whitening(store: Store, dim: int, *, seed: int = 0) -> Whitening:
    """Learn a whitening from the embeddings of a store.

    Parameters
    ----------
    store : Store
        What to learn from: all rows, or a sample of 100,000.
    dim : int
        Width to keep: that many directions of the largest variance.
    seed : int, default 0
        Draws the sample.

    Returns
    -------
    Whitening

    Raises
    ------
    ValueError
        When the store is narrower than `dim`, or its rows do not vary in as many directions.

    Notes
    -----
    Jegou and Chum, "Negative evidences and co-occurrences in image retrieval: the benefit of PCA and whitening", 2012.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.index.whitening import fit_whitening
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=4)
    >>> x = np.random.default_rng(0).standard_normal((500, 4)) * [9, 3, 1, 0.1]
    >>> with StoreWriter(f"{folder.name}/s.h5", spec) as writer:
    ...     writer.append(x, [f"{row:03}.jpg" for row in range(500)])
    ...     writer.finalise()
    >>> store = Store.open(f"{folder.name}/s.h5")
    >>> whitening = fit_whitening(store, 2)
    >>> bool(np.allclose(np.cov(whitening.apply(np.float32(x)).T), np.eye(2), atol=0.01))
    True
    >>> folder.cleanup()
    """
    if not 1 <= dim <= store.dim:
        raise ValueError(f"{store.path} holds embeddings of width {store.dim}; cannot whiten to {dim}")
    mean, variances, directions = principal_directions(store, seed=seed)
    varied = int((variances > FLOOR * max(variances[-1], 0)).sum())
    if varied < dim:
        raise ValueError(
            f"{store.path}: {min(SAMPLE, len(store)):,} rows vary in {varied} directions; cannot whiten to {dim}"
        )
    kept = slice(store.dim - dim, None)
    matrix = (directions[:, kept] / np.sqrt(variances[kept])).T[::-1]
    return Whitening(mean.astype(np.float32), np.ascontiguousarray(matrix, dtype=np.float32))


def principal_directions(
    store: Store, *, seed: int = 0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return how the embeddings of a store vary, read in blocks.

    Parameters
    ----------
    store : Store
        All rows, or a sample of 100,000.
    seed : int, default 0
        Draws the sample.

    Returns
    -------
    tuple of arrays
        Their mean of shape (d,), the variances (d,) in rising order, and the directions (d, d), one a column.
    """
    rows = np.arange(len(store))
    if len(rows) > SAMPLE:
        rows = np.sort(np.random.default_rng(seed).choice(len(store), SAMPLE, replace=False))
    total, products = np.zeros(store.dim), np.zeros((store.dim, store.dim))
    for start in range(0, len(rows), 8192):
        block = store.rows(rows[start : start + 8192])
        total += block.sum(axis=0, dtype=np.float64)
        products += block.T @ block
    # cov = E[xx'] - E[x]E[x]' = V diag(v) V', and diag(v)^-1/2 V' whitens.
    mean = total / max(1, len(rows))
    variances, directions = np.linalg.eigh(products / max(1, len(rows)) - np.outer(mean, mean))
    return mean, variances, directions
