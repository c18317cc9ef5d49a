"""Means: the class whose mean is nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import normalize
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from embedkit.errors import EvaluationError

Array = npt.NDArray[Any]
ROWS = 8192


class MeanHead(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Nearest class mean: rows at unit length, and the class whose mean is most similar by cosine.

    Nothing is chosen, and rows may stream by: `partial_fit` adds a block to the sums.

    Attributes
    ----------
    classes_ : array of shape (c,)
        The labels, sorted.
    sums_ : array of float64 of shape (c, d)
        Sum of each class's rows at unit length, which points where their mean does.

    Examples
    --------
    >>> from embedkit.heads import MeanHead
    >>> head = MeanHead().fit([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], ["cat", "cat", "dog"])
    >>> head.predict([[2.0, 0.1], [0.0, 3.0]]).tolist()
    ['cat', 'dog']
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> MeanHead:
        """Average the rows (n, d) of each class; labels are of shape (n,).

        Raises
        ------
        EvaluationError
            When there are fewer than two classes.
        ValueError
            When `X` is not a finite matrix or `y` does not fit it.
        """
        rows, labels = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(labels)
        return self._begin(np.unique(labels), rows)._add(rows, labels)

    def partial_fit(self, X: npt.ArrayLike, y: npt.ArrayLike, classes: npt.ArrayLike | None = None) -> MeanHead:
        """Add a block of rows; the first call needs all the labels that will come, as `classes`.

        Raises
        ------
        EvaluationError
            When `classes` is missing in the first call, or a label is not among them.
        """
        first = not hasattr(self, "classes_")
        rows, labels = validate_data(self, X, y, dtype=[np.float32, np.float64], reset=first)
        check_classification_targets(labels)
        if first:
            if classes is None:
                raise EvaluationError("the first call of partial_fit needs all classes")
            self._begin(np.unique(np.asarray(classes)), rows)
        return self._add(rows, labels)

    def _begin(self, classes: Array, rows: Array) -> MeanHead:
        if len(classes) < 2:
            raise EvaluationError("a classifier needs training rows of at least two classes, not of one class")
        self.classes_ = classes
        self.sums_ = np.zeros((len(classes), rows.shape[1]))
        return self

    def _add(self, rows: Array, labels: Array) -> MeanHead:
        codes = np.searchsorted(self.classes_, labels).clip(max=len(self.classes_) - 1)
        if (strange := self.classes_[codes] != labels).any():
            raise EvaluationError(f"the label {labels[strange].tolist()[0]!r} is not among the classes")
        for start in range(0, len(rows), ROWS):
            np.add.at(self.sums_, codes[start : start + ROWS], normalize(rows[start : start + ROWS]))
        return self

    def decision_function(self, X: npt.ArrayLike) -> Array:
        """Return cosine similarities to the means, of shape (q, c); with two classes their difference, (q,)."""
        check_is_fitted(self)
        queries = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        scores: Array = normalize(queries) @ normalize(self.sums_).astype(queries.dtype).T
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the label of the nearest mean for each row."""
        scores = self.decision_function(X)
        labels: Array = self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]
        return labels
