import numpy as np
import pytest
from sklearn.utils.estimator_checks import check_estimator

from embedkit.errors import EvaluationError
from embedkit.heads import LeastSquares


def test_least_squares_behaves_as_scikit_learn_expects():
    check_estimator(LeastSquares(regularisation=1.0), on_skip=None)


def test_least_squares_keeps_float32():
    x, y = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32), np.arange(20) % 3
    head = LeastSquares().fit(x, y)
    assert head.coef_.dtype == head.decision_function(x).dtype == np.float32


def test_least_squares_refuses_a_penalty_that_is_none():
    with pytest.raises(EvaluationError, match="regularisation must be above 0; got 0"):
        LeastSquares(regularisation=0).fit(np.eye(4), [0, 1, 0, 1])
