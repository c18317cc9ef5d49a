"""Metrics: how well predictions agree with what is true, of classes, of several labels an image, and of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]


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


def rank_of_true(scores: Floats, true: Codes) -> npt.NDArray[np.int64]:
    """Return how many classes score higher than the true one, for each row.

    A row counts for top-k where this is below k. Equal scores are settled in favour of the lower class code, as
    `numpy.argmax` settles them.

    Parameters
    ----------
    scores : array of shape (n, c)
        Any score that is larger for what is more likely.
    true : array of int of shape (n,)
        Class codes; -1 for a class that `scores` has no column for.

    Returns
    -------
    array of int of shape (n,)
        0 for a row that top-1 counts as correct, c for one of a class without a column.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.metrics import rank_of_true
    >>> rank_of_true(np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]), np.array([2, 1])).tolist()
    [1, 1]
    """
    own = np.take_along_axis(scores, np.maximum(true, 0)[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < true[:, None]
    ranks: npt.NDArray[np.int64] = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    return np.where(true < 0, scores.shape[1], ranks)


def calibration_error(confidence: Floats, correct: npt.NDArray[np.bool_], *, bins: int = 15) -> float:
    """Return the expected calibration error: how far stated probabilities lie from the accuracy they come with.

    Parameters
    ----------
    confidence : array of shape (n,)
        Probability that the head gave to what it predicted, in [0, 1].
    correct : array of bool of shape (n,)
        Whether it was right.
    bins : int, default 15
        Number of bins of equal width.

    Returns
    -------
    float
        The mean over the rows of the distance between a bin's mean confidence and its accuracy.

    Notes
    -----
    Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3, with its 15 bins.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.metrics import calibration_error
    >>> round(calibration_error(np.array([0.9, 0.9, 0.9, 0.9]), np.array([True, True, True, False])), 3)
    0.15
    """
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=confidence.astype(np.float64) - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def average_precisions(true: npt.NDArray[Any], scores: Floats) -> npt.NDArray[np.float64]:
    """Return the average precision of each class, for images of several labels.

    Parameters
    ----------
    true : array of 0 and 1 of shape (n, c)
        Which labels each row has.
    scores : array of shape (n, c)
        Any score that is larger for what is more likely.

    Returns
    -------
    array of shape (c,)
        Fractions in [0, 1]; not a number for a class that no row has. Their mean over the others is mAP.

    Notes
    -----
    The sum over the thresholds of precision times the step in recall, as scikit-learn computes it: equal scores are
    one threshold, and nothing is interpolated (PASCAL VOC's older 11-point rule gives other numbers).

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.metrics import average_precisions
    >>> average_precisions(np.array([[1, 0], [0, 0], [1, 0]]), np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.3]])).round(3)
    array([0.833,   nan])
    """
    once = np.ones((1, len(true)))
    columns = range(true.shape[1])
    return np.array([weighted_average_precision(true[:, one], scores[:, one], once)[0] for one in columns])


def weighted_average_precision(
    true: npt.NDArray[Any], scores: Floats, weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the average precision of one class in resamples where rows count several times.

    Parameters
    ----------
    true, scores : array of shape (n,)
        As one column of those of `average_precisions`.
    weights : array of shape (r, n)
        How often each row counts, in each of r resamples.

    Returns
    -------
    array of shape (r,)
        Not a number where no row that counts has the label.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last_of_equals = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    weights = weights[:, order]
    hits = (weights * (true[order] > 0)).cumsum(axis=1)[:, last_of_equals]
    precision = hits / np.maximum(weights.cumsum(axis=1)[:, last_of_equals], 1e-300)
    steps = np.diff(hits, axis=1, prepend=0)
    total = hits[:, -1]
    sums = (steps * precision).sum(axis=1)
    values = np.full(len(sums), np.nan)
    np.divide(sums, total, out=values, where=total > 0)
    return values


def r2(true: Floats, predicted: Floats, weights: npt.NDArray[np.float64] | None = None) -> Any:
    """Return the coefficient of determination: 1 is perfect, 0 no better than the mean of the test rows.

    Parameters
    ----------
    true, predicted : array of shape (n,)
        Targets in any unit.
    weights : array of shape (r, n), optional
        How often each row counts in each of r resamples.

    Returns
    -------
    float, or array of shape (r,) with `weights`
        Not a number where all targets are equal.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.metrics import r2
    >>> r2(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0]))
    0.5
    """
    counts = np.ones((1, len(true))) if weights is None else weights
    mean = counts @ true / counts.sum(axis=1)
    residual = counts @ np.square(true - predicted)
    spread = (counts * np.square(true - mean[:, None])).sum(axis=1)
    values = np.full(len(spread), np.nan)
    np.divide(spread - residual, spread, out=values, where=spread > 0)
    return float(values[0]) if weights is None else values


def mean_absolute_error(true: Floats, predicted: Floats) -> float:
    """Return the mean distance of predictions from targets, in the targets' unit.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.metrics import mean_absolute_error
    >>> mean_absolute_error(np.array([1.0, 2.0]), np.array([1.5, 2.0]))
    0.25
    """
    return float(np.abs(true - predicted).mean())
