"""Metrics over class codes: accuracy, its bootstrap interval, accuracy by class, confusion."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]


def bootstrap_interval(
    correct: npt.ArrayLike, *, seed: int = 0, level: float = 0.95, resamples: int = 10_000
) -> list[float]:
    """Return the percentile bootstrap interval of an accuracy.

    It tells how far the accuracy would move with another draw of as many test rows. It does not cover another draw of
    training rows, and it has no width where every row is right or every row is wrong.

    Parameters
    ----------
    correct : array of bool of shape (n,)
        Whether each test row was classified correctly; at least one row.
    seed : int, default 0
        Draws the resamples.
    level : float, default 0.95
        Share of the resamples that the interval covers.
    resamples : int, default 10,000
        Number of resamples. Each is a single draw, so many cost little and the bounds hardly depend on the seed.

    Returns
    -------
    list of float
        The lower and the upper bound, fractions in [0, 1].

    Notes
    -----
    Efron and Tibshirani, "An introduction to the bootstrap", 1993, section 13.3.

    Examples
    --------
    >>> from embedkit.evaluation.metrics import bootstrap_interval
    >>> bootstrap_interval([True, True, True])
    [1.0, 1.0]
    >>> low, high = bootstrap_interval([True] * 90 + [False] * 10)
    >>> 0.82 <= low <= 0.86 and 0.94 <= high <= 0.97
    True
    """
    right = np.asarray(correct, dtype=np.bool_)
    n = len(right)
    # A resample draws n rows with replacement, each of them right with probability right.sum() / n, independently. The
    # number of right rows in it is therefore binomial: this is the bootstrap itself, without drawing any rows.
    draws = np.random.default_rng(seed).binomial(n, right.sum() / n, size=resamples) / n
    tail = (1 - level) / 2
    return [float(bound) for bound in np.quantile(draws, [tail, 1 - tail])]


def class_accuracies(true: Codes, predicted: Codes, c: int) -> list[float | None]:
    """Return the accuracy within each class.

    Parameters
    ----------
    true, predicted : array of int of shape (n,)
        Class codes below `c`.
    c : int
        Number of classes.

    Returns
    -------
    list of float or None of length c
        The share of each class's rows that were classified correctly; None for a class without rows.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.metrics import class_accuracies
    >>> class_accuracies(np.array([0, 0, 1]), np.array([0, 1, 1]), 3)
    [0.5, 1.0, None]
    """
    rows = np.bincount(true, minlength=c).tolist()
    right = np.bincount(true[true == predicted], minlength=c).tolist()
    return [hits / count if count else None for hits, count in zip(right, rows, strict=True)]


def confusion_matrix(true: Codes, predicted: Codes, c: int) -> npt.NDArray[Any]:
    """Return how often each class was taken for each other.

    Parameters
    ----------
    true, predicted : array of int of shape (n,)
        Class codes below `c`.
    c : int
        Number of classes.

    Returns
    -------
    array of int of shape (c, c)
        Entry (i, j) counts the rows of class i that were classified as j.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.metrics import confusion_matrix
    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    return np.bincount(true * c + predicted, minlength=c * c).reshape(c, c)
