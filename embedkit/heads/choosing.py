"""Choosing: heads by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.base import is_classifier, is_regressor

from embedkit.errors import EvaluationError
from embedkit.heads.linear import discriminant_analysis, linear_svm
from embedkit.heads.logistic import logistic_regression
from embedkit.heads.means import MeanHead
from embedkit.heads.mlp import MLPHead, MLPRegressor
from embedkit.heads.neighbours import LabelKNN, WeightedKNN, WeightedKNNRegressor
from embedkit.heads.ridge import RidgeHead, RidgeRegressor


def _logistic(C: float = 1.0, **parameters: Any) -> Any:
    return logistic_regression(C, **parameters)


_MAKERS: dict[str, dict[str, Callable[..., Any]]] = {
    "logistic": {"class": _logistic, "multi-label": _logistic},
    "ridge": {"class": RidgeHead, "multi-label": RidgeHead, "regression": RidgeRegressor},
    "svm": {"class": linear_svm},
    "lda": {"class": discriminant_analysis},
    "mean": {"class": MeanHead},
    "knn": {"class": WeightedKNN, "multi-label": LabelKNN, "regression": WeightedKNNRegressor},
    "mlp": {"class": MLPHead, "multi-label": MLPHead, "regression": MLPRegressor},
}
HEADS = tuple(_MAKERS)


def make_head(name: str, *, task: str = "class", **parameters: Any) -> Any:
    """Return an unfitted head by its name.

    Parameters
    ----------
    name : {"logistic", "ridge", "svm", "lda", "mean", "knn", "mlp"}
        One of `HEADS`.
    task : {"class", "multi-label", "regression"}, default "class"
        What it is to predict: one label a row, several (0 and 1 of shape (n, c)), or a number.
    **parameters
        Of the estimator: logistic C, ridge regularisation, svm C, lda shrinkage, knn k and temperature, mlp
        weight_decay, and more.

    Returns
    -------
    estimator
        With scikit-learn's `fit` and `predict`.

    Raises
    ------
    EvaluationError
        When there is no such head, it cannot do the task, or has no such parameter.

    Examples
    --------
    >>> from embedkit.heads import make_head
    >>> make_head("ridge", regularisation=10.0)
    RidgeHead(regularisation=10.0)
    """
    if name not in _MAKERS:
        raise EvaluationError(f"there is no head {name!r}; known: {', '.join(map(repr, HEADS))}")
    if task not in _MAKERS[name]:
        able = [other for other, makers in _MAKERS.items() if task in makers]
        if not able:
            raise EvaluationError(f"there is no task {task!r}; known: 'class', 'multi-label', 'regression'")
        raise EvaluationError(f"the head {name!r} does not do {task}; these do: {', '.join(able)}")
    try:
        return _MAKERS[name][task](**parameters)
    except TypeError as error:
        raise EvaluationError(f"the head {name!r} has other parameters: {error}") from error


def is_predictor(estimator: object) -> bool:
    """Return whether an object is a classifier or regressor with scikit-learn's methods, and not its class."""
    if isinstance(estimator, type) or not all(hasattr(estimator, name) for name in ("fit", "predict", "get_params")):
        return False
    try:
        return bool(is_classifier(estimator) or is_regressor(estimator))
    except AttributeError:  # Of a library that knows scikit-learn's methods and not its newer tags.
        return getattr(estimator, "_estimator_type", None) in ("classifier", "regressor")
