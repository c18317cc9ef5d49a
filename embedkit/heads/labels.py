"""Labels: what a head is to predict, as codes and as columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from embedkit.errors import EvaluationError

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels as numbers.

    Parameters
    ----------
    classes : array of shape (c,)
        The different labels, sorted; numbers of columns where a row may have several.
    codes : array
        int64 of shape (n,): row i has the label ``classes[codes[i]]``. With several labels a row float32 0 and 1 of
        shape (n, c).
    several : bool
        Whether a row may have several labels.
    """

    classes: Array
    codes: Array
    several: bool = False

    @property
    def columns(self) -> int:
        """Number of columns of weights: one for two classes."""
        return 1 if len(self.classes) == 2 and not self.several else len(self.classes)

    @property
    def targets(self) -> Array:
        """Codes of a softmax, or float32 0 and 1 of shape (n, columns) of sigmoids."""
        binary = self.columns == 1 and not self.several
        return self.codes.astype(np.float32)[:, None] if binary else self.codes

    def codes_of(self, labels: Array) -> Array:
        """Return the codes of other rows' labels, -1 for a class that is not among these."""
        if self.several:
            return np.ascontiguousarray(labels, dtype=np.float32)
        codes = np.searchsorted(self.classes, labels.reshape(-1)).clip(max=len(self.classes) - 1)
        return np.where(self.classes[codes] == labels.reshape(-1), codes, -1)

    def signs(self) -> Array:
        """Return -1 and 1 of shape (n, columns): what linear heads that square errors are fitted to."""
        if self.several or self.columns == 1:
            return 2 * self.targets - 1
        signs = np.full((len(self.codes), len(self.classes)), -1, dtype=np.float32)
        signs[np.arange(len(signs)), self.codes] = 1
        return signs


def encode(labels: Array) -> Labels:
    """Return labels of shape (n,), or 0 and 1 of shape (n, c), as numbers.

    Raises
    ------
    EvaluationError
        When all rows are of one class, or a matrix has other values than 0 and 1.
    ValueError
        When they are no labels, but numbers with fractions.
    """
    check_classification_targets(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = column_or_1d(labels, warn=True)
    if labels.ndim == 2:
        if not np.isin(labels, (0, 1)).all():
            raise EvaluationError("several labels a row are a matrix of 0 and 1")
        return Labels(np.arange(labels.shape[1]), np.ascontiguousarray(labels, dtype=np.float32), several=True)
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise EvaluationError("a classifier needs training rows of at least two classes, and all are of one class")
    return Labels(classes, codes.astype(np.int64))
