"""k-nearest-neighbour heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.preprocessing import normalize
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from embedkit.errors import EvaluationError
from embedkit.heads.labels import encode
from embedkit.index.exact import nearest_rows

Array = npt.NDArray[Any]

# One block of similarities has at most this many rows and columns: 32 MiB in float64, and large enough for BLAS.
QUERY_BLOCK = 1024
GALLERY_BLOCK = 4096
_VOTES = 1 << 24  # Of a block of queries whose neighbours are known, so that memory does not grow with the classes.


class _Neighbours(BaseEstimator):  # type: ignore[misc]
    """Training rows at unit length, and the weights of the k most similar ones."""

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        self.k = k
        self.temperature = temperature

    def _require_senseful(self) -> None:
        if self.k < 1 or not self.temperature > 0:
            raise EvaluationError(
                f"k must be at least 1 and temperature above 0; got k={self.k!r}, temperature={self.temperature!r}"
            )

    def search(self, X: npt.ArrayLike, k: int | None = None) -> tuple[Array, Array]:
        """Return similarities and training rows of the nearest neighbours of each row, best first.

        Parameters
        ----------
        X : array of shape (q, d)
            Embeddings.
        k : int, optional
            How many neighbours in place of the head's own number; all rows where there are fewer.

        Returns
        -------
        scores, rows : arrays of shape (q, min(k, n))
            Cosine similarities, and rows of `embeddings_`. FAISS finds those of float32 rows; float64 stays float64.
        """
        check_is_fitted(self)
        blocks = list(self._blocks(X, self.k if k is None else k))
        return np.concatenate([scores for scores, _ in blocks]), np.concatenate([rows for _, rows in blocks])

    def _blocks(self, X: npt.ArrayLike, k: int) -> Iterator[tuple[Array, Array]]:
        """Yield what `search` returns for one block of queries after the other."""
        queries = validate_data(self, X, dtype=self.embeddings_.dtype, reset=False)
        find = nearest_rows if self.embeddings_.dtype == np.float32 else _nearest_doubles
        for start in range(0, len(queries), QUERY_BLOCK):
            yield find(normalize(queries[start : start + QUERY_BLOCK]), self.embeddings_, k)

    def _weights(self, X: npt.ArrayLike) -> Iterator[tuple[Array, Array]]:
        """Yield weights and rows of the neighbours, both (q, k), for one block of queries after the other."""
        check_is_fitted(self)
        for scores, rows in self._blocks(X, self.k):
            yield self._weighed(scores), rows

    def _weighed(self, scores: Array) -> Array:
        # A common factor does not change the shares; without it, exp overflows at small temperatures.
        weights: Array = np.exp((scores - scores.max(axis=1, keepdims=True)).astype(np.float64) / self.temperature)
        return weights


class WeightedKNN(ClassifierMixin, _Neighbours):  # type: ignore[misc]
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
        self._require_senseful()
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
        for weights, rows in self._weights(X):
            yield self._counted(weights, rows)

    def _counted(self, weights: Array, rows: Array) -> Array:
        classes = len(self.classes_)
        cells = np.arange(len(rows))[:, None] * classes + self.codes_[rows]
        votes = np.bincount(cells.ravel(), weights=weights.ravel(), minlength=len(rows) * classes)
        votes = votes.reshape(len(rows), classes)
        shares: Array = votes / votes.sum(axis=1, keepdims=True)
        return shares


class KnownNeighbours:
    """A k-NN head over queries whose neighbours are known: it is asked for their numbers, not for embeddings.

    Several k, and both labels and probabilities, then cost one search.

    Parameters
    ----------
    head : WeightedKNN
        Fitted.
    scores, rows : arrays of shape (q, m)
        What ``head.search(queries, m)`` returned.
    k : int
        How many of the neighbours vote.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.heads.neighbours import KnownNeighbours, WeightedKNN
    >>> head = WeightedKNN().fit([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], ["cat", "cat", "dog"])
    >>> scores, rows = head.search([[0.2, 1.0], [2.0, 0.1]])
    >>> KnownNeighbours(head, scores, rows, k=1).predict(np.array([1, 0])).tolist()
    ['cat', 'dog']
    """

    def __init__(self, head: WeightedKNN, scores: Array, rows: Array, k: int) -> None:
        self.head, self.scores, self.rows = head, scores[:, :k], rows[:, :k]
        self.classes_ = head.classes_

    def predict(self, numbers: Array) -> Array:
        """Return the label with the most votes for each of the queries with these numbers."""
        size = max(1, _VOTES // len(self.classes_))
        starts = range(0, max(1, len(numbers)), size)
        winners = [self._shares(numbers[start : start + size]).argmax(axis=1) for start in starts]
        labels: Array = self.classes_[np.concatenate(winners)]
        return labels

    def predict_proba(self, numbers: Array) -> Array:
        """Return each class's share of the votes, of shape (len(numbers), c)."""
        shares: Array = self._shares(numbers).astype(self.scores.dtype)
        return shares

    def _shares(self, numbers: Array) -> Array:
        return self.head._counted(self.head._weighed(self.scores[numbers]), self.rows[numbers])


