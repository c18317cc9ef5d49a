"""Outcomes: the three ways to fit and score by a protocol: once, with a few rows of each class, and by folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.evaluation.intervals import bootstrap_interval, t_interval
from embedkit.evaluation.protocols import Protocol
from embedkit.evaluation.scoring import Predictions, predict_rows, score_rows
from embedkit.evaluation.shots import draw_shots
from embedkit.evaluation.targets import Training, Truth, require_classes
from embedkit.heads.folding import assign_folds
from embedkit.text import say_nothing

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be measured.

    Parameters
    ----------
    protocol : Protocol
        How to fit.
    rows : Training
        What to fit to.
    labels : list of str
        With several labels a row, the names of the columns of ``rows.y``.
    truth : Truth
        What is true of the rows that are scored.
    seed : int
        Draws what is drawn.
    progress : callable
        Called with one line of text at each step.
    device : str, default "cpu"
        Where to fit.
    """

    protocol: Protocol
    rows: Training
    labels: list[str]
    truth: Truth
    seed: int
    progress: Progress
    device: str = "cpu"

    def fit(self, rows: Training, *, seed: int, progress: Progress) -> tuple[Any, dict[str, Any]]:
        """Fit the protocol's head to some rows."""
        return self.protocol.fit(rows, seed=seed, progress=progress, device=self.device)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was measured: metrics, what was chosen, predictions, and the fitted estimator."""

    metrics: dict[str, Any]
    choice: dict[str, Any]
    predictions: Predictions
    estimator: Any


def measure_once(job: Job, queries: npt.NDArray[Any]) -> Outcome:
    """Fit to all training rows and score the test rows, of embeddings of shape (q, d)."""
    estimator, choice = job.fit(job.rows, seed=job.seed, progress=job.progress)
    job.progress("scoring the test rows")
    jury = job.protocol.jury(estimator, job.rows, queries)
    found = predict_rows(jury.main, jury.questions, job.truth, job.labels)
    metrics = score_rows(found, job.truth, seed=job.seed)
    for name, companion in jury.beside.items():
        codes = np.searchsorted(np.array(job.truth.classes), companion.predict(jury.others))
        correct = codes == job.truth.values
        if name == "knn":
            found |= {"linear": found["predicted"], "knn": codes}
            metrics |= {
                "knn_top1": float(correct.mean()),
                "knn_top1_interval": bootstrap_interval(correct, seed=job.seed),
            }
        else:
            metrics.setdefault("by_k", {})[name] = float(correct.mean())
    if "by_k" in metrics:
        metrics["by_k"][str(job.protocol.settings()["k"])] = metrics["top1"]
        metrics["by_k"] = dict(sorted(metrics["by_k"].items(), key=lambda item: int(item[0])))
    return Outcome(metrics, choice, found, estimator)


def measure_folds(job: Job, folds: int) -> Outcome:
    """Score every training row by the head of the folds that it is not in; the head that is returned knows all rows."""
    rows, n = job.rows, len(job.rows.x)
    strata = rows.strata
    of_rows = assign_folds(n, folds, job.seed, strata=strata, groups=rows.groups)
    if len(np.unique(of_rows)) < folds:
        raise EvaluationError(f"{n} training rows cannot be divided into {folds} folds; take fewer folds")
    blocks, order, chosen = [], [], []
    for fold in range(folds):
        inside = of_rows == fold
        others = rows.take(~inside)
        if strata is not None:
            require_classes(rows.y, ~inside, f"without fold {fold + 1} of {folds}", "leave such classes out")
        job.progress(f"fold {fold + 1} of {folds}: {int((~inside).sum())} rows to fit to, {int(inside.sum())} to score")
        estimator, choice = job.fit(others, seed=job.seed, progress=job.progress)
        blocks.append(predict_rows(estimator, rows.x[inside], job.truth.take(inside), job.labels))
        order.append(np.flatnonzero(inside))
        chosen.append({name: choice[name] for name in ("C", "chosen", "held_out_rows") if name in choice})
    back = np.argsort(np.concatenate(order))
    found = {name: np.concatenate([block[name] for block in blocks])[back] for name in blocks[0]}
    metrics = score_rows(found, job.truth, seed=job.seed)
    job.progress("fitting to all rows, for the head")
    estimator, choice = job.fit(rows, seed=job.seed, progress=job.progress)
    found["fold"] = of_rows
    return Outcome(metrics, {**choice, "by_fold": chosen}, found, estimator)


def measure_shots(job: Job, queries: npt.NDArray[Any], shots: Sequence[int], seeds: int) -> Outcome:
    """Fit to a few rows of each class, for each number and seed, and score the test rows each time."""
    by_shots: dict[str, Any] = {}
    runs: list[Predictions] = []
    first: tuple[Any, dict[str, Any]] = (None, {})
    for count in shots:
        runs, drawn = [], np.zeros(0, dtype=np.int64)
        for run in range(seeds):
            drawn = draw_shots(job.rows.y, count, job.seed + run)
            fitted = job.fit(job.rows.take(drawn), seed=job.seed + run, progress=say_nothing)
            runs.append(predict_rows(fitted[0], queries, job.truth, job.labels))
            first = fitted if run == 0 else first
        values = [float(one["correct"].mean()) for one in runs]
        by_shots[str(count)] = {
            "top1": float(np.mean(values)), "top1_interval": _interval_of_runs(values, runs, job.seed),
            "values": values, "rows": len(drawn),
        }  # fmt: skip
        job.progress(f"{count} shots: top1 {np.mean(values):.4f}, the mean of {seeds} seeds")
    together = {name: np.concatenate([one[name] for one in runs]) for name in runs[0]}
    metrics = score_rows(together, job.truth, seed=job.seed)
    last = by_shots[str(shots[-1])]
    metrics |= {"top1": last["top1"], "top1_interval": last["top1_interval"], "shots": by_shots}
    correct = np.mean([one["correct"] for one in runs], axis=0) if seeds > 1 else runs[0]["correct"]
    return Outcome(metrics, first[1], {**runs[0], "correct": correct}, first[0])


def _interval_of_runs(values: list[float], runs: list[Predictions], seed: int) -> list[float]:
    """Return the interval over the seeds, or of a single one that over the test rows."""
    if len(values) == 1:
        return bootstrap_interval(runs[0]["correct"], seed=seed)
    low, high = t_interval(values)
    return [max(0.0, low), min(1.0, high)]
