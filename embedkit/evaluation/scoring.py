"""Scoring: what a fitted head says about test rows, and the metrics of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.evaluation.intervals import bootstrap_interval, resampled_interval
from embedkit.evaluation.metrics import (
    average_precisions,
    calibration_error,
    class_accuracies,
    confusion_matrix,
    mean_absolute_error,
    r2,
    rank_of_true,
    weighted_average_precision,
)
from embedkit.evaluation.targets import Truth

Predictions = dict[str, npt.NDArray[Any]]

# Beyond this, the matrix would outweigh the embeddings, and nobody reads a JSON file of it.
CONFUSION_CLASSES = 2000
TOP_CLASSES = 5
RESAMPLES = 1000  # Of a metric that every resample computes anew.
BLOCK_ROWS = 8192
BLOCK_SCORES = 1 << 24  # Of a block of rows with many classes, so that memory does not grow with their number.


@dataclass(frozen=True, eq=False)
class Jury:
    """What is asked about test rows.

    Parameters
    ----------
    main : estimator
        The protocol's head.
    beside : dict of str to estimator
        Others, by name.
    questions : array
        What the main head is asked: embeddings of shape (q, d), or numbers of queries that were searched for before.
    others : array
        What those beside it are asked.
    """

    main: Any
    beside: dict[str, Any]
    questions: npt.NDArray[Any]
    others: npt.NDArray[Any]


def predict_rows(estimator: Any, x: npt.NDArray[Any], truth: Truth, labels: list[str]) -> Predictions:
    """Return what a head says about test rows, one array for each kind of answer.

    Parameters
    ----------
    estimator : estimator
        Fitted.
    x : array of shape (n, d)
        Test embeddings.
    truth : Truth
        What is true of them.
    labels : list of str
        With several labels a row, the names of the columns that the estimator was fitted to.

    Returns
    -------
    dict of str to array
        "true" and "predicted"; of classes also "correct" and, where the head gives them, "confidence" and "rank", the
        number of classes that score higher than the true one; with several labels "scores".
    """
    size = max(1, min(BLOCK_ROWS, BLOCK_SCORES // max(1, len(truth.classes))))
    blocks = [
        _predict_block(estimator, x[start : start + size], truth.take(slice(start, start + size)), labels)
        for start in range(0, len(x), size)
    ]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _predict_block(estimator: Any, x: npt.NDArray[Any], truth: Truth, labels: list[str]) -> Predictions:
    if truth.task == "regression":
        return {"true": truth.values, "predicted": np.asarray(estimator.predict(x), dtype=np.float64).reshape(-1)}
    if truth.task == "multi-label":
        return _predict_labels(estimator, x, truth, labels)
    classes = np.array(truth.classes)
    predicted = np.searchsorted(classes, estimator.predict(x))
    found = {"true": truth.values, "predicted": predicted, "correct": predicted == truth.values}
    scores, likely = class_scores(estimator, x)
    if scores is None or scores.shape[1] != len(estimator.classes_):
        return found  # Such as one score for each pair of classes.
    known = np.searchsorted(classes, estimator.classes_)
    columns = np.full(len(classes), -1)
    columns[known] = np.arange(len(known))
    found["rank"] = rank_of_true(scores, columns[truth.values])
    if likely:
        found["confidence"] = scores[np.arange(len(x)), columns[predicted]].astype(np.float32)
    return found


def _predict_labels(estimator: Any, x: npt.NDArray[Any], truth: Truth, labels: list[str]) -> Predictions:
    columns = [truth.classes.index(label) for label in labels]
    # A label that no training row has scores below everything, and is never predicted.
    scores = np.full(truth.values.shape, -np.inf, dtype=np.float32)
    predicted = np.zeros(truth.values.shape, dtype=np.uint8)
    answers = np.asarray(estimator.predict(x))
    found, _ = class_scores(estimator, x)
    scores[:, columns] = answers if found is None else found
    predicted[:, columns] = answers
    return {"true": truth.values, "predicted": predicted, "scores": scores}


def class_scores(estimator: Any, x: npt.NDArray[Any]) -> tuple[npt.NDArray[Any] | None, bool]:
    """Return a score of every class or label for each row, and whether they are probabilities.

    Parameters
    ----------
    estimator : estimator
        Fitted.
    x : array of shape (n, d)
        Embeddings.

    Returns
    -------
    scores : array of shape (n, c) or None
        What ``predict_proba`` says, or else ``decision_function``.
    likely : bool
        Whether they are probabilities.
    """
    for method in ("predict_proba", "decision_function"):
        if hasattr(estimator, method):
            scores = getattr(estimator, method)(x)
            if isinstance(scores, list):
                scores = label_columns(scores, estimator.classes_)
            scores = np.asarray(scores)
            if scores.ndim == 1:  # Of two classes, the second's distance alone.
                scores = np.stack([-scores, scores], axis=1)
            return scores, method == "predict_proba"
    return None, False


def label_columns(scores: Sequence[npt.NDArray[Any]], known: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return one column for each label, of what scikit-learn returns for several outputs: one array for each.

    Parameters
    ----------
    scores : sequence of arrays of shape (n, 1 or 2)
        A column for each of the values that a label had in training.
    known : sequence of arrays
        Those values: 0 and 1, or one of them alone.
    """
    zero = np.zeros(len(scores[0]))
    columns = [one[:, -1] if values[-1] else zero for one, values in zip(scores, known, strict=True)]
    return np.stack(columns, axis=1)


