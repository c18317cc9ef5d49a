"""Heads: classifiers over embeddings, and the only user of scikit-learn's estimators.

A head sees rows of numbers and labels. Stores, splits and scores belong to `embedkit.evaluation`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from embedkit.errors import EvaluationError

Array = npt.NDArray[Any]

# One block of similarities has at most this many rows and columns: 16 MiB in float32, and large enough for BLAS.
QUERY_BLOCK = 256
GALLERY_BLOCK = 16384

# The best C of standardised embeddings lies between 1e-3 and 1e-1 for most data sets; small and few-shot ones need
# the upper decades, large ones the lowest.
C_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)


class WeightedKNN(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """k-nearest-neighbour classifier whose neighbours vote by similarity.

    Rows are scaled to unit length. Each of the k training rows of highest cosine similarity s votes ``exp(s / T)``
    for its class, and the class with the most votes wins. A row of zeros has similarity 0 to everything.

    Parameters
    ----------
    k : int, default 20
        Number of neighbours; all training rows vote when there are fewer. 20 is the best value of the DINO paper on
        ImageNet.
    temperature : float, default 0.07
        T above: the smaller it is, the more the nearest rows decide. 0.07 is DINO's value.

    Attributes
    ----------
    classes_ : array of shape (c,)
        The labels seen in `fit`, sorted.
    embeddings_ : array of shape (n, d)
        The training rows at unit length; float32 when they were given as float32.
    codes_ : array of shape (n,)
        Row i has the label ``classes_[codes_[i]]``.

    Notes
    -----
    The vote is that of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR
    2018, section 3.4, as used by Caron et al., "Emerging properties in self-supervised vision transformers", ICCV
    2021. Which of several equally similar rows takes the last of the k places is not specified.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.heads import WeightedKNN
    >>> head = WeightedKNN(k=2).fit(np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), ["cat", "cat", "dog"])
    >>> head.predict(np.array([[2.0, 0.1], [0.0, 3.0]])).tolist()
    ['cat', 'dog']
    """

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        self.k = k
        self.temperature = temperature

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> WeightedKNN:
        """Keep the training rows.

        Parameters
        ----------
        X : array of shape (n, d)
            Embeddings.
        y : array of shape (n,)
            Labels, numbers or names.

        Returns
        -------
        WeightedKNN
            This head.

        Raises
        ------
        EvaluationError
            When `k` is less than 1 or `temperature` is not above 0.
        ValueError
            When `X` is not a finite matrix, or `y` does not hold one class label a row.
        """
        if self.k < 1 or not self.temperature > 0:
            raise EvaluationError(
                f"k must be at least 1 and temperature above 0; got k={self.k!r}, temperature={self.temperature!r}"
            )
        # Numbers that are neither float32 nor float64 become the first of the list.
        rows, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(labels)
        self.classes_, self.codes_ = np.unique(labels, return_inverse=True)
        self.embeddings_ = normalize(rows)
        return self

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the label with the most votes for each row, as an array of shape (q,); ties go to the first class."""
        winners = [votes.argmax(axis=1) for votes in self._votes(X)]
        labels: Array = self.classes_[np.concatenate(winners)]
        return labels

    def predict_proba(self, X: npt.ArrayLike) -> Array:
        """Return each class's share of the votes, as an array of shape (q, c) whose rows sum to 1."""
        return np.concatenate([votes.astype(self.embeddings_.dtype) for votes in self._votes(X)])

    def _votes(self, X: npt.ArrayLike) -> Iterator[Array]:
        """Yield the shares of the votes for one block of queries after the other."""
        check_is_fitted(self)
        queries = validate_data(self, X, dtype=self.embeddings_.dtype, reset=False)
        classes = len(self.classes_)
        for start in range(0, len(queries), QUERY_BLOCK):
            scores, rows = self._neighbours(normalize(queries[start : start + QUERY_BLOCK]))
            # A common factor does not change the shares; without it, exp overflows at small temperatures.
            weights = np.exp((scores - scores.max(axis=1, keepdims=True)).astype(np.float64) / self.temperature)
            cells = np.arange(len(rows))[:, None] * classes + self.codes_[rows]
            votes = np.bincount(cells.ravel(), weights=weights.ravel(), minlength=len(rows) * classes)
            votes = votes.reshape(len(rows), classes)
            yield votes / votes.sum(axis=1, keepdims=True)

    def _neighbours(self, queries: Array) -> tuple[Array, Array]:
        """Return scores and rows of the k most similar training rows, both (q, k) and in no particular order."""
        scores = np.empty((len(queries), 0), dtype=queries.dtype)
        rows = np.empty((len(queries), 0), dtype=np.int64)
        for start in range(0, len(self.embeddings_), GALLERY_BLOCK):
            block = queries @ self.embeddings_[start : start + GALLERY_BLOCK].T
            best = _largest(block, self.k)
            scores = np.concatenate([scores, np.take_along_axis(block, best, axis=1)], axis=1)
            rows = np.concatenate([rows, best + start], axis=1)
            best = _largest(scores, self.k)
            scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
        return scores, rows


