"""The part of a bench page that is about one cell: classes, confusion, calibration, and the worst errors."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.evaluation.charts import reliability_chart
from embedkit.evaluation.metrics import calibration_error
from embedkit.evaluation.reports import Report
from embedkit.index.page import picture_tag
from embedkit.index.pictures import read_picture
from embedkit.store import Store
from embedkit.text import counted, printable

CLASSES = 40  # Of a table.
MATRIX_CLASSES = 20
PAIRS = 20
ERRORS = 12
PIXELS = 144
NAME_LENGTH = 60


class Pictures:
    """Thumbnails for a page, as long as there is room on it; every picture is read once.

    Parameters
    ----------
    limit : int
        How many the page may show.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.shown, self.left_out = limit, 0, 0
        self._known: dict[tuple[str, str], str] = {}

    def tag(self, store: Store | None, id: str) -> str:
        """Return the image of an id as HTML, or why there is none."""
        if self.shown >= self.limit:
            self.left_out += 1
            return '<div class="missing">no room on this page</div>'
        self.shown += 1
        if store is None:
            return '<div class="missing">its store is not there any more</div>'
        key = (str(store.root), id)
        if key not in self._known:
            self._known[key] = picture_tag(lambda: read_picture(store, id), PIXELS)
        return self._known[key]


def cell_details(report: Report, store: Store | None, pictures: Pictures) -> str:
    """Return what a page says of one cell, as HTML.

    Parameters
    ----------
    report : Report
        With its predictions.
    store : Store, optional
        The store of its test rows, for the pictures.
    pictures : Pictures
        Counts them.
    """
    parts = [_confusion(report), _calibration(report)] if report.task == "class" else []
    beside = "".join(f"<section>{part}</section>" for part in [*parts, _classes(report)] if part)
    return f"{_facts(report)}<div class=beside>{beside}</div>{_errors(report, store, pictures)}"


def text(value: object) -> str:
    """Return any text as HTML: printable, escaped, and not endless."""
    shown = printable(str(value))
    return html.escape(shown if len(shown) <= 4 * NAME_LENGTH else f"{shown[: 4 * NAME_LENGTH]}…")


def name(value: object) -> str:
    """Return a name from a file as HTML, short enough for a table."""
    shown = printable(str(value))
    return html.escape(shown if len(shown) <= NAME_LENGTH else f"{shown[: NAME_LENGTH - 1]}…")