def score_classes(found: Predictions, classes: list[str], *, seed: int) -> dict[str, Any]:
    """Return the metrics of predicted classes.

    Parameters
    ----------
    found : dict of str to array
        As `predict_rows` returns it.
    classes : list of str
        Names of the codes.
    seed : int
        Draws the bootstrap.

    Returns
    -------
    dict
        As `Report.metrics` describes it.
    """
    true, predicted, correct, c = found["true"], found["predicted"], found["correct"], len(classes)
    by_class = class_accuracies(true, predicted, c)
    present = [accuracy for accuracy in by_class if accuracy is not None]
    metrics: dict[str, Any] = {"top1": float(correct.mean()), "top1_interval": bootstrap_interval(correct, seed=seed)}
    if "rank" in found and c > TOP_CLASSES:
        metrics["top5"] = float((found["rank"] < TOP_CLASSES).mean())
    metrics["mean_class_accuracy"] = float(np.mean(present))
    if "confidence" in found:
        metrics["ece"] = calibration_error(found["confidence"], correct)
    metrics["per_class"] = dict(zip(classes, by_class, strict=True))
    metrics["confusion"] = confusion_matrix(true, predicted, c).tolist() if c <= CONFUSION_CLASSES else None
    return metrics


def score_labels(found: Predictions, classes: list[str], *, seed: int) -> dict[str, Any]:
    """Return the metrics of several labels a row; parameters and result as those of `score_classes`."""
    true, scores = found["true"], found["scores"]
    precisions = average_precisions(true, scores)
    held = np.flatnonzero(true.any(axis=0))

    def mean_precision(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # A resample without any row of a label leaves that label out.
        values = np.stack([weighted_average_precision(true[:, one], scores[:, one], weights) for one in held])
        means: npt.NDArray[np.float64] = np.nansum(values, axis=0) / np.maximum(np.isfinite(values).sum(axis=0), 1)
        return means

    by_label = [None if np.isnan(value) else float(value) for value in precisions]
    return {
        "mAP": float(precisions[held].mean()),
        "mAP_interval": resampled_interval(mean_precision, len(true), seed=seed, resamples=RESAMPLES),
        "per_class": dict(zip(classes, by_label, strict=True)),
    }


def score_numbers(found: Predictions, *, seed: int) -> dict[str, Any]:
    """Return the metrics of predicted numbers; parameters and result as those of `score_classes`."""
    true, predicted = found["true"], found["predicted"]
    errors = np.abs(true - predicted)
    interval = resampled_interval(lambda weights: r2(true, predicted, weights), len(true), seed=seed)
    means = resampled_interval(lambda weights: weights @ errors / len(errors), len(true), seed=seed)
    return {
        "r2": r2(true, predicted),
        "r2_interval": interval,
        "mae": mean_absolute_error(true, predicted),
        "mae_interval": means,
    }


def score_rows(found: Predictions, truth: Truth, *, seed: int) -> dict[str, Any]:
    """Return the metrics of predictions, by what was read off the embeddings."""
    if truth.task == "regression":
        return score_numbers(found, seed=seed)
    score = score_labels if truth.task == "multi-label" else score_classes
    return score(found, truth.classes, seed=seed)
