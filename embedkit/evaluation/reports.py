"""Report: what a probe found, as values and as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.evaluation.columns import align_columns, short_name
from embedkit.text import printable

# Tables of more classes no longer fit a screen, and show their most telling lines instead.
TABLE_CLASSES = 20

# What the first table calls a head, where not by its name.
TITLES = {"logistic": "linear", "knn": "k-NN"}

# The metric that stands for a report, by what was read off the embeddings.
HEADLINES = {"class": "top1", "multi-label": "mAP", "regression": "r2"}


@dataclass(frozen=True, eq=False)
class Report:
    """The outcome of a probe.

    Parameters
    ----------
    metrics : dict
        Fractions in [0, 1]. Of classes: "top1" and "top1_interval", "top5" where the head knows more than five classes
        and ranks them, "mean_class_accuracy", "ece" (the expected calibration error, of heads with probabilities),
        "per_class" ``{class: accuracy, None without test rows}``, and "confusion", (c, c) counts with one row for each
        true class, None above 2,000 classes; "knn_top1" and "knn_top1_interval" with the default protocol, "by_k"
        ``{k: top1}`` with k-NN protocols. Few-shot, "shots" ``{shots: {"top1", "top1_interval", "values", "rows"}}``:
        the mean over the seeds, its Student interval, the value of each seed, and the training rows; the other metrics
        are those of the most shots over all seeds. Of several labels an image: "mAP", "mAP_interval" and "per_class"
        ``{label: average precision}``. Of numbers: "r2" (at most 1), "r2_interval", "mae", "mae_interval".
    parameters : dict
        What was decided and by what: protocol and its version, task, seed, head, and what the protocol chose on
        training rows.
    inputs : dict
        What was measured: paths, layers, content ids and the digest of the stores, counts of rows, classes and
        failures, the split file and its hash, rows left out, leaks, "unseen_classes" ``{class of the test part that the
        train part lacks: its rows}``, and the versions of the software.
    classes : list of str
        Class names of either part, sorted; the order of "confusion". Empty for regression.
    predictions : dict of str to array
        "ids" of the test rows, "true" and "predicted": codes, where code i means ``classes[i]``; with several labels 0
        and 1 of shape (n, c); or numbers. Of classes also "correct" (bool; few-shot the share of seeds, and "predicted"
        is the first seed's), "confidence" in what was predicted, of heads with probabilities, and with the default
        protocol "linear" and "knn", the predictions of its two heads. With several labels also "scores" (n, c).
    head : FittedHead
        The fitted head, which can be saved; few-shot, the one of the most shots and the first seed.
    """

    metrics: dict[str, Any]
    parameters: dict[str, Any]
    inputs: dict[str, Any]
    classes: list[str]
    predictions: dict[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)
    head: Any = field(default=None, repr=False)

    @property
    def task(self) -> str:
        """What was read off the embeddings: "class", "multi-label" or "regression"."""
        return str(self.parameters.get("task", "class"))

    @property
    def headline(self) -> tuple[str, float, tuple[float, float]]:
        """Name, value and interval of the metric that stands for the report: top1, mAP or r2."""
        name = HEADLINES[self.task]
        low, high = self.metrics.get(f"{name}_interval", [self.metrics[name]] * 2)
        return name, self.metrics[name], (low, high)

    def to_dict(self) -> dict[str, Any]:
        """Return metrics, parameters, inputs and classes as JSON values; predictions and head stay behind."""
        names = ("metrics", "parameters", "inputs", "classes")
        # Through JSON, so that tuples become lists and the numbers that are keys become texts here, not later.
        values: dict[str, Any] = json.loads(json.dumps({name: getattr(self, name) for name in names}, allow_nan=False))
        return values

    def to_text(self) -> str:
        """Return the report as plain text for a terminal, class names with their control characters escaped."""
        sections = [self._summary(), self._class_table(), self._confusion()]
        return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"

    def _summary(self) -> list[str]:
        inputs = self.inputs
        train, test = inputs["train"], inputs["test"]
        lines = align_columns([["", _scale(self.task), "95 % interval", ""], *self._scores()], "<><<")
        lines += ["", f"train  {_part(train)}"]
        folds = self.parameters.get("folds")
        lines.append(
            f"test   {_part(test)}" if not folds else f"test   the same rows, each by the fold of {folds} without it"
        )
        left_out = inputs["left_out"]["not_in_split"]
        if left_out:
            lines.append(f"{left_out} rows of the store are not in the split file and were left out")
        unseen = inputs["unseen_classes"]
        if unseen:
            lines.append(f"{sum(unseen.values())} test rows of {len(unseen)} classes unseen in training count as wrong")
        return lines + _leaks(inputs.get("leaks"))

    def _scores(self) -> list[list[str]]:
        """Return the lines of the first table: what was scored, its value and interval, and what was chosen."""
        metrics, parameters = self.metrics, self.parameters
        tuned = _choice(parameters)
        names = ("r2", "mae") if self.task == "regression" else (HEADLINES[self.task],)
        if "shots" in metrics:
            runs = f"{parameters['seeds']} seeds" if parameters["seeds"] > 1 else "1 seed"
            return [
                [
                    f"{shots}-shot top1",
                    _fraction(one["top1"]),
                    _interval(one["top1_interval"]),
                    f"{one['rows']} rows, {runs}",
                ]
                for shots, one in metrics["shots"].items()
            ]
        head = parameters.get("head", "logistic")
        title = TITLES.get(head, head)
        rows = [
            [f"{title} {name}", _fraction(metrics[name]), _interval(metrics[f"{name}_interval"]), tuned]
            for name in names
        ]
        if "knn_top1" in metrics:
            voting = f"k = {parameters['k']}, T = {parameters['temperature']:g}"
            rows.append(["k-NN top1", _fraction(metrics["knn_top1"]), _interval(metrics["knn_top1_interval"]), voting])
        rows += [[f"  k = {k}", _fraction(value), "", ""] for k, value in metrics.get("by_k", {}).items()]
        return rows

    def _class_table(self) -> list[str]:
        trained, tested = (self.inputs[part]["rows_per_class"] for part in ("train", "test"))
        scores = self.metrics.get("per_class")
        if scores is None:
            return []
        names, note = self.classes, []
        if len(names) > TABLE_CLASSES:
            scored = [name for name in names if scores[name] is not None]
            names = sorted(scored, key=scores.__getitem__)[:TABLE_CLASSES]
            note = [f"(the {len(names)} classes of lowest accuracy, of {len(self.classes)})"]
        rows = [
            [short_name(name), _fraction(scores[name]), str(trained.get(name, 0)), str(tested.get(name, 0))]
            for name in names
        ]
        header = ["class", "accuracy"] if self.task == "class" else ["label", "precision"]
        return align_columns([[*header, "train rows", "test rows"], *rows], "<>>>") + note

    def _confusion(self) -> list[str]:
        confusion = self.metrics.get("confusion")
        if confusion is None:
            return []
        if len(self.classes) > TABLE_CLASSES:
            return self._worst_pairs(np.array(confusion))
        header = ["true \\ predicted", "", *(str(code) for code in range(len(self.classes)))]
        rows = [
            [short_name(name), str(code), *(str(count) if count else "." for count in confusion[code])]
            for code, name in enumerate(self.classes)
        ]
        return align_columns([header, *rows], "<" + ">" * (len(self.classes) + 1))

    def _worst_pairs(self, confusion: npt.NDArray[np.int64]) -> list[str]:
        np.fill_diagonal(confusion, 0)
        order = np.argsort(-confusion, axis=None, kind="stable")[:TABLE_CLASSES]
        pairs = [(int(cell) // len(confusion), int(cell) % len(confusion)) for cell in order]
        rows = [
            [short_name(self.classes[true]), short_name(self.classes[predicted]), str(confusion[true, predicted])]
            for true, predicted in pairs
            if confusion[true, predicted]
        ]
        if not rows:
            return []
        note = (
            f"(the {len(rows)} most frequent confusions; the matrix of {len(confusion)} classes is in the JSON report)"
        )
        return [*align_columns([["true", "predicted", "test rows"], *rows], "<<>"), note]


def _part(part: dict[str, Any]) -> str:
    failures = f", {part['failures']} images failed at extraction" if part["failures"] else ""
    return f"{part['rows']} rows, {part['classes']} classes{failures}  {printable(part['path'])}"


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(bounds: Sequence[float]) -> str:
    return f"[{bounds[0]:.4f}, {bounds[1]:.4f}]"


def _scale(task: str) -> str:
    return {"class": "accuracy", "multi-label": "mAP", "regression": "value"}[task]


def _choice(parameters: dict[str, Any]) -> str:
    """Return in a few words what was chosen on the training rows."""
    chosen = {"C": parameters["C"]} if "C" in parameters else parameters.get("chosen", {})
    texts = [
        f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}" for name, value in chosen.items()
    ]
    return ", ".join(texts) + ("" if parameters.get("converged", True) else ", not converged")


def _leaks(leaks: dict[str, Any] | None) -> list[str]:
    """Return a line about pictures that stand in both parts."""
    if not leaks or not leaks["test_rows"]:
        return []
    rows, dropped = leaks["train_rows"], leaks["dropped"]
    what = (
        f"{dropped} training rows were left out for it" if dropped else f"--drop-leaks leaves {rows} training rows out"
    )
    counts = f"{leaks['exact_pairs']} pairs of the same bytes, {leaks['near_pairs']} alike"
    return [f"{leaks['test_rows']} test rows have a copy in training ({counts}); {what}"]