def _largest(values: Array, k: int) -> Array:
    """Return the columns of the k largest values of each row, or all columns when there are fewer."""
    columns = values.shape[1]
    k = min(k, columns)
    return np.argpartition(values, columns - k, axis=1)[:, columns - k :]


def logistic_regression(C: float, *, max_iter: int = 1000, warm_start: bool = False) -> Pipeline:
    """Return an unfitted linear head: standardisation, then logistic regression.

    Parameters
    ----------
    C : float
        Inverse strength of the L2 penalty, in scikit-learn's convention (it weighs the sum of the losses).
    max_iter : int, default 1000
        Limit on the L-BFGS iterations; scikit-learn's 100 is too few for weak penalties.
    warm_start : bool, default False
        Whether a further `fit` of the regression starts from the previous solution.

    Returns
    -------
    Pipeline
        With the steps "scaler" and "regression". The scaler keeps float32 as it is.

    Examples
    --------
    >>> from embedkit.heads import logistic_regression
    >>> head = logistic_regression(0.1).fit([[0.0], [1.0], [2.0], [3.0]], ["low", "low", "high", "high"])
    >>> head.predict([[0.2], [2.8]]).tolist()
    ['low', 'high']
    """
    regression = LogisticRegression(C=C, solver="lbfgs", max_iter=max_iter, warm_start=warm_start)
    return Pipeline([("scaler", StandardScaler()), ("regression", regression)])


