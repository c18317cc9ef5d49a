"""Logistic regression for one penalty."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model._base import LinearClassifierMixin
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted, validate_data

from embedkit.errors import EvaluationError
from embedkit.heads.path import Path

Array = npt.NDArray[Any]


class LogisticHead(LinearClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Logistic regression with an L2 penalty, as scikit-learn defines it, solved in float32.

    One class of several (a softmax), one of two, or several labels a row (a question of yes and no for each). Rows are
    never copied to float64 as a whole.

    Parameters
    ----------
    C : float, default 1.0
        Inverse strength of the penalty; it weighs the sum of the losses.
    max_iter : int, default 1000
        Limit on the L-BFGS steps.
    tol : float, default 1e-4
        The solver has converged when no entry of the gradient of the mean loss, penalty included, is above this, as
        in scikit-learn; by weights it is taken with the rows' mean removed.
    device : str, default "cpu"
        Where to compute, in torch's words.

    Attributes
    ----------
    classes_ : array of shape (c,)
        The labels seen in `fit`, sorted; column numbers with several labels a row.
    coef_ : array of shape (c, d), or (1, d) with two classes
        Weights.
    intercept_ : array of shape (c,) or (1,)
        The part that is not penalised.
    n_iter_ : int
        Steps that the solver took.
    gradient_norm_ : float
        What `tol` is compared with.
    converged_ : bool
        Whether it was small enough.

    Examples
    --------
    >>> from embedkit.heads import LogisticHead
    >>> head = LogisticHead().fit([[0.0], [1.0], [2.0], [3.0]], ["low", "low", "high", "high"])
    >>> head.predict([[0.2], [2.8]]).tolist()
    ['low', 'high']
    """

    def __init__(self, C: float = 1.0, max_iter: int = 1000, tol: float = 1e-4, device: str = "cpu") -> None:
        self.C = C
        self.max_iter = max_iter
        self.tol = tol
        self.device = device

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> LogisticHead:
        """Fit to rows of shape (n, d) and labels of shape (n,), or 0 and 1 of shape (n, c).

        Raises
        ------
        EvaluationError
            When there are fewer than two classes, `C` is not above 0, or the device is not there.
        ValueError
            When `X` is not a finite matrix or `y` does not fit it.
        """
        rows, labels = validate_data(self, X, y, dtype=[np.float32, np.float64], multi_output=True)
        if not self.C > 0:
            raise EvaluationError(f"C must be above 0; got {self.C!r}")
        path = Path(rows, labels, np.arange(len(rows)), standardise=False, device=self.device)
        path.step(self.C, max_iter=self.max_iter, tol=self.tol)
        self.adopt(path)
        if not self.converged_:
            warnings.warn(
                f"the gradient has an entry of {self.gradient_norm_:.1e} after {self.n_iter_} steps, above "
                f"{self.tol:.1e}: more max_iter, a smaller C, or standardised rows help",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def adopt(self, path: Path) -> None:
        """Take the solution of a path as what was fitted."""
        self.coef_, self.intercept_ = path.weights()
        self.classes_, self.multi_label_ = path.labels.classes, path.labels.several
        self.n_features_in_ = self.coef_.shape[1]
        self.n_iter_, self.gradient_norm_ = path.solution.iterations, path.solution.gradient
        self.converged_ = path.solution.converged

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the likeliest label of each row, or 0 and 1 of shape (q, c) for several labels a row."""
        if self._is_softmax() or len(self.intercept_) == 1:
            labels: Array = super().predict(X)
            return labels
        return np.asarray(self.decision_function(X) > 0).astype(np.int64)

    def predict_proba(self, X: npt.ArrayLike) -> Array:
        """Return the probability of each class or label, of shape (q, c)."""
        check_is_fitted(self)
        scores: Array = self.decision_function(X)
        if scores.ndim == 1:
            return np.stack([_sigmoid(-scores), _sigmoid(scores)], axis=1)
        if not self._is_softmax():
            return _sigmoid(scores)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        proportions: Array = shares / shares.sum(axis=1, keepdims=True)
        return proportions

    def _is_softmax(self) -> bool:
        check_is_fitted(self)
        return not self.multi_label_ and len(self.intercept_) > 1

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


def _sigmoid(scores: Array) -> Array:
    # Both branches are exact where they are chosen, and neither overflows.
    small = np.exp(-np.abs(scores))
    chances: Array = np.where(scores >= 0, 1, small) / (1 + small)
    return chances


def logistic_regression(
    C: float, *, max_iter: int = 1000, standardise: bool = True, tol: float = 1e-4, device: str = "cpu"
) -> Pipeline:
    """Return an unfitted linear head: standardisation, then logistic regression.

    Parameters
    ----------
    C : float
        Inverse strength of the L2 penalty, in scikit-learn's convention (it weighs the sum of the losses).
    max_iter, tol, device
        As in `LogisticHead`.
    standardise : bool, default True
        Whether rows are scaled to mean 0 and variance 1 first.

    Returns
    -------
    Pipeline
        With the steps "scaler" (unless told otherwise) and "regression". The scaler keeps float32 as it is.

    Examples
    --------
    >>> from embedkit.heads import logistic_regression
    >>> head = logistic_regression(0.1).fit([[0.0], [1.0], [2.0], [3.0]], ["low", "low", "high", "high"])
    >>> head.predict([[0.2], [2.8]]).tolist()
    ['low', 'high']
    """
    steps = [("scaler", StandardScaler())] if standardise else []
    return Pipeline([*steps, ("regression", LogisticHead(C=C, max_iter=max_iter, tol=tol, device=device))])
