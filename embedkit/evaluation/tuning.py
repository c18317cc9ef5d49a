"""Tuning: a head's one number, chosen on held-out training rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.evaluation.metrics import average_precisions
from embedkit.evaluation.scoring import class_scores
from embedkit.evaluation.streaming import StoredRows, fit_streamed
from embedkit.evaluation.targets import Training
from embedkit.heads import fit_quietly, make_head, ridge_sweep
from embedkit.heads.folding import hold_out

Progress = Callable[[str], None]

# What is chosen for each head and from what, the most cautious first: it wins among equals. Heads that are not named
# have nothing to choose.
GRIDS: dict[str, tuple[str, tuple[float | int, ...]]] = {
    "ridge": ("regularisation", (1e6, 3e5, 1e5, 3e4, 1e4, 3e3, 1e3, 3e2, 1e2, 3e1, 1e1, 1.0, 1e-1)),
    "svm": ("C", (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)),
    "lda": ("shrinkage", (0.99, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01)),
    "knn": ("k", (200, 100, 50, 20, 10, 5, 1)),
    "mlp": ("weight_decay", (1e-2, 1e-3, 1e-4)),
}
# Each larger C of a support vector machine takes longer, the last one a hundred times as long as the first: after so
# many values in a row that are worse than the best, the others are left out.
PATIENCE = {"svm": 3}


def fit_tuned(
    name: str, rows: Training, *, fraction: float, seed: int, progress: Progress, device: str = "cpu"
) -> tuple[Any, dict[str, Any]]:
    """Fit a head by name, choosing its number in `GRIDS` on held-out training rows.

    Parameters
    ----------
    name : str
        One of `embedkit.heads.HEADS`.
    rows : Training
        What to fit to.
    fraction : float
        Share of the rows that is held out.
    seed : int
        Draws them, and whatever the head draws.
    progress : callable
        Called with one line of text for each value.
    device : str, default "cpu"
        Where to fit a perceptron.

    Returns
    -------
    estimator : estimator
        Fitted to all rows.
    choice : dict
        "chosen" ``{parameter: value}``, "losses" ``{value: loss on the held-out rows}``, "criterion",
        "held_out_rows"; "note" where there was nothing to choose by.
    """
    settings: dict[str, Any] = {"task": rows.task, "seed": seed, "device": device}
    if name not in GRIDS:
        head, converged = _fitted(name, {}, rows, settings)
        return head, {"chosen": {}, "converged": converged}
    parameter = GRIDS[name][0]
    held = hold_out(len(rows.x), fraction, seed, strata=rows.strata, groups=rows.groups)
    choice: dict[str, Any] = {"chosen": {}, "held_out_rows": int(held.sum()), "losses": {}}
    if held.any():
        for value, (loss, choice["criterion"]) in _losses(name, rows, held, settings):
            choice["losses"][value] = loss
            progress(
                f"{parameter} = {value:g}: {choice['criterion']} {loss:.4f} on {int(held.sum())} held-out training rows"
            )
        # min returns the first of equals.
        choice["chosen"] = {parameter: min(choice["losses"], key=choice["losses"].__getitem__)}
    else:
        choice["note"] = f"every class has one training row, so none could be held out to choose {parameter} by"
    progress(f"fitting to all {len(rows.x):,} training rows")
    head, choice["converged"] = _fitted(name, choice["chosen"], rows, settings)
    return head, choice


def _fitted(name: str, chosen: dict[str, float], rows: Training, settings: dict[str, Any]) -> tuple[Any, bool]:
    """Return a head that is fitted to all rows, and whether its solver converged."""
    if isinstance(rows.x, StoredRows):
        return fit_streamed(name, rows.x, rows.y, chosen), True
    head = _made(name, chosen, **settings)
    return head, _fit(name, head, rows)


def _fit(name: str, head: Any, rows: Training) -> bool:
    """Fit a head and return whether its solver converged, or say what it does not take."""
    try:
        return fit_quietly(head, rows.x, rows.y)
    except EvaluationError:
        raise
    except ValueError as error:
        raise EvaluationError(
            f"the head {name!r} cannot be fitted to {len(rows.x):,} rows: {error} Give it more rows, or take another "
            "head, such as 'ridge'"
        ) from error


def _losses(
    name: str, rows: Training, held: npt.NDArray[np.bool_], settings: dict[str, Any]
) -> Iterator[tuple[float, tuple[float, str]]]:
    """Yield values of a head's grid, and how wrong the head with it is about the held-out rows."""
    parameter, grid = GRIDS[name]
    kept, queries = rows.take(~held), rows.take(held)
    if name == "ridge":  # All of them from one eigendecomposition.
        for value, answers in ridge_sweep(rows.x, rows.y, held, grid, task=rows.task).items():
            yield value, answer_loss(answers, queries)
        return
    best, worse = math.inf, 0
    for value in grid:
        head = _made(name, {parameter: value}, **settings)
        _fit(name, head, kept)
        loss, criterion = held_out_loss(head, queries, likely=name != "knn")
        yield value, (loss, criterion)
        best, worse = min(best, loss), worse + 1 if loss > best else 0
        if worse == PATIENCE.get(name):
            return


def _made(name: str, parameters: dict[str, float], *, task: str, seed: int, device: str) -> Any:
    head = make_head(name, task=task, **parameters)
    if "random_state" in head.get_params():
        head.set_params(random_state=seed)
    if "device" in head.get_params():
        head.set_params(device=device)
    return head


def fresh(estimator: Any) -> Any:
    """Return an estimator like this one, so that fitting it leaves this one as it is."""
    return copy.deepcopy(estimator)


def held_out_loss(estimator: Any, rows: Training, *, likely: bool = True) -> tuple[float, str]:
    """Return how wrong a fitted head is about rows that it did not see, and by what measure.

    Log-loss where the head gives probabilities: accuracy on a few hundred rows moves in steps of chance. `likely` says
    whether they deserve the name: the votes of few neighbours are often all for one class.
    """
    if rows.task == "multi-label":
        scores, _ = class_scores(estimator, rows.x)
        return answer_loss(estimator.predict(rows.x) if scores is None else scores, rows)
    if rows.task == "regression" or not likely or not hasattr(estimator, "predict_proba"):
        return answer_loss(estimator.predict(rows.x), rows)
    classes = estimator.classes_
    codes = np.minimum(np.searchsorted(classes, rows.y), len(classes) - 1)
    likelihoods = estimator.predict_proba(rows.x)[np.arange(len(rows.x)), codes].astype(np.float64)
    likelihoods[classes[codes] != rows.y] = 0  # Of a class that the fitted rows lack.
    return float(-np.log(np.maximum(likelihoods, np.finfo(np.float32).tiny)).mean()), "log-loss"


def answer_loss(answers: npt.NDArray[Any], rows: Training) -> tuple[float, str]:
    """Return how wrong answers are, and by what measure: names of classes, scores of several labels, or numbers."""
    if rows.task == "regression":
        return float(np.mean(np.square(np.asarray(answers).reshape(-1) - rows.y))), "squared error"
    if rows.task == "multi-label":
        precisions = average_precisions(rows.y, answers)
        return float(1 - np.nanmean(precisions)) if np.isfinite(precisions).any() else 1.0, "1 - mAP"
    return float(np.mean(answers != rows.y)), "error"
