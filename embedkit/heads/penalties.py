"""Penalties of logistic regression, compared on held-out rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline

from embedkit.errors import EvaluationError
from embedkit.heads.folding import hold_out
from embedkit.heads.logistic import logistic_regression
from embedkit.heads.path import HeldOut, Path, Start

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Progress = Callable[[str], None]

# The best C of standardised embeddings lies between 1e-3 and 1e-1 for most data sets; small and few-shot ones need
# the upper decades, large ones the lowest.
C_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)
# The loss has one valley along C: after so many values in a row that are worse than the best, larger ones are left out.
PATIENCE = 3


def fit_logistic(
    x: Array,
    y: npt.ArrayLike,
    *,
    seed: int = 0,
    fraction: float = 0.2,
    held_out: Mask | None = None,
    C_grid: Sequence[float] = C_GRID,
    criterion: str = "log-loss",
    standardise: bool = True,
    max_iter: int = 1000,
    tol: float = 1e-4,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Pipeline, dict[str, Any]]:
    """Fit a linear head, choosing the strength of its penalty on held-out training rows.

    A stratified `fraction` of the rows is held out. The scaler and one regression for each C are fitted to the
    others; the C of the lowest log-loss on the held-out rows wins, the smaller one of equals. The head is then fitted
    anew to all rows. Log-loss rather than accuracy, because accuracy on a few hundred rows moves in steps of chance:
    over 20 held-out parts of one training set it chose C anywhere within 2.5 decades, log-loss the same C 19 times.
    The log-loss has one valley along C: after three values in a row that are worse than the best, larger ones are left
    out. By accuracy all are tried.

    Parameters
    ----------
    x : array of shape (n, d)
        Training embeddings, without missing values.
    y : array of shape (n,) or (n, c)
        Their labels, numbers or names; or 0 and 1 for several labels a row.
    seed : int, default 0
        Draws the held-out rows.
    fraction : float, default 0.2
        Share of each class that is held out, but at least one row of each class with two or more. Classes of one row
        stay in the fitted part. With several labels a row, the share of all rows.
    held_out : array of bool of shape (n,), optional
        The rows to hold out, instead of `seed` and `fraction`.
    C_grid : sequence of float, default ``(1e-4, 3e-4, 1e-3, ..., 100)``
        The values of C to try. The default spans what few-shot and million-image training sets ask for.
    criterion : {"log-loss", "accuracy"}, default "log-loss"
        What decides.
    standardise : bool, default True
        Whether rows are scaled to mean 0 and variance 1 first.
    max_iter, tol, device
        Of every fit, as in `LogisticHead`.
    progress : callable, optional
        Called with one line of text for each C.

    Returns
    -------
    head : Pipeline
        As `logistic_regression` makes it, fitted to all rows.
    choice : dict
        "C": the chosen value; "C_losses": ``{C: log-loss on the held-out rows}``, or "C_scores" with the accuracies;
        "C_not_tried": the values that were left out; "held_out_rows": the number of those rows; "converged": whether
        the final fit did, within its limit of iterations; "C_not_converged": the values of C whose tuning fit did not.
        Where nothing could be held out C is 1 (or the
        only one of the grid), "C_losses" is empty, and "note" says so.

    Raises
    ------
    EvaluationError
        When there are fewer than two classes, `fraction` is not between 0 and 1, or `C_grid` is empty or has values
        that are not above 0.

    Notes
    -----
    One after the other, each C starts from the solution of the one before it and from what that solution taught
    L-BFGS about the curvature, in coordinates in which the curvature is nearly even. Memory: the rows as given, and
    one float32 copy of them. Where the rows can be separated, the gradient falls below any `tol` while the weights
    still grow with C: as with scikit-learn, large values of C then share a solution.

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
    grid = _checked(C_grid, fraction)
    if held_out is None:
        strata = np.unique(labels, return_inverse=True)[1] if labels.ndim == 1 else None
        held_out = hold_out(len(labels), fraction, seed, strata=strata)
    name = "C_losses" if criterion == "log-loss" else "C_scores"
    C = grid[0] if len(grid) == 1 else 1.0
    choice: dict[str, Any] = {
        "C": C, name: {}, "held_out_rows": int(held_out.sum()), "C_not_converged": [], "C_not_tried": [],
    }  # fmt: skip
    start: Start | None = None
    if held_out.any():
        patience = PATIENCE if criterion == "log-loss" else len(grid)
        tuning = _Tuning(criterion, standardise, max_iter, tol, device, patience)
        values, unconverged, start = tuning.sweep(x, labels, held_out, grid, progress)
        choice.update({name: values, "C_not_converged": unconverged, "C": tuning.best(values)})
        choice["C_not_tried"] = grid[len(values) :]
    else:
        alone = labels.ndim == 1 and len(np.unique(labels)) == len(labels)
        reason = "every class has one training row, so none could be" if alone else "no training row was"
        choice["note"] = f"{reason} held out to choose C by; C is {C:g}"
    head = logistic_regression(choice["C"], max_iter=max_iter, standardise=standardise, tol=tol, device=device)
    _fit_all(head, x, labels, start)
    choice["converged"] = head["regression"].converged_
    return head, choice


