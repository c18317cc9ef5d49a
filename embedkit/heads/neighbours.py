"""k-nearest-neighbour heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import normalize
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from embedkit.errors import EvaluationError

Array = npt.NDArray[Any]

# One block of similarities has at most this many rows and columns: 16 MiB in float32, and large enough for BLAS.
QUERY_BLOCK = 256
GALLERY_BLOCK = 16384


class WeightedKNN(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """k-nearest-neighbour classifier whose neighbours vote by similarity.

    Rows are scaled to unit length. Each of the k training rows of highest cosine similarity s votes ``exp(s / T)``
    for its class, and the class with the most votes wins. A row of zeros has similarity 0 to everything.

    Parameters
    ----------
    k : int, default 20
        Number of neighbours; all training rows vote when there are fewer. 20 is the best value of the DINO paper on
        ImageNet.
    temperature : float, default 0.07
        T above: the smaller it is, the more the nearest rows decide. 0.07 is DINO's value.

    Attributes
    ----------
    classes_ : array of shape (c,)
        The labels seen in `fit`, sorted.
    embeddings_ : array of shape (n, d)
        The training rows at unit length; float32 when they were given as float32.
    codes_ : array of shape (n,)
        Row i has the label ``classes_[codes_[i]]``.

    Notes
    -----
    The vote is that of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR
    2018, section 3.4, as used by Caron et al., "Emerging properties in self-supervised vision transformers", ICCV
    2021. Which of several equally similar rows takes the last of the k places is not specified.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.heads import WeightedKNN
    >>> head = WeightedKNN(k=2).fit(np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), ["cat", "cat", "dog"])
    >>> head.predict(np.array([[2.0, 0.1], [0.0, 3.0]])).tolist()
    ['cat', 'dog']
    """

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        self.k = k
        self.temperature = temperature

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> WeightedKNN:
        """Keep the training rows.

        Parameters
        ----------
        X : array of shape (n, d)
            Embeddings.
        y : array of shape (n,)
            Labels, numbers or names.

        Returns
        -------
        WeightedKNN
            This head.

        Raises
        ------
        EvaluationError
            When `k` is less than 1 or `temperature` is not above 0.
        ValueError
            When `X` is not a finite matrix, or `y` does not hold one class label a row.
        """
        if self.k < 1 or not self.temperature > 0:
            raise EvaluationError(
                f"k must be at least 1 and temperature above 0; got k={self.k!r}, temperature={self.temperature!r}"
            )
        # Numbers that are neither float32 nor float64 become the first of the list.
        rows, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(labels)
        self.classes_, self.codes_ = np.unique(labels, return_inverse=True)
        self.embeddings_ = normalize(rows)
        return self

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the label with the most votes for each row, as an array of shape (q,); ties go to the first class."""
        winners = [votes.argmax(axis=1) for votes in self._votes(X)]
        labels: Array = self.classes_[np.concatenate(winners)]
        return labels

    def predict_proba(self, X: npt.ArrayLike) -> Array:
        """Return each class's share of the votes, as an array of shape (q, c) whose rows sum to 1."""
        return np.concatenate([votes.astype(self.embeddings_.dtype) for votes in self._votes(X)])

    def _votes(self, X: npt.ArrayLike) -> Iterator[Array]:
        """Yield the shares of the votes for one block of queries after the other."""
        check_is_fitted(self)
        queries = validate_data(self, X, dtype=self.embeddings_.dtype, reset=False)
        classes = len(self.classes_)
        for start in range(0, len(queries), QUERY_BLOCK):
            scores, rows = self._neighbours(normalize(queries[start : start + QUERY_BLOCK]))
            # A common factor does not change the shares; without it, exp overflows at small temperatures.
            weights = np.exp((scores - scores.max(axis=1, keepdims=True)).astype(np.float64) / self.temperature)
            cells = np.arange(len(rows))[:, None] * classes + self.codes_[rows]
            votes = np.bincount(cells.ravel(), weights=weights.ravel(), minlength=len(rows) * classes)
            votes = votes.reshape(len(rows), classes)
            yield votes / votes.sum(axis=1, keepdims=True)

    def _neighbours(self, queries: Array) -> tuple[Array, Array]:
        """Return scores and rows of the k most similar training rows, both (q, k) and in no particular order."""
        scores = np.empty((len(queries), 0), dtype=queries.dtype)
        rows = np.empty((len(queries), 0), dtype=np.int64)
        for start in range(0, len(self.embeddings_), GALLERY_BLOCK):
            block = queries @ self.embeddings_[start : start + GALLERY_BLOCK].T
            best = _largest(block, self.k)
            scores = np.concatenate([scores, np.take_along_axis(block, best, axis=1)], axis=1)
            rows = np.concatenate([rows, best + start], axis=1)
            best = _largest(scores, self.k)
            scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
        return scores, rows


def _largest(values: Array, k: int) -> Array:
    """Return the columns of the k largest values of each row, or all columns when there are fewer."""
    columns = values.shape[1]
    k = min(k, columns)
    return np.argpartition(values, columns - k, axis=1)[:, columns - k :]
