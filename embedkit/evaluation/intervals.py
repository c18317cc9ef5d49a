"""Intervals: how far a number would move with other test rows or another draw of training rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

# Statistic of rows that count several times: weights of shape (r, n) to values of shape (r,).
Weighted = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]

_CELLS = 4_000_000  # Of a block of weights: 32 MB.


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
    >>> from embedkit.evaluation.intervals import bootstrap_interval
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
    return _percentiles(draws, level)


def resampled_interval(
    statistic: Weighted, n: int, *, seed: int = 0, level: float = 0.95, resamples: int = 1000
) -> list[float]:
    """Return the percentile bootstrap interval of any statistic of n test rows.

    Parameters
    ----------
    statistic : callable
        Takes weights of shape (r, n), how often each row counts in each of r resamples, and returns r values. Values
        that are not a number, such as those of a resample without any row of a class, are left out.
    n : int
        Number of test rows.
    seed, level, resamples
        As in `bootstrap_interval`.

    Returns
    -------
    list of float
        The lower and the upper bound.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.intervals import resampled_interval
    >>> values = np.arange(100.0)
    >>> low, high = resampled_interval(lambda weights: weights @ values / 100, 100)
    >>> 42 < low < 46 and 53 < high < 57
    True
    """
    draws = resampled(statistic, n, seed=seed, resamples=resamples)
    finite = draws[np.isfinite(draws)]
    return _percentiles(finite, level) if len(finite) else [float("nan")] * 2


def resampled(statistic: Weighted, n: int, *, seed: int, resamples: int) -> npt.NDArray[np.float64]:
    """Return a statistic of each of the resamples of n rows, as an array of shape (resamples,)."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _CELLS // n)
    blocks = []
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        blocks.append(statistic(generator.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)))
    return np.concatenate(blocks)


def t_interval(values: Sequence[float] | npt.NDArray[Any], *, level: float = 0.95) -> list[float]:
    """Return Student's interval of the mean of a few runs, such as one for each seed.

    Parameters
    ----------
    values : sequence of float
        One score a run; at least two.
    level : float, default 0.95
        How often such an interval holds the true mean.

    Returns
    -------
    list of float
        The lower and the upper bound.

    Notes
    -----
    The mean plus and minus t times s / sqrt(r), with s the standard deviation of the r runs and t the quantile of
    Student's distribution of r - 1 degrees of freedom. The runs share their test rows, so the interval covers the
    draw of the training rows and not that of the test rows.

    Examples
    --------
    >>> from embedkit.evaluation.intervals import t_interval
    >>> [round(bound, 3) for bound in t_interval([0.70, 0.72, 0.74])]
    [0.67, 0.77]
    """
    runs = np.asarray(values, dtype=np.float64)
    half = stdtrit(len(runs) - 1, (1 + level) / 2) * runs.std(ddof=1) / np.sqrt(len(runs))
    return [float(runs.mean() - half), float(runs.mean() + half)]


def _percentiles(draws: npt.NDArray[np.float64], level: float) -> list[float]:
    tail = (1 - level) / 2
    return [float(bound) for bound in np.quantile(draws, [tail, 1 - tail])]
