"""Comparing: whether two reports on the same test rows differ by more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr

from embedkit.errors import EvaluationError
from embedkit.evaluation.columns import align_columns, short_name
from embedkit.evaluation.intervals import resampled
from embedkit.evaluation.metrics import r2, weighted_average_precision
from embedkit.evaluation.reports import Report

LEVEL = 0.95
RESAMPLES = 10_000
COSTLY_RESAMPLES = 1000  # Of a metric that every resample computes anew.
MATRIX_REPORTS = 12  # A matrix of more pairs no longer fits a screen.

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """The difference between two reports on the same test rows.

    Parameters
    ----------
    metric : str
        What is compared: "top1", "mAP" or "r2".
    difference : float
        The first report's metric minus the second's.
    interval : list of float
        Its paired bootstrap interval over the test rows.
    p_value : float
        How often so large a difference comes about by chance where there is none.
    test : str
        Which test says so.
    rows : int
        Number of test rows.
    adjusted_p_value : float
        The p-value after correcting for all comparisons that were made; `p_value` where it was the only one.
    real : bool
        Whether `adjusted_p_value` is below one minus the level.
    """

    metric: str
    difference: float
    interval: list[float]
    p_value: float
    test: str
    rows: int
    adjusted_p_value: float
    real: bool


def compare(a: Report, b: Report, *, level: float = LEVEL, seed: int = 0) -> Comparison:
    """Compare two reports on the same test rows.

    Both heads saw the same pictures, so the difference is known better than either number: only the rows on which the
    two disagree count. It covers another draw of test rows, not of training rows.

    Parameters
    ----------
    a, b : Report
        With their predictions. The rows are matched by id, in any order.
    level : float, default 0.95
        Of the interval, and one minus the chance at which a difference is called real.
    seed : int, default 0
        Draws the resamples.

    Returns
    -------
    Comparison
        The difference `a` minus `b`.

    Raises
    ------
    EvaluationError
        When the reports are on other rows, labels or tasks, or come without predictions.

    Notes
    -----
    Accuracy: McNemar's test in its exact, binomial form (Dietterich, "Approximate statistical tests for comparing
    supervised classification learning algorithms", 1998). Few-shot accuracy, the mean over seeds, and R2, by its
    squared errors: the sign-flip permutation test. mAP: the paired bootstrap, twice the share of resamples on the
    other side of zero.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation import Report, compare
    >>> ids, true = np.arange(40).astype(str), np.zeros(40, dtype=int)
    >>> def report(wrong):
    ...     predicted = (np.arange(40) < wrong).astype(int)
    ...     arrays = {"ids": ids, "true": true, "predicted": predicted, "correct": predicted == true}
    ...     return Report({"top1": 1 - wrong / 40}, {}, {}, ["cat", "dog"], arrays)
    >>> compare(report(2), report(14)).real, compare(report(2), report(5)).p_value
    (True, 0.25)
    """
    left, right = _matched(a, b)
    n = len(left["ids"])
    if a.task == "multi-label":
        found = _by_average_precision(left, right, seed)
    elif a.task == "regression":
        found = _by_errors(left, right, seed)
    elif left["correct"].dtype == right["correct"].dtype == np.bool_:
        found = _by_disagreement(left["correct"], right["correct"], seed)
    else:
        found = _by_shares(left["correct"], right["correct"], seed)
    difference, draws, p_value, test = found
    draws = draws[np.isfinite(draws)]
    tail = (1 - level) / 2
    interval = [float(bound) for bound in np.quantile(draws, [tail, 1 - tail])]
    return Comparison(
        a.headline[0], difference, interval, p_value, test, n, adjusted_p_value=p_value, real=p_value < 1 - level
    )


def compare_all(
    reports: Mapping[str, Report], *, level: float = LEVEL, seed: int = 0
) -> dict[tuple[str, str], Comparison]:
    """Compare every two of several reports, and correct for the number of comparisons.

    Parameters
    ----------
    reports : mapping of str to Report
        Reports on the same test rows by their names.
    level, seed
        As in `compare`. All differences that are called real are so together with this certainty.

    Returns
    -------
    dict of (str, str) to Comparison
        One for each pair of names, in the order of `reports`.

    Notes
    -----
    Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    pairs = list(combinations(reports, 2))
    found = [compare(reports[left], reports[right], level=level, seed=seed) for left, right in pairs]
    adjusted = adjust([one.p_value for one in found])
    return {
        pair: replace(one, adjusted_p_value=p_value, real=p_value < 1 - level)
        for pair, one, p_value in zip(pairs, found, adjusted, strict=True)
    }