def table(header: list[str], rows: list[list[str]], kinds: str) -> str:
    """Return an HTML table of cells that are HTML already; `kinds` has n, t or w of each: number, text, words."""
    head = "".join(f"<th class={kind}>{cell}</th>" for cell, kind in zip(header, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td class={kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _facts(report: Report) -> str:
    inputs, metrics = report.inputs, report.metrics
    parts = [f"{counted(len(report.predictions['ids']), 'test row')}"]
    train = inputs.get("train")
    if isinstance(train, dict) and isinstance(train.get("rows"), int):
        parts.append(counted(train["rows"], "training row"))
    for key, label in (("top5", "top5"), ("mean_class_accuracy", "mean class accuracy"), ("mae", "MAE")):
        if isinstance(metrics.get(key), float):
            parts.append(f"{label} {metrics[key]:.4f}")
    leaks = inputs.get("leaks")
    if isinstance(leaks, dict) and leaks.get("test_rows"):
        parts.append(f"{leaks['test_rows']} test rows have a copy in train")
    unseen = inputs.get("unseen_classes")
    if unseen:
        parts.append(f"{counted(len(unseen), 'class')} of the test rows unseen in training")
    chosen = {key: value for key, value in report.parameters.items() if not isinstance(value, dict | list)}
    shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in chosen.items())
    return f"<p>{'; '.join(map(text, parts))}.</p>{_shots(metrics)}<p class=soft>{text(shown)}</p>"


def _shots(metrics: dict[str, Any]) -> str:
    shots = metrics.get("shots")
    if not isinstance(shots, dict):
        return ""
    rows = [
        [text(count), f"{one['top1']:.4f}", "[{:.4f}, {:.4f}]".format(*one["top1_interval"]), str(len(one["values"]))]
        for count, one in shots.items()
    ]
    note = (
        "<p class=soft>Classes over all seeds; confusion, calibration and errors of the most shots and the first.</p>"
    )
    return table(["shots", "top1", "95 % interval", "seeds"], rows, "nnnn") + note


def _classes(report: Report) -> str:
    """Return the classes with the lowest values first."""
    per_class = report.metrics.get("per_class")
    if not isinstance(per_class, dict):
        return ""
    true = report.predictions["true"]
    counts = np.bincount(true, minlength=len(report.classes)) if report.task == "class" else true.sum(axis=0)
    known = {name: int(count) for name, count in zip(report.classes, counts, strict=True)}
    scored = sorted((value, one) for one, value in per_class.items() if isinstance(value, float))
    rows = [
        [name(one), f'<meter min="0" max="1" value="{value:.4f}"></meter> {value:.4f}', f"{known.get(one, 0):,}"]
        for value, one in scored[:CLASSES]
    ]
    left = len(scored) - len(rows)
    note = f"<p class=soft>{left:,} classes with higher values are left out.</p>" if left > 0 else ""
    label = "accuracy" if report.task == "class" else "average precision"
    return f"<h4>Classes, the lowest first</h4>{table(['class', label, 'test rows'], rows, 'tnn')}{note}"


def _confusion(report: Report) -> str:
    true, predicted = report.predictions["true"], report.predictions["predicted"]
    c = len(report.classes)
    pairs, counts = np.unique(true.astype(np.int64) * c + predicted, return_counts=True)
    if c <= MATRIX_CLASSES:
        matrix = np.zeros(c * c, dtype=np.int64)
        matrix[pairs] = counts
        return f"<h4>Confusion: rows are the true classes</h4>{_matrix(report.classes, matrix.reshape(c, c))}"
    wrong = pairs // c != pairs % c
    order = np.argsort(-counts[wrong], kind="stable")[:PAIRS]
    found = [(int(pairs[wrong][at]), int(counts[wrong][at])) for at in order]
    rows = [[name(report.classes[pair // c]), name(report.classes[pair % c]), f"{count:,}"] for pair, count in found]
    note = f"<p class=soft>The matrix of {c:,} classes is left out; these are its most frequent confusions.</p>"
    return f"<h4>Confusion</h4>{table(['true', 'taken for', 'test rows'], rows, 'ttn')}{note}"


def _matrix(classes: list[str], matrix: npt.NDArray[np.int64]) -> str:
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    head = "".join(f'<th class="n" title="{text(one)}">{number}</th>' for number, one in enumerate(classes))
    rows = []
    for row, one in enumerate(classes):
        cells = "".join(
            f'<td class="n {"right" if row == column else "wrong"}" style="--share:{shares[row, column]:.3f}" '
            f'title="{text(one)} as {text(other)}: {shares[row, column]:.1%}">{matrix[row, column] or "·"}</td>'
            for column, other in enumerate(classes)
        )
        rows.append(f'<tr><th class="t">{row} {name(one)}</th>{cells}</tr>')
    return f'<div class="wide"><table class="confusion"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _calibration(report: Report) -> str:
    confidence = report.predictions.get("confidence")
    if confidence is None or not len(confidence):
        return ""
    correct = report.predictions["predicted"] == report.predictions["true"]
    ece = calibration_error(np.clip(confidence, 0, 1), correct)
    return (
        f"<h4>Calibration: expected error {ece:.4f}</h4><figure class=small>"
        f"{reliability_chart(np.clip(confidence, 0, 1), correct)}<figcaption>On the diagonal, stated probabilities "
        "come true. 15 bins of equal width.</figcaption></figure>"
    )


def _errors(report: Report, store: Store | None, pictures: Pictures) -> str:
    """Return the errors that the head was surest of, with their pictures."""
    found = list(_worst(report))
    if not found:
        return ""
    items = []
    for row, caption in found:
        id = str(report.predictions["ids"][row])
        items.append(
            f"<li><figure>{pictures.tag(store, id)}<figcaption>{caption}<small>{text(id)}</small></figcaption></figure>"
            "</li>"
        )
    how = "" if report.task != "class" else ", the surest first" if "confidence" in report.predictions else ""
    return f"<h4>Worst errors{how}</h4><ol class=pictures>{''.join(items)}</ol>"


def _worst(report: Report) -> Iterator[tuple[int, str]]:
    """Yield rows and what is said of them."""
    true, predicted = report.predictions["true"], report.predictions["predicted"]
    if report.task == "regression":
        for row in np.argsort(-np.abs(true - predicted), kind="stable")[:ERRORS].tolist():
            yield row, f"<b>{predicted[row]:.4g}</b> for {true[row]:.4g}"
    elif report.task == "class":
        wrong = np.flatnonzero(true != predicted)
        confidence = report.predictions.get("confidence")
        order = wrong if confidence is None else wrong[np.argsort(-confidence[wrong], kind="stable")]
        for row in order[:ERRORS].tolist():
            sure = "" if confidence is None else f" {confidence[row]:.2f}"
            yield row, f"<b>{name(report.classes[predicted[row]])}</b>{sure}<br>is {name(report.classes[true[row]])}"
