"""LeastSquares: ridge regression onto -1 and 1, as big_vision's few-shot probe has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from embedkit.errors import EvaluationError

Array = npt.NDArray[Any]


class LeastSquares(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Regularised least squares onto 1 for a row's class and -1 for the others.

    Rows are standardised by ``(x - mean) / (std + 1e-5)``. The bias is the weight of a constant column that is large,
    so that the penalty hardly touches it. Of n rows and d dimensions, the smaller one of n and d decides the size of
    the equations.

    Parameters
    ----------
    regularisation : float, default 1024.0
        The L2 penalty, above 0; big_vision's is 2^10.
    bias : float, default 100.0
        The constant column.

    Attributes
    ----------
    classes_ : array of shape (c,)
        The labels seen in `fit`, sorted.
    mean_, scale_ : array of shape (d,)
        What standardises rows.
    coef_ : array of shape (c, d)
        Weights of standardised rows.
    intercept_ : array of shape (c,)
        The bias.

    Notes
    -----
    The formula is that of google-research/big_vision, ``evaluators/fewshot_lsr.py``: with x the standardised rows and
    the constant column, w = (x'x + l2)^-1 x'y, which equals x'(xx' + l2)^-1 y. The equations are solved in float64.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.heads import LeastSquares
    >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> head = LeastSquares(regularisation=1.0).fit(x, ["cat", "cat", "dog"])
    >>> head.predict(np.array([[2.0, 0.1], [0.0, 3.0]])).tolist()
    ['cat', 'dog']
    """

    def __init__(self, regularisation: float = 1024.0, bias: float = 100.0) -> None:
        self.regularisation = regularisation
        self.bias = bias

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> LeastSquares:
        """Solve the equations.

        Parameters
        ----------
        X : array of shape (n, d)
            Embeddings.
        y : array of shape (n,)
            Labels, numbers or names.

        Returns
        -------
        LeastSquares
            This head.

        Raises
        ------
        EvaluationError
            When `regularisation` is not above 0.
        ValueError
            When `X` is not a finite matrix, or `y` does not hold labels of at least two classes.
        """
        if not self.regularisation > 0:
            raise EvaluationError(f"regularisation must be above 0; got {self.regularisation!r}")
        rows, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"Classifier can't train when only one class is present: {self.classes_[0]!r}")
        self.mean_, self.scale_ = rows.mean(axis=0), rows.std(axis=0) + np.asarray(1e-5, dtype=rows.dtype)
        x = np.empty((len(rows), rows.shape[1] + 1))
        x[:, :-1] = (rows - self.mean_) / self.scale_
        x[:, -1] = self.bias
        y = np.full((len(rows), len(self.classes_)), -1.0)
        y[np.arange(len(rows)), codes] = 1
        if x.shape[0] >= x.shape[1]:
            weights = np.linalg.solve(x.T @ x + self.regularisation * np.eye(x.shape[1]), x.T @ y)
        else:
            weights = x.T @ np.linalg.solve(x @ x.T + self.regularisation * np.eye(len(x)), y)
        self.coef_: Array = weights[:-1].T.astype(rows.dtype)
        self.intercept_: Array = (self.bias * weights[-1]).astype(rows.dtype)
        return self

    def decision_function(self, X: npt.ArrayLike) -> Array:
        """Return how near to 1 each class comes, of shape (q, c); of two classes the second's, of shape (q,)."""
        check_is_fitted(self)
        queries = validate_data(self, X, dtype=self.coef_.dtype, reset=False)
        scores: Array = ((queries - self.mean_) / self.scale_) @ self.coef_.T + self.intercept_
        return scores[:, 1] if len(self.classes_) == 2 else scores

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the class of the highest score for each row, as an array of shape (q,)."""
        scores = self.decision_function(X)
        labels: Array = self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]
        return labels
