"""Choosing: heads by name."""

from __future__ import annotations

from typing import Any

from embedkit.errors import EvaluationError
from embedkit.heads.logistic import logistic_regression
from embedkit.heads.neighbours import WeightedKNN

HEADS = ("logistic", "ridge", "svm", "lda", "mean", "knn", "mlp")


def make_head(name: str, *, task: str = "class", **parameters: Any) -> Any:
    """Return an unfitted head by its name in `HEADS`."""
    if name == "logistic":
        return logistic_regression(parameters.pop("C", 1.0), **parameters)
    if name == "knn":
        return WeightedKNN(**parameters)
    raise EvaluationError(f"there is no head {name!r}; known: {', '.join(map(repr, HEADS))}")