class _TargetKNN(_Neighbours):
    """Neighbours whose numbers are averaged."""

    def _keep(self, X: npt.ArrayLike, y: npt.ArrayLike, **checks: bool) -> Array:
        self._require_senseful()
        targets: Array
        rows, targets = validate_data(self, X, y, dtype=[np.float64, np.float32], **checks)
        self.embeddings_ = normalize(rows)
        return targets

    def _averages(self, X: npt.ArrayLike) -> Array:
        """Return the weighted mean of the neighbours' targets, of shape (q,) or (q, t)."""
        means = []
        for weights, rows in self._weights(X):
            weights /= weights.sum(axis=1, keepdims=True)
            means.append(np.einsum("qk,qk...->q...", weights, self.targets_[rows]))
        return np.concatenate(means)


class WeightedKNNRegressor(RegressorMixin, _TargetKNN):  # type: ignore[misc]
    """k-nearest-neighbour regression: the mean of the neighbours' numbers, weighted as `WeightedKNN` weighs votes.

    Parameters
    ----------
    k, temperature
        As of `WeightedKNN`.

    Attributes
    ----------
    embeddings_ : array of shape (n, d)
        The training rows at unit length.
    targets_ : array of float64 of shape (n,)
        Their numbers.

    Examples
    --------
    >>> from embedkit.heads import WeightedKNNRegressor
    >>> head = WeightedKNNRegressor(k=1).fit([[1.0, 0.0], [0.0, 1.0]], [10.0, 20.0])
    >>> head.predict([[0.1, 2.0]]).tolist()
    [20.0]
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> WeightedKNNRegressor:
        """Keep rows of shape (n, d) and numbers of shape (n,); see `WeightedKNN.fit`."""
        self.targets_ = self._keep(X, y, y_numeric=True).astype(np.float64)
        return self

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the number of each row."""
        return self._averages(X)


class LabelKNN(ClassifierMixin, _TargetKNN):  # type: ignore[misc]
    """k-nearest-neighbour head for several labels a row: the share of votes that each label gets.

    Parameters
    ----------
    k, temperature
        As of `WeightedKNN`.

    Attributes
    ----------
    classes_ : array of shape (c,)
        Column numbers.
    embeddings_ : array of shape (n, d)
        The training rows at unit length.
    targets_ : array of float32 of shape (n, c)
        0 and 1.

    Examples
    --------
    >>> from embedkit.heads import LabelKNN
    >>> head = LabelKNN(k=1).fit([[1.0, 0.0], [0.0, 1.0]], [[1, 0, 1], [0, 1, 1]])
    >>> head.predict([[0.1, 2.0]]).tolist()
    [[0, 1, 1]]
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> LabelKNN:
        """Keep rows of shape (n, d) and 0 and 1 of shape (n, c); see `WeightedKNN.fit`.

        A single column of labels becomes one column of 0 and 1 for each of them.
        """
        labels = encode(self._keep(X, y, multi_output=True))
        self.classes_, self.multi_label_ = labels.classes, labels.several
        self.targets_ = labels.codes if labels.several else np.eye(len(labels.classes), dtype=np.float32)[labels.codes]
        return self

    def predict_proba(self, X: npt.ArrayLike) -> Array:
        """Return each label's share of the votes, of shape (q, c)."""
        return self._averages(X)

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return which labels get more than half of the votes, as 0 and 1 of shape (q, c)."""
        shares = self._averages(X)
        labels: Array = (shares > 0.5).astype(np.int64) if self.multi_label_ else self.classes_[shares.argmax(axis=1)]
        return labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


def _nearest_doubles(queries: Array, gallery: Array, k: int) -> tuple[Array, Array]:
    """Do as `nearest_rows`, in the precision of the rows."""
    scores = np.empty((len(queries), 0), dtype=queries.dtype)
    rows = np.empty((len(queries), 0), dtype=np.int64)
    for start in range(0, len(gallery), GALLERY_BLOCK):
        block = queries @ gallery[start : start + GALLERY_BLOCK].T
        best = _largest(block, k)
        scores = np.concatenate([scores, np.take_along_axis(block, best, axis=1)], axis=1)
        rows = np.concatenate([rows, best + start], axis=1)
        best = _largest(scores, k)
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _largest(values: Array, k: int) -> Array:
    """Return the columns of the k largest values of each row, or all columns when there are fewer."""
    columns = values.shape[1]
    k = min(k, columns)
    return np.argpartition(values, columns - k, axis=1)[:, columns - k :]
