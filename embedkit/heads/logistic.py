"""Logistic regression on standardised embeddings, its penalty chosen on held-out rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from embedkit.errors import EvaluationError

Array = npt.NDArray[Any]

# The best C of standardised embeddings lies between 1e-3 and 1e-1 for most data sets; small and few-shot ones need
# the upper decades, large ones the lowest.
C_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)


def logistic_regression(
    C: float, *, max_iter: int = 1000, standardise: bool = True, tol: float = 1e-4, warm_start: bool = False
) -> Pipeline:
    """Return an unfitted linear head: standardisation, then logistic regression.

    Parameters
    ----------
    C : float
        Inverse strength of the L2 penalty, in scikit-learn's convention (it weighs the sum of the losses).
    max_iter : int, default 1000
        Limit on the L-BFGS iterations; scikit-learn's 100 is too few for weak penalties.
    standardise : bool, default True
        Whether the regression sees standardised embeddings, or those that are given.
    tol : float, default 1e-4
        Largest entry of the gradient at which it stops.
    warm_start : bool, default False
        Whether a further `fit` of the regression starts from the previous solution.

    Returns
    -------
    Pipeline
        With the steps "scaler" and "regression". The scaler keeps float32 as it is.

    Examples
    --------
    >>> from embedkit.heads import logistic_regression
    >>> head = logistic_regression(0.1).fit([[0.0], [1.0], [2.0], [3.0]], ["low", "low", "high", "high"])
    >>> head.predict([[0.2], [2.8]]).tolist()
    ['low', 'high']
    """
    regression = LogisticRegression(C=C, solver="lbfgs", max_iter=max_iter, tol=tol, warm_start=warm_start)
    return Pipeline([("scaler", StandardScaler())] * standardise + [("regression", regression)])


def fit_logistic(
    x: Array,
    y: npt.ArrayLike,
    *,
    seed: int = 0,
    fraction: float = 0.2,
    held_out: npt.NDArray[np.bool_] | None = None,
    C_grid: Sequence[float] = C_GRID,
    criterion: str = "log-loss",
    standardise: bool = True,
    max_iter: int = 1000,
    tol: float = 1e-4,
    progress: Callable[[str], None] | None = None,
) -> tuple[Pipeline, dict[str, Any]]:
    """Fit a linear head, choosing the strength of its penalty on held-out training rows.

    A stratified `fraction` of the rows is held out. The scaler and one regression for each C are fitted to the
    others; the C of the lowest log-loss on the held-out rows wins, the smaller one of equals. The head is then fitted
    anew to all rows. Log-loss rather than accuracy, because accuracy on a few hundred rows moves in steps of chance:
    over 20 held-out parts of one training set it chose C anywhere within 2.5 decades, log-loss the same C 19 times.

    Parameters
    ----------
    x : array of shape (n, d)
        Training embeddings, without missing values.
    y : array of shape (n,)
        Their labels, numbers or names.
    seed : int, default 0
        Draws the held-out rows.
    fraction : float, default 0.2
        Share of each class that is held out, but at least one row of each class with two or more. Classes of one row
        stay in the fitted part.
    held_out : array of bool of shape (n,), optional
        The rows to hold out, in place of a drawn share of them.
    C_grid : sequence of float, default ``(1e-4, 3e-4, 1e-3, ..., 100)``
        The values of C to try. The default spans what few-shot and million-image training sets ask for.
    criterion : str, default "log-loss"
        What is compared: "log-loss" or "accuracy".
    standardise, max_iter, tol
        Of every fit, as in `logistic_regression`.
    progress : callable, optional
        Called with one line of text for each C.

    Returns
    -------
    head : Pipeline
        As `logistic_regression` makes it, fitted to all rows.
    choice : dict
        "C": the chosen value; "C_losses": ``{C: log-loss on the held-out rows}``; "held_out_rows": their number;
        "converged": whether the final fit did, within its limit of iterations; "C_not_converged": the values of C
        whose tuning fit did not. Where every class has one row there is nothing to choose by: C is 1, "C_losses" is
        empty, and "note" says so.

    Raises
    ------
    EvaluationError
        When there are fewer than two classes, `fraction` is not between 0 and 1, or `C_grid` is empty or has values
        that are not above 0.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.heads import fit_logistic
    >>> x = np.array([[0.0], [0.1], [0.2], [1.0], [1.1], [1.2]])
    >>> head, choice = fit_logistic(x, ["a", "a", "a", "b", "b", "b"], C_grid=(0.1, 1.0))
    >>> choice["C"], sorted(choice["C_losses"])
    (1.0, [0.1, 1.0])
    """
    x, labels = np.asarray(x), np.asarray(y)
    grid = sorted({float(C) for C in C_grid})
    if not 0 < fraction < 1 or not grid or not grid[0] > 0:
        raise EvaluationError(
            f"fraction must lie between 0 and 1 and C_grid hold values above 0; got {fraction!r} and {tuple(C_grid)!r}"
        )
    if len(np.unique(labels)) < 2:
        raise EvaluationError("a classifier needs training rows of at least two classes")
    if held_out is None:
        held_out = _held_out(labels, fraction, seed)
    named = "C_losses" if criterion == "log-loss" else "C_scores"
    settings: dict[str, Any] = {"max_iter": max_iter, "standardise": standardise, "tol": tol}
    choice: dict[str, Any] = {"C": 1.0, named: {}, "held_out_rows": int(held_out.sum()), "C_not_converged": []}
    if held_out.any():
        values, choice["C_not_converged"] = sweep_logistic(
            x, labels, held_out, grid, criterion=criterion, progress=progress, **settings
        )
        sign = 1 if criterion == "log-loss" else -1
        choice.update({"C": min(grid, key=lambda C: sign * values[C]), named: values})
    else:
        choice["note"] = "every class has one training row, so none could be held out to choose C by; C is 1"
    head = logistic_regression(choice["C"], **settings)
    choice["converged"] = fit_quietly(head, x, labels)
    return head, choice


def _held_out(labels: Array, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows to hold out: of each class its share, at least one row, never all of them."""
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shares = np.minimum(np.maximum(np.rint(fraction * counts), 1), counts - 1)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(codes[shuffled], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    mask = np.zeros(len(labels), dtype=np.bool_)
    mask[by_class] = rank < np.repeat(shares, counts)
    return mask


def sweep_logistic(
    x: Array,
    y: npt.ArrayLike,
    held_out: npt.NDArray[np.bool_],
    C_grid: Sequence[float],
    *,
    standardise: bool = True,
    criterion: str = "log-loss",
    max_iter: int = 1000,
    tol: float = 1e-4,
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[float, float], list[float]]:
    """Return the held-out log-loss or accuracy of every C of an ascending grid, and the C that did not converge."""
    head = logistic_regression(C_grid[0], max_iter=max_iter, standardise=standardise, tol=tol, warm_start=True)
    labels, regression = np.asarray(y), head["regression"]
    rows, queries = x[~held_out], x[held_out]
    if standardise:
        rows, queries = head["scaler"].fit_transform(rows), head["scaler"].transform(queries)
    found: dict[float, float] = {}
    unconverged = []
    # Ascending, because the solution for a strong penalty is a good start for the next weaker one.
    for C in C_grid:
        regression.set_params(C=C)
        if not fit_quietly(regression, rows, labels[~held_out]):
            unconverged.append(C)
        found[C] = _held_out_value(regression, queries, labels[held_out], criterion)
        if progress is not None:
            progress(f"C = {C:g}: {criterion} {found[C]:.4f} on {len(queries)} held-out training rows")
    return found, unconverged


def _held_out_value(regression: LogisticRegression, queries: Array, labels: Array, criterion: str) -> float:
    likelihoods, classes = regression.predict_proba(queries), regression.classes_
    codes = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    known = classes[codes] == labels
    if criterion == "accuracy":
        return float(np.mean(known & (likelihoods.argmax(axis=1) == codes)))
    own = np.where(known, likelihoods[np.arange(len(queries)), codes], 0).astype(np.float64)
    # A row that a float32 probability of zero condemns counts as the least that float32 can tell from zero.
    return float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean())


def fit_quietly(estimator: Any, x: Array, y: npt.ArrayLike) -> bool:
    """Fit, and return whether the solver converged instead of warning about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        estimator.fit(x, y)
    others = [warning for warning in caught if not issubclass(warning.category, ConvergenceWarning)]
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return len(others) == len(caught)
