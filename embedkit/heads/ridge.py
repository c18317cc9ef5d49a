"""Ridge regression in closed form: all regularisations from one eigendecomposition, over rows that stream by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model._base import LinearClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from embedkit.errors import EvaluationError
from embedkit.heads.labels import Labels, encode

Array = npt.NDArray[Any]

ROWS = 4096  # Of one block, which is held in float64: 40 MB of a wide matrix.
LEAST_SHARE = 1e-12  # Of the largest eigenvalue: what is below is rounding.


@dataclass(frozen=True, eq=False)
class Equations:
    """The normal equations of standardised rows, in the eigenvectors of X'X.

    Parameters
    ----------
    mean, scale : arrays of shape (d,)
        Of the rows.
    centre : array of shape (t,)
        Mean of the targets.
    directions : array of shape (d, r)
        Eigenvectors of X'X, with X the standardised rows.
    spectrum : array of shape (r,)
        Their eigenvalues.
    products : array of shape (r, t)
        ``directions' X'Y``, with Y the centred targets.
    """

    mean: Array
    scale: Array
    centre: Array
    directions: Array
    spectrum: Array
    products: Array

    def solve(self, regularisation: float) -> tuple[Array, Array]:
        """Return weights (t, d) and intercepts (t,) for rows as they are.

        The solution of ``(X'X + regularisation) W = X'Y``.
        """
        inverse = self.spectrum + regularisation
        scaled = np.divide(
            self.products, inverse[:, None], out=np.zeros_like(self.products), where=inverse[:, None] > 0
        )
        weights = (self.directions @ scaled).T / self.scale
        return weights, self.centre - weights @ self.mean


def stream_equations(blocks: Iterable[tuple[Array, Array]]) -> Equations:
    """Return the equations of rows (b, d) and targets (b, t) that come block by block.

    Sums are float64. The eigendecomposition is of d x d numbers, whatever the number of rows.
    """
    count = 0
    origin = total = gram = cross = sums = np.empty(0)
    for x, y in blocks:
        if not count:  # Near the mean, so that the products lose no digits.
            origin = x.mean(axis=0, dtype=np.float64)
            d, t = x.shape[1], y.shape[1]
            total, gram, cross, sums = np.zeros(d), np.zeros((d, d)), np.zeros((d, t)), np.zeros(t)
        rows, targets = x - origin, y.astype(np.float64)
        count += len(rows)
        total += rows.sum(axis=0)
        sums += targets.sum(axis=0)
        gram += rows.T @ rows
        cross += rows.T @ targets
    if not count:
        raise EvaluationError("ridge regression needs training rows, and there are none")
    shift, centre = total / count, sums / count
    gram -= count * np.outer(shift, shift)
    cross -= np.outer(total, centre)
    scale = _scale(np.diag(gram) / count, origin + shift, count)
    values, vectors = eigh(gram / scale / scale[:, None], overwrite_a=True, check_finite=False)
    cross /= scale[:, None]
    return Equations(origin + shift, scale, centre, vectors, values.clip(min=0), vectors.T @ cross)


def equations_of(x: Array, y: Array) -> Equations:
    """Return the equations of rows (n, d) and targets (n, t) in memory: from XX' where n is less than d."""
    if len(x) >= x.shape[1]:
        return stream_equations((x[start : start + ROWS], y[start : start + ROWS]) for start in range(0, len(x), ROWS))
    mean = x.mean(axis=0, dtype=np.float64)
    rows = x - mean
    scale = _scale(np.square(rows).mean(axis=0), mean, len(x))
    rows /= scale
    centre = y.mean(axis=0, dtype=np.float64)
    values, vectors = eigh(rows @ rows.T)
    kept = values > LEAST_SHARE * max(values[-1], 0)
    values, vectors = values[kept], vectors[:, kept]
    lengths = np.sqrt(values)
    products = (vectors * lengths).T @ (y - centre)
    return Equations(mean, scale, centre, rows.T @ (vectors / lengths), values, products)


def _scale(variance: Array, mean: Array, n: int) -> Array:
    """Return standard deviations, 1 for columns without spread."""
    flat = variance <= 10 * n * np.finfo(np.float64).eps * np.square(mean)
    scale: Array = np.sqrt(np.where(flat | (variance <= 0), 1, variance))
    return scale


class RidgeHead(LinearClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Ridge regression onto 1 for a row's class and -1 for the others, on standardised rows.

    Parameters
    ----------
    regularisation : float, default 100.0
        Added to the diagonal of X'X, of standardised rows X; at least 0.

    Attributes
    ----------
    classes_ : array of shape (c,)
        The labels seen in `fit`, sorted; column numbers with several labels a row.
    coef_, intercept_ : arrays of shape (c, d) and (c,), or (1, d) and (1,) with two classes
        Of rows as they are, not standardised.

    Examples
    --------
    >>> from embedkit.heads import RidgeHead
    >>> head = RidgeHead(1.0).fit([[0.0], [1.0], [2.0], [3.0]], ["low", "low", "high", "high"])
    >>> head.predict([[0.2], [2.8]]).tolist()
    ['low', 'high']
    """

    def __init__(self, regularisation: float = 100.0) -> None:
        self.regularisation = regularisation

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> RidgeHead:
        """Fit to rows of shape (n, d) and labels of shape (n,), or 0 and 1 of shape (n, c).

        Raises
        ------
        EvaluationError
            When there are fewer than two classes, or `regularisation` is negative.
        ValueError
            When `X` is not a finite matrix or `y` does not fit it.
        """
        rows, labels = validate_data(self, X, y, dtype=[np.float32, np.float64], multi_output=True)
        _require(self.regularisation)
        coded = encode(labels)
        return self._adopt(equations_of(rows, coded.signs()), coded.classes, coded.several, rows.dtype)

    def _adopt(self, equations: Equations, classes: Array, several: bool, dtype: Any) -> RidgeHead:
        weights, intercept = equations.solve(self.regularisation)
        self.coef_, self.intercept_ = weights.astype(dtype), intercept.astype(dtype)
        self.classes_, self.multi_label_ = classes, several
        self.n_features_in_ = weights.shape[1]
        return self

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the label of the highest score of each row, or 0 and 1 of shape (q, c) for several labels a row."""
        check_is_fitted(self)
        labels: Array = (self.decision_function(X) > 0).astype(np.int64) if self.multi_label_ else super().predict(X)
        return labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class RidgeRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Ridge regression onto numbers, on standardised rows.

    Parameters
    ----------
    regularisation : float, default 100.0
        Added to the diagonal of X'X, of standardised rows X; at least 0.

    Attributes
    ----------
    coef_, intercept_ : arrays of shape (d,) and ()
        Of rows as they are; (t, d) and (t,) for t numbers a row.

    Examples
    --------
    >>> from embedkit.heads import RidgeRegressor
    >>> RidgeRegressor(0.0).fit([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0]).predict([[4.0]]).round(6).tolist()
    [9.0]
    """

    def __init__(self, regularisation: float = 100.0) -> None:
        self.regularisation = regularisation

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> RidgeRegressor:
        """Fit to rows of shape (n, d) and numbers of shape (n,) or (n, t); see `RidgeHead.fit`."""
        rows, targets = validate_data(self, X, y, dtype=[np.float32, np.float64], multi_output=True, y_numeric=True)
        _require(self.regularisation)
        weights, intercept = equations_of(rows, targets.reshape(len(rows), -1)).solve(self.regularisation)
        flat = targets.ndim == 1
        self.coef_ = (weights[0] if flat else weights).astype(rows.dtype)
        self.intercept_ = (intercept[:1].reshape(()) if flat else intercept).astype(rows.dtype)
        return self

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the number of each row, of the shape that `fit` was given."""
        check_is_fitted(self)
        queries = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        numbers: Array = queries @ self.coef_.T + self.intercept_
        return numbers

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def stream_ridge(
    blocks: Iterable[tuple[Array, Array]], classes: Sequence[Any], regularisations: Sequence[float]
) -> dict[float, RidgeHead]:
    """Fit a ridge head for each regularisation to rows that come block by block, and are looked at once.

    Parameters
    ----------
    blocks : iterable of pairs of arrays
        Rows (b, d) and their labels (b,), for instance of ``store.iter_blocks()``.
    classes : sequence
        All labels that will come.
    regularisations : sequence of float
        As in `RidgeHead`.

    Returns
    -------
    dict
        ``{regularisation: fitted RidgeHead}``.

    Raises
    ------
    EvaluationError
        When a label is not among the classes, there are fewer than two classes, or no rows.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.heads import stream_ridge
    >>> blocks = [(np.array([[0.0], [1.0]]), ["low", "low"]), (np.array([[2.0], [3.0]]), ["high", "high"])]
    >>> heads = stream_ridge(blocks, ["low", "high"], [0.1, 1.0])
    >>> heads[1.0].predict([[0.2], [2.8]]).tolist()
    ['low', 'high']
    """
    known = encode(np.asarray(classes))

    def coded() -> Iterator[tuple[Array, Array]]:
        for x, labels in blocks:
            codes = known.codes_of(np.asarray(labels))
            if (codes < 0).any():
                raise EvaluationError(
                    f"the label {np.asarray(labels)[codes < 0].tolist()[0]!r} is not among the classes"
                )
            yield np.asarray(x), Labels(known.classes, codes).signs()

    for regularisation in regularisations:
        _require(regularisation)
    equations = stream_equations(coded())
    return {
        regularisation: RidgeHead(regularisation)._adopt(equations, known.classes, False, np.float32)
        for regularisation in regularisations
    }


def ridge_sweep(
    x: Array,
    y: npt.ArrayLike,
    held_out: npt.NDArray[np.bool_],
    regularisations: Sequence[float],
    *,
    task: str = "class",
) -> dict[float, Array]:
    """Return the predictions for held-out rows of a ridge head for each regularisation, from one eigendecomposition.

    Parameters
    ----------
    x, y : arrays
        Rows, and labels, 0 and 1 of several labels, or numbers.
    held_out : array of bool of shape (n,)
        The rows to predict; the others are fitted to.
    regularisations : sequence of float
        As in `RidgeHead`.
    task : {"class", "multi-label", "regression"}, default "class"
        What `y` is.

    Returns
    -------
    dict
        ``{regularisation: predictions}``: labels (q,), scores (q, c) of several labels, or numbers.
    """
    targets = np.asarray(y)
    kept = np.flatnonzero(~held_out)
    queries = x[held_out]
    if task == "regression":
        numbers = equations_of(x[kept], targets[kept].reshape(len(kept), -1))
        found = {value: numbers.solve(value) for value in regularisations}
        shape = (-1, *targets.shape[1:])
        return {value: (queries @ weights.T + bias).reshape(shape) for value, (weights, bias) in found.items()}
    coded = encode(targets[kept])
    equations = equations_of(x[kept], coded.signs())
    answers: dict[float, list[Array]] = {value: [] for value in regularisations}
    heads = {
        value: RidgeHead(value)._adopt(equations, coded.classes, coded.several, x.dtype) for value in regularisations
    }
    for start in range(0, len(queries), ROWS):  # Each block once: rows may lie in a file.
        block = queries[start : start + ROWS]
        for value, head in heads.items():
            answers[value].append(head.decision_function(block) if coded.several else head.predict(block))
    return {value: np.concatenate(blocks) for value, blocks in answers.items()}


def _require(regularisation: float) -> None:
    if not regularisation >= 0:
        raise EvaluationError(f"regularisation must be at least 0; got {regularisation!r}")