def fit_logistic(
    x: Array,
    y: npt.ArrayLike,
    *,
    seed: int = 0,
    fraction: float = 0.2,
    C_grid: Sequence[float] = C_GRID,
    max_iter: int = 1000,
    progress: Callable[[str], None] | None = None,
) -> tuple[Pipeline, dict[str, Any]]:
    """Fit a linear head, choosing the strength of its penalty on held-out training rows.

    A stratified `fraction` of the rows is held out. The scaler and one regression for each C are fitted to the
    others; the C of the lowest log-loss on the held-out rows wins, the smaller one of equals. The head is then fitted
    anew to all rows. Log-loss rather than accuracy, because accuracy on a few hundred rows moves in steps of chance:
    over 20 held-out parts of one training set it chose C anywhere within 2.5 decades, log-loss the same C 19 times.

    Parameters
    ----------
    x : array of shape (n, d)
        Training embeddings, without missing values.
    y : array of shape (n,)
        Their labels, numbers or names.
    seed : int, default 0
        Draws the held-out rows.
    fraction : float, default 0.2
        Share of each class that is held out, but at least one row of each class with two or more. Classes of one row
        stay in the fitted part.
    C_grid : sequence of float, default ``(1e-4, 3e-4, 1e-3, ..., 100)``
        The values of C to try. The default spans what few-shot and million-image training sets ask for.
    max_iter : int, default 1000
        Limit on the iterations of every fit, as in `logistic_regression`.
    progress : callable, optional
        Called with one line of text for each C.

    Returns
    -------
    head : Pipeline
        As `logistic_regression` makes it, fitted to all rows.
    choice : dict
        "C": the chosen value; "C_losses": ``{C: log-loss on the held-out rows}``; "held_out_rows": their number;
        "converged": whether the final fit did, within its limit of iterations; "C_not_converged": the values of C
        whose tuning fit did not. Where every class has one row there is nothing to choose by: C is 1, "C_losses" is
        empty, and "note" says so.

    Raises
    ------
    EvaluationError
        When there are fewer than two classes, `fraction` is not between 0 and 1, or `C_grid` is empty or has values
        that are not above 0.

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
    grid = sorted({float(C) for C in C_grid})
    if not 0 < fraction < 1 or not grid or not grid[0] > 0:
        raise EvaluationError(
            f"fraction must lie between 0 and 1 and C_grid hold values above 0; got {fraction!r} and {tuple(C_grid)!r}"
        )
    if len(np.unique(labels)) < 2:
        raise EvaluationError("a classifier needs training rows of at least two classes")
    held_out = _held_out(labels, fraction, seed)
    choice: dict[str, Any] = {"C": 1.0, "C_losses": {}, "held_out_rows": int(held_out.sum()), "C_not_converged": []}
    if held_out.any():
        tuned = logistic_regression(grid[0], max_iter=max_iter, warm_start=True)
        choice.update(_tune(tuned, x, labels, held_out, grid, progress))
    else:
        choice["note"] = "every class has one training row, so none could be held out to choose C by; C is 1"
    head = logistic_regression(choice["C"], max_iter=max_iter)
    choice["converged"] = _fit(head, x, labels)
    return head, choice


def _held_out(labels: Array, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows to hold out: of each class its share, at least one row, never all of them."""
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shares = np.minimum(np.maximum(np.rint(fraction * counts), 1), counts - 1)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(codes[shuffled], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    mask = np.zeros(len(labels), dtype=np.bool_)
    mask[by_class] = rank < np.repeat(shares, counts)
    return mask


def _tune(
    head: Pipeline,
    x: Array,
    labels: Array,
    held_out: npt.NDArray[np.bool_],
    grid: Sequence[float],
    progress: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Return the held-out loss of every C of an ascending grid, and the C of the lowest."""
    regression = head["regression"]
    rows = head["scaler"].fit_transform(x[~held_out])
    queries = head["scaler"].transform(x[held_out])
    classes = np.unique(labels[~held_out])
    codes = np.searchsorted(classes, labels[held_out])
    losses: dict[float, float] = {}
    unconverged = []
    # Ascending, because the solution for a strong penalty is a good start for the next weaker one.
    for C in grid:
        regression.set_params(C=C)
        if not _fit(regression, rows, labels[~held_out]):
            unconverged.append(C)
        likelihoods = regression.predict_proba(queries)[np.arange(len(queries)), codes]
        # A row that a float32 probability of zero condemns counts as the least that float32 can tell from zero.
        losses[C] = float(-np.log(np.maximum(likelihoods.astype(np.float64), np.finfo(np.float32).tiny)).mean())
        if progress is not None:
            progress(f"C = {C:g}: log-loss {losses[C]:.4f} on {len(queries)} held-out training rows")
    # min returns the first of equals, which is the smallest C.
    return {"C": min(grid, key=losses.__getitem__), "C_losses": losses, "C_not_converged": unconverged}


def _fit(estimator: Any, x: Array, labels: Array) -> bool:
    """Fit, and return whether the solver converged instead of warning about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        estimator.fit(x, labels)
    others = [warning for warning in caught if not issubclass(warning.category, ConvergenceWarning)]
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return len(others) == len(caught)
