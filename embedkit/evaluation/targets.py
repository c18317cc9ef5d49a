"""Targets: what heads are fitted to and scored against, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.evaluation.splits import Part, label_sets
from embedkit.text import counted, printable


@dataclass(frozen=True, eq=False)
class Training:
    """What a protocol may see: training rows.

    Parameters
    ----------
    x : array of float32 of shape (n, d), or StoredRows
        Embeddings, in memory or where they are stored; see `embedkit.evaluation.streaming`.
    y : array
        Class names of shape (n,), 0 and 1 of shape (n, c) for several labels a row, or numbers of shape (n,).
    task : str
        "class", "multi-label" or "regression".
    groups : array of int of shape (n,), optional
        Equal for byte-identical pictures, which must not be on two sides of a held-out part.
    """

    x: Any
    y: npt.NDArray[Any]
    task: str = "class"
    groups: npt.NDArray[np.int64] | None = None

    @property
    def strata(self) -> npt.NDArray[np.int64] | None:
        """Class code of each row, None where rows have no class of their own."""
        return np.unique(self.y, return_inverse=True)[1] if self.task == "class" else None

    def take(self, rows: npt.NDArray[Any]) -> Training:
        """Return some of the rows; `rows` are numbers or a mask."""
        groups = None if self.groups is None else self.groups[rows]
        return Training(self.x[rows], self.y[rows], self.task, groups)


@dataclass(frozen=True, eq=False)
class Truth:
    """What is true of the test rows.

    Parameters
    ----------
    task : str
        "class", "multi-label" or "regression".
    classes : list of str
        Names of the classes or labels of either part, sorted; empty for regression.
    values : array
        Codes of shape (n,), 0 and 1 of shape (n, c), or numbers of shape (n,).
    """

    task: str
    classes: list[str]
    values: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: npt.NDArray[Any] | slice) -> Truth:
        """Return what is true of some of the rows."""
        return Truth(self.task, self.classes, self.values[rows])


def fitted_labels(train: Part) -> list[str]:
    """Return the names of the columns that a head of several labels is fitted to: the labels of the training rows."""
    return sorted({label for labels in label_sets(train.names) for label in labels})


def training_targets(train: Part) -> npt.NDArray[Any]:
    """Return what a head is fitted to: the y of `Training`."""
    if train.task == "regression":
        assert train.targets is not None
        return train.targets
    return _indicator(train, fitted_labels(train)) if train.task == "multi-label" else train.names


def find_truth(train: Part, test: Part) -> Truth:
    """Return what is true of the test rows, over the classes of both parts.

    Raises
    ------
    EvaluationError
        When no number can be made of it: no test row has a label, training rows have but one, or all test targets are
        equal.
    """
    where = test.store.path
    if test.task == "regression":
        assert test.targets is not None
        if np.ptp(test.targets) == 0:
            raise EvaluationError(f"{where}: all {len(test.rows)} test targets are {test.targets[0]:g}; R2 needs two")
        return Truth(test.task, [], test.targets)
    if test.task == "multi-label":
        labels = fitted_labels(train)
        classes = sorted({*labels, *fitted_labels(test)})
        truth = Truth(test.task, classes, _indicator(test, classes))
        if not truth.values.any():
            raise EvaluationError(f"{where}: none of {len(test.rows)} test rows has a label; mAP needs one")
        if len(labels) == 1:  # Heads take a single column for names of classes.
            raise EvaluationError(
                f"{train.store.path}: the training rows have the label {labels[0]!r} or none, and no other; probe it "
                "and its absence as two classes"
            )
        return truth
    names = np.unique(np.concatenate([train.names, test.names]))
    return Truth(test.task, names.tolist(), np.searchsorted(names, test.names))


def require_classes(y: npt.NDArray[Any], kept: npt.NDArray[np.bool_], where: str, advice: str) -> None:
    """Raise unless the rows that are kept to fit to are of two classes.

    Parameters
    ----------
    y : array of shape (n,)
        Class of each training row; two or more classes.
    kept : array of bool of shape (n,)
        Rows to fit to.
    where : str
        Where the others are, for the message.
    advice : str
        What to do beside giving classes more rows.

    Raises
    ------
    EvaluationError
        When they are of one class. It names the others and how many rows they have.
    """
    left = np.unique(y[kept])
    if len(left) > 1:
        return
    lost = [
        f"{printable(str(name))!r} ({counted(int(count), 'row')})"
        for name, count in zip(*np.unique(y, return_counts=True), strict=True)
        if name not in left
    ]
    more = f" and {len(lost) - 5:,} more" if len(lost) > 5 else ""
    raise EvaluationError(
        f"{where}, no row is left to fit to of {', '.join(lost[:5])}{more}: give each class more rows, or {advice}"
    )


def _indicator(part: Part, classes: list[str]) -> npt.NDArray[np.uint8]:
    columns = {name: column for column, name in enumerate(classes)}
    matrix = np.zeros((len(part.rows), len(classes)), dtype=np.uint8)
    for row, labels in enumerate(label_sets(part.names)):
        matrix[row, [columns[label] for label in labels]] = 1
    return matrix
