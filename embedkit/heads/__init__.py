"""Heads: classifiers over embeddings, and the only user of scikit-learn's estimators.

A head sees rows of numbers and labels. Stores, splits and scores belong to `embedkit.evaluation`.
"""

from __future__ import annotations

from embedkit.heads.choosing import HEADS, make_head
from embedkit.heads.least_squares import LeastSquares
from embedkit.heads.logistic import LogisticHead, logistic_regression
from embedkit.heads.neighbours import WeightedKNN
from embedkit.heads.penalties import C_GRID, fit_logistic, fit_quietly, sweep_logistic
from embedkit.heads.plain import plain_logistic
from embedkit.heads.saving import SavedHead, load_head, save_head

__all__ = [
    "C_GRID",
    "HEADS",
    "LeastSquares",
    "LogisticHead",
    "SavedHead",
    "WeightedKNN",
    "fit_logistic",
    "fit_quietly",
    "load_head",
    "logistic_regression",
    "make_head",
    "plain_logistic",
    "save_head",
    "sweep_logistic",
]
