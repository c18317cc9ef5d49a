"""Kinds: the estimators that can be saved, with the shapes of what they learn."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        (c, or 1 for two classes), n of training rows, h of hidden units, 1 of one. None stands for a scalar.
    optional : mapping
        Those of them that may be missing, and the parameter that must be off for that.
    """

    module: str
    name: str
    fields: Mapping[str, str | None]
    optional: Mapping[str, str] = field(default_factory=dict)

    def type(self) -> Any:
        """Return the class."""
        return getattr(importlib.import_module(self.module), self.name)


def _kinds(module: str, **fields: Mapping[str, str | None]) -> dict[str, Kind]:
    return {name: Kind(module, name, kind) for name, kind in fields.items()}


_LINEAR: dict[str, str | None] = {"coef_": "kd", "intercept_": "k", "classes_": "c"}

_PERCEPTRON: dict[str, str | None] = {
    "mean_": "d",
    "scale_": "d",
    "hidden_coef_": "dh",
    "hidden_intercept_": "h",
}
_SCALED: dict[str, str | None] = {"mean_": "d", "var_": "d", "scale_": "d", "n_samples_seen_": None}
_NUMBERS: dict[str, str | None] = {"coef_": "d", "intercept_": None}

KINDS: dict[str, Kind] = {
    **_kinds("embedkit.heads.logistic", LogisticHead={**_LINEAR, "multi_label_": None}),
    **_kinds(
        "embedkit.heads.least_squares",
        LeastSquares={"mean_": "d", "scale_": "d", "coef_": "cd", "intercept_": "c", "classes_": "c"},
    ),
    **_kinds(
        "embedkit.heads.ridge",
        RidgeHead={**_LINEAR, "multi_label_": None},
        RidgeRegressor={"coef_": "d", "intercept_": ""},
    ),
    **_kinds(
        "embedkit.heads.neighbours",
        WeightedKNN={"embeddings_": "nd", "codes_": "n", "classes_": "c"},
        LabelKNN={"embeddings_": "nd", "targets_": "nc", "classes_": "c", "multi_label_": None},
        WeightedKNNRegressor={"embeddings_": "nd", "targets_": "n"},
    ),
    **_kinds("embedkit.heads.means", MeanHead={"sums_": "cd", "classes_": "c"}),
    **_kinds(
        "embedkit.heads.mlp",
        MLPHead={**_PERCEPTRON, "coef_": "hc", "intercept_": "c", "classes_": "c", "multi_label_": None},
        MLPRegressor={**_PERCEPTRON, "coef_": "h1", "intercept_": "1", "centre_": None, "spread_": None},
    ),
    "StandardScaler": Kind(
        "sklearn.preprocessing",
        "StandardScaler",
        _SCALED,
        {"mean_": "with_mean", "var_": "with_std", "scale_": "with_std"},
    ),
    **_kinds("sklearn.preprocessing", Normalizer={}),
    **_kinds(
        "sklearn.linear_model",
        LogisticRegression=_LINEAR,
        SGDClassifier=_LINEAR,
        Ridge=_NUMBERS,
        LinearRegression=_NUMBERS,
    ),
    **_kinds("sklearn.svm", LinearSVC=_LINEAR),
    **_kinds("sklearn.discriminant_analysis", LinearDiscriminantAnalysis=_LINEAR),
}
