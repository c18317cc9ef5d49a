"""Report: what a probe found, as values and as text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.text import printable

# Tables of more classes no longer fit a screen, and show their most telling lines instead.
TABLE_CLASSES = 20
NAME_WIDTH = 40


@dataclass(frozen=True, eq=False)
class Report:
    """The outcome of a probe.

    Parameters
    ----------
    metrics : dict
        Fractions in [0, 1]: "top1" and "top1_interval" of the linear head, "knn_top1" and "knn_top1_interval" of the
        k-NN head, "per_class" ``{class: accuracy of the linear head, None without test rows}``, and "confusion", the
        linear head's (c, c) counts with one row for each true class, None above 2,000 classes.
    parameters : dict
        What was decided and by what: protocol, seed, C, its grid and scores, k, temperature.
    inputs : dict
        What was measured: paths, content ids and the digest of the stores, counts of rows, classes and failures, rows
        left out, and "unseen_classes", ``{class of the test part that the train part lacks: its rows}``.
    classes : list of str
        Class names of either part, sorted; the order of "confusion".
    predictions : dict of str to array
        "ids" of the test rows and the codes "true", "linear" and "knn": code i means ``classes[i]``.
    head : Pipeline
        The fitted linear head; it predicts class names.
    """

    metrics: dict[str, Any]
    parameters: dict[str, Any]
    inputs: dict[str, Any]
    classes: list[str]
    predictions: dict[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)
    head: Any = field(default=None, repr=False)

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
        metrics, parameters, inputs = self.metrics, self.parameters, self.inputs
        train, test = inputs["train"], inputs["test"]
        tuned = f"C = {parameters['C']:g}" + ("" if parameters["converged"] else ", not converged")
        voting = f"k = {parameters['k']}, T = {parameters['temperature']:g}"
        rows = [
            ["linear top1", _fraction(metrics["top1"]), _interval(metrics["top1_interval"]), tuned],
            ["k-NN top1", _fraction(metrics["knn_top1"]), _interval(metrics["knn_top1_interval"]), voting],
        ]
        lines = _columns([["", "accuracy", "95 % interval", ""], *rows], "<><<")
        lines += ["", f"train  {_part(train)}", f"test   {_part(test)}"]
        left_out = inputs["left_out"]["not_in_split"]
        if left_out:
            lines.append(f"{left_out} rows of the store are not in the split file and were left out")
        unseen = inputs["unseen_classes"]
        if unseen:
            lines.append(f"{sum(unseen.values())} test rows of {len(unseen)} classes unseen in training count as wrong")
        return lines

    def _class_table(self) -> list[str]:
        trained, tested = (self.inputs[part]["rows_per_class"] for part in ("train", "test"))
        scores = self.metrics["per_class"]
        names, note = self.classes, []
        if len(names) > TABLE_CLASSES:
            scored = [name for name in names if scores[name] is not None]
            names = sorted(scored, key=scores.__getitem__)[:TABLE_CLASSES]
            note = [f"(the {len(names)} classes of lowest accuracy, of {len(self.classes)})"]
        rows = [
            [_name(name), _fraction(scores[name]), str(trained.get(name, 0)), str(tested.get(name, 0))]
            for name in names
        ]
        return _columns([["class", "accuracy", "train rows", "test rows"], *rows], "<>>>") + note

    def _confusion(self) -> list[str]:
        confusion = self.metrics["confusion"]
        if confusion is None:
            return []
        if len(self.classes) > TABLE_CLASSES:
            return self._worst_pairs(np.array(confusion))
        header = ["true \\ predicted", "", *(str(code) for code in range(len(self.classes)))]
        rows = [
            [_name(name), str(code), *(str(count) if count else "." for count in confusion[code])]
            for code, name in enumerate(self.classes)
        ]
        return _columns([header, *rows], "<" + ">" * (len(self.classes) + 1))

    def _worst_pairs(self, confusion: npt.NDArray[np.int64]) -> list[str]:
        np.fill_diagonal(confusion, 0)
        order = np.argsort(-confusion, axis=None, kind="stable")[:TABLE_CLASSES]
        pairs = [(int(cell) // len(confusion), int(cell) % len(confusion)) for cell in order]
        rows = [
            [_name(self.classes[true]), _name(self.classes[predicted]), str(confusion[true, predicted])]
            for true, predicted in pairs
            if confusion[true, predicted]
        ]
        if not rows:
            return []
        note = (
            f"(the {len(rows)} most frequent confusions; the matrix of {len(confusion)} classes is in the JSON report)"
        )
        return [*_columns([["true", "predicted", "test rows"], *rows], "<<>"), note]


def _name(text: str) -> str:
    """Return a class name fit for a table: printable, and not longer than a column."""
    escaped = printable(text)
    return escaped if len(escaped) <= NAME_WIDTH else escaped[: NAME_WIDTH - 3] + "..."


def _part(part: dict[str, Any]) -> str:
    failures = f", {part['failures']} images failed at extraction" if part["failures"] else ""
    return f"{part['rows']} rows, {part['classes']} classes{failures}  {printable(part['path'])}"


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(bounds: Sequence[float]) -> str:
    return f"[{bounds[0]:.4f}, {bounds[1]:.4f}]"


def _columns(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Return rows of cells as aligned lines; `alignment` has < or > for each column."""
    widths = [max(map(_cells, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text + " " * (width - _cells(text)) if side == "<" else " " * (width - _cells(text)) + text
            for text, width, side in zip(row, widths, alignment, strict=True)
        ).rstrip()
        for row in rows
    ]


def _cells(text: str) -> int:
    """Return how many terminal cells a text takes: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