def adjust(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's procedure, in the given order.

    Examples
    --------
    >>> from embedkit.evaluation.comparing import adjust
    >>> adjust([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    stepped = np.array(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1) if len(order) else []
    return [float(value) for value in adjusted]


def comparison_table(reports: Mapping[str, Report], *, level: float = LEVEL, seed: int = 0) -> str:
    """Return a text that ranks reports on the same test rows and says which differences are real.

    Parameters
    ----------
    reports, level, seed
        As in `compare_all`.

    Returns
    -------
    str
        A table, best first, with the difference of each to the best, and a matrix of all differences where they are
        few. ``*`` marks a difference that is real at the level, after Holm's correction for all pairs.
    """
    ranked = sorted(reports, key=lambda name: -reports[name].headline[1])
    ordered = {name: reports[name] for name in ranked}
    found = compare_all(ordered, level=level, seed=seed)
    metric = ordered[ranked[0]].headline[0]
    rows = [["", metric, f"{100 * level:g} % interval", "to the best", "interval", "p (Holm)", ""]]
    for name in ranked:
        _, value, (low, high) = ordered[name].headline
        cells = [short_name(name), f"{value:.4f}", f"[{low:.4f}, {high:.4f}]"]
        if name == ranked[0]:
            rows.append([*cells, "", "", "", ""])
            continue
        one = found[ranked[0], name]
        low, high = 0 - one.interval[1], 0 - one.interval[0]
        mark = "*" if one.real else ""
        rows.append(
            [*cells, f"{0 - one.difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]", f"{one.adjusted_p_value:.2g}", mark]
        )
    lines = align_columns(rows, "<><><><")
    if 2 < len(ranked) <= MATRIX_REPORTS:
        lines += ["", *_matrix(ranked, found)]
    count, real = len(found), sum(one.real for one in found.values())
    tests = ", ".join(sorted({one.test for one in found.values()}))
    if found:
        lines += ["", f"* real at {100 * level:g} %: {real} of {count} differences ({tests}, corrected by Holm)"]
    return "\n".join(lines) + "\n"


def _matrix(ranked: Sequence[str], found: Mapping[tuple[str, str], Comparison]) -> list[str]:
    """Return the differences of every two, the row's minus the column's, as lines."""
    rows = [["", "", *(str(number) for number in range(1, len(ranked) + 1))]]
    for number, name in enumerate(ranked, 1):
        cells = []
        for other in ranked:
            one = found.get((other, name))
            # A blank in place of the mark keeps the digits below each other.
            cells.append("." if one is None else f"{0 - one.difference:+.4f}{'*' if one.real else ' '}")
        rows.append([short_name(name), str(number), *cells])
    return align_columns(rows, "<>" + ">" * len(ranked))


def _matched(a: Report, b: Report) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the predictions of both, those of the second in the first's order of rows."""
    for report in (a, b):
        if "ids" not in report.predictions:
            raise EvaluationError("a report without predictions cannot be compared; keep its predictions with it")
    if a.task != b.task:
        raise EvaluationError(f"a report on {a.task} cannot be compared with one on {b.task}")
    left, right = a.predictions, b.predictions
    places = {id: row for row, id in enumerate(right["ids"].tolist())}
    ids = left["ids"].tolist()
    missing = [id for id in ids if id not in places]
    if missing or len(places) != len(ids):
        raise EvaluationError(
            f"the reports are on other test rows: {len(ids)} and {len(places)}, of which {len(ids) - len(missing)} "
            "have the same id; probe both on the same ones"
        )
    order = np.array([places[id] for id in ids], dtype=np.int64)
    right = {name: values[order] for name, values in right.items() if len(values) == len(order)}
    if a.task == "class":
        same = np.array(a.classes)[left["true"]] == np.array(b.classes)[right["true"]]
    elif a.task == "multi-label" and a.classes != b.classes:
        same = np.zeros(len(order), dtype=np.bool_)
    else:
        same = np.all(left["true"].reshape(len(ids), -1) == right["true"].reshape(len(ids), -1), axis=1)
    if not same.all():
        raise EvaluationError(f"{int((~same).sum())} test rows have other labels in the one report than in the other")
    return left, right


def _by_disagreement(left: npt.NDArray[np.bool_], right: npt.NDArray[np.bool_], seed: int) -> Any:
    """Compare two accuracies by the rows on which the two disagree."""
    n, won, lost = len(left), int((left & ~right).sum()), int((~left & right).sum())
    p_value = min(1.0, 2 * float(bdtr(min(won, lost), won + lost, 0.5))) if won + lost else 1.0
    chances = [won / n, lost / n, 1 - (won + lost) / n]
    drawn = np.random.default_rng(seed).multinomial(n, chances, size=RESAMPLES)
    return (won - lost) / n, (drawn[:, 0] - drawn[:, 1]) / n, p_value, "McNemar's exact test"


def _by_shares(left: npt.NDArray[Any], right: npt.NDArray[Any], seed: int) -> Any:
    """Compare two means over seeds."""
    gains = left.astype(np.float64) - right.astype(np.float64)
    draws = resampled(lambda weights: weights @ gains / len(gains), len(gains), seed=seed, resamples=RESAMPLES)
    return float(gains.mean()), draws, _sign_flip(gains, seed), "sign-flip test"


def _by_errors(left: dict[str, Any], right: dict[str, Any], seed: int) -> Any:
    """Compare two coefficients of determination; on the same rows they differ as the squared errors do."""
    true = left["true"]
    gains = np.square(right["predicted"] - true) - np.square(left["predicted"] - true)

    def difference(weights: Floats) -> Floats:
        found: Floats = r2(true, left["predicted"], weights) - r2(true, right["predicted"], weights)
        return found

    draws = resampled(difference, len(true), seed=seed, resamples=COSTLY_RESAMPLES)
    whole = r2(true, left["predicted"]) - r2(true, right["predicted"])
    return whole, draws, _sign_flip(gains, seed), "sign-flip test"


def _by_average_precision(left: dict[str, Any], right: dict[str, Any], seed: int) -> Any:
    """Compare two mAPs by resampling the rows."""
    true = left["true"]
    held = [column for column in range(true.shape[1]) if true[:, column].any()]

    def difference(weights: Floats) -> Floats:
        gains = [
            weighted_average_precision(true[:, one], left["scores"][:, one], weights)
            - weighted_average_precision(true[:, one], right["scores"][:, one], weights)
            for one in held
        ]
        # A resample without any row of a class leaves that class out.
        found = np.stack(gains)
        present = np.isfinite(found)
        means: Floats = np.where(present, found, 0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)
        return means

    draws = resampled(difference, len(true), seed=seed, resamples=COSTLY_RESAMPLES)
    whole = float(difference(np.ones((1, len(true))))[0])
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return whole, draws, min(1.0, 2 * (beyond + 1) / (len(draws) + 1)), "paired bootstrap"


def _sign_flip(gains: Floats, seed: int) -> float:
    """Return how often random signs make the mean of paired differences as large as it is."""
    gains = gains[gains != 0]
    if not len(gains):
        return 1.0
    generator = np.random.default_rng(seed)
    reached, least = 0, abs(gains.sum()) * (1 - 1e-12)
    at_once = max(1, 4_000_000 // len(gains))
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        signs = generator.integers(0, 2, size=(count, len(gains)), dtype=np.int8) * 2.0 - 1
        reached += int((np.abs(signs @ gains) >= least).sum())
    return (reached + 1) / (RESAMPLES + 1)