def sweep_logistic(
    x: Array,
    y: npt.ArrayLike,
    held_out: Mask,
    C_grid: Sequence[float],
    *,
    standardise: bool = True,
    criterion: str = "log-loss",
    max_iter: int = 1000,
    tol: float = 1e-4,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[dict[float, float], list[float]]:
    """Fit logistic regression for every C of a grid to some rows, and judge it by the others.

    Parameters
    ----------
    x, y
        As in `fit_logistic`.
    held_out : array of bool of shape (n,)
        The rows to judge by; the others are fitted to. A class that only they have counts as wrong.
    C_grid, standardise, criterion, max_iter, tol, device, progress
        As in `fit_logistic`.

    Returns
    -------
    values : dict
        ``{C: log-loss or accuracy on the held-out rows}``, ascending.
    unconverged : list of float
        The values of C whose fit did not converge.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.heads import sweep_logistic
    >>> x = np.array([[0.0], [0.1], [0.2], [1.0], [1.1], [1.2]])
    >>> held_out = np.array([True, False, False, True, False, False])
    >>> sweep_logistic(x, list("aaabbb"), held_out, (0.1, 1.0), criterion="accuracy")
    ({0.1: 1.0, 1.0: 1.0}, [])
    """
    tuning = _Tuning(criterion, standardise, max_iter, tol, device, len(C_grid))
    values, unconverged, _ = tuning.sweep(np.asarray(x), np.asarray(y), held_out, _checked(C_grid), progress)
    return values, unconverged


@dataclass(frozen=True)
class _Tuning:
    """How a grid is swept."""

    criterion: str
    standardise: bool
    max_iter: int
    tol: float
    device: str
    patience: int

    def sweep(
        self, x: Array, labels: Array, held_out: Mask, grid: Sequence[float], progress: Progress | None
    ) -> tuple[dict[float, float], list[float], Start]:
        """Return the criterion of C along an ascending grid, those that did not converge, and the best solution."""
        kept, rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        path = Path(x, labels, kept, standardise=self.standardise, device=self.device)
        judge = HeldOut(path, x, labels, rows, self.criterion)
        values: dict[float, float] = {}
        unconverged = []
        start, worse = path.state(), 0
        # Ascending, because the solution for a strong penalty is a good start for the next weaker one.
        for C in grid:
            if not path.step(C, max_iter=self.max_iter, tol=self.tol):
                unconverged.append(C)
            values[C] = judge.score()
            best = self.best(values)
            worse = worse + 1 if values[C] != values[best] else 0
            if best == C:
                start = path.state()
            if progress is not None:
                progress(f"C = {C:g}: {self.criterion} {values[C]:.4f} on {len(rows)} held-out training rows")
            if worse == self.patience:
                break
        return values, unconverged, start

    def best(self, values: dict[float, float]) -> float:
        """Return the best C, the smallest of equals."""
        sign = 1 if self.criterion == "log-loss" else -1
        return min(sorted(values), key=lambda C: sign * values[C])


def _fit_all(head: Pipeline, x: Array, labels: Array, start: Start | None) -> None:
    """Fit a pipeline to all rows without the copies that its steps would make."""
    regression = head["regression"]
    standardise = "scaler" in head.named_steps
    path = Path(x, labels, np.arange(len(x)), standardise=standardise, device=regression.device, start=start)
    path.step(regression.C, max_iter=regression.max_iter, tol=regression.tol)
    regression.adopt(path)
    if standardise:
        scaler, design = head["scaler"], path.design
        scaler.mean_, scaler.scale_, scaler.var_ = design.mean, design.scale, design.variance
        scaler.n_samples_seen_, scaler.n_features_in_ = len(x), x.shape[1]


def _checked(C_grid: Sequence[float], fraction: float = 0.5) -> list[float]:
    grid = sorted({float(C) for C in C_grid})
    if not 0 < fraction < 1 or not grid or not grid[0] > 0:
        raise EvaluationError(
            f"fraction must lie between 0 and 1 and C_grid hold values above 0; got {fraction!r} and {tuple(C_grid)!r}"
        )
    return grid


def fit_quietly(estimator: Any, x: Array, y: npt.ArrayLike) -> bool:
    """Fit an estimator, and return whether its solver converged instead of warning about it.

    Parameters
    ----------
    estimator : estimator
        Anything with `fit`.
    x, y : arrays
        What to fit it to.

    Returns
    -------
    bool
        False after a ConvergenceWarning. Other warnings pass, but for that of a covariance of one row.

    Examples
    --------
    >>> from embedkit.heads import fit_quietly, logistic_regression
    >>> fit_quietly(logistic_regression(1.0), [[0.0], [1.0]], ["low", "high"])
    True
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        # Of discriminant analysis, for each class of one row and each value that is tried; classes of few rows are
        # named before.
        warnings.filterwarnings("ignore", "Only one sample available", UserWarning)
        estimator.fit(x, y)
    others = [warning for warning in caught if not issubclass(warning.category, ConvergenceWarning)]
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return len(others) == len(caught)
