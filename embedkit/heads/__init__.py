"""Heads: classifiers over embeddings, and the only user of scikit-learn's estimators.

A head sees rows of numbers and labels. Stores, splits and scores belong to `embedkit.evaluation`.
"""

from __future__ import annotations

from embedkit.heads.choosing import HEADS, make_head
from embedkit.heads.least_squares import LeastSquares
from embedkit.heads.linear import discriminant_analysis, linear_svm
from embedkit.heads.logistic import LogisticHead, logistic_regression
from embedkit.heads.means import MeanHead
from embedkit.heads.mlp import MLPHead, MLPRegressor
from embedkit.heads.neighbours import LabelKNN, WeightedKNN, WeightedKNNRegressor
from embedkit.heads.penalties import C_GRID, fit_logistic, fit_quietly, sweep_logistic
from embedkit.heads.ridge import RidgeHead, RidgeRegressor, ridge_sweep, stream_ridge
from embedkit.heads.saving import SavedHead, load_head, save_head

__all__ = [
    "C_GRID", "HEADS", "LabelKNN", "LeastSquares", "LogisticHead", "MLPHead", "MLPRegressor", "MeanHead", "RidgeHead",
    "RidgeRegressor", "SavedHead", "WeightedKNN", "WeightedKNNRegressor", "discriminant_analysis", "fit_logistic",
    "fit_quietly", "linear_svm", "load_head", "logistic_regression", "make_head", "ridge_sweep", "save_head",
    "stream_ridge", "sweep_logistic",
]  # fmt: skip
