"""Kinds: the estimators that can be saved, with the shapes of what they learn."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """An estimator that can be saved.

    Parameters
    ----------
    module, name : str
        Where its class is.
    fields : mapping
        What `fit` gives it, with a letter for each dimension: d of embeddings, c of classes, k of columns of weights
        (c, or 1 for two classes), n of training rows, h of hidden units, t of targets. None stands for a scalar.
    """

    module: str
    name: str
    fields: Mapping[str, str | None]

    def type(self) -> Any:
        """Return the class."""
        return getattr(importlib.import_module(self.module), self.name)


def _kinds(module: str, **fields: Mapping[str, str | None]) -> dict[str, Kind]:
    return {name: Kind(module, name, kind) for name, kind in fields.items()}


_LINEAR: dict[str, str | None] = {"coef_": "kd", "intercept_": "k", "classes_": "c"}

KINDS: dict[str, Kind] = {
    **_kinds("embedkit.heads.logistic", LogisticHead={**_LINEAR, "multi_label_": None}),
    **_kinds("embedkit.heads.least_squares", LeastSquares={
        "mean_": "d", "scale_": "d", "coef_": "cd", "intercept_": "c", "classes_": "c",
    }),
    **_kinds("embedkit.heads.neighbours", WeightedKNN={"embeddings_": "nd", "codes_": "n", "classes_": "c"}),
    **_kinds("sklearn.preprocessing", StandardScaler={"mean_": "d", "var_": "d", "scale_": "d", "n_samples_seen_": None},
             Normalizer={}, MinMaxScaler={"min_": "d", "scale_": "d", "data_min_": "d", "data_max_": "d"}),
    **_kinds("sklearn.linear_model", LogisticRegression=_LINEAR, RidgeClassifier={
        "coef_": "kd", "intercept_": "k", "classes_": "c",
    }, SGDClassifier=_LINEAR, Ridge={"coef_": "d", "intercept_": None}, LinearRegression={"coef_": "d", "intercept_": None}),
    **_kinds("sklearn.svm", LinearSVC=_LINEAR),
    **_kinds("sklearn.discriminant_analysis", LinearDiscriminantAnalysis=_LINEAR),
}  # fmt: skip
