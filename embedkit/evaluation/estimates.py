"""Estimates: how much memory a head needs, said before the run when the machine has less."""

from __future__ import annotations

import logging

from embedkit.evaluation.streaming import STREAMED
from embedkit.machine import available_memory

log = logging.getLogger("embedkit")

# Bytes for each number of the training matrix, beside the 4 of the matrix itself. Logistic regression keeps the rows
# once more in the coordinates in which it solves, k-NN at length 1. LIBLINEAR takes float64 and writes a sparse copy of
# 16 bytes a number. Linear discriminants and their covariances are computed in float64. Ridge regression and class
# means go through the rows in blocks: where these are many, `embedkit.evaluation.streaming` leaves them in the store.
_COPIES = {"logistic": 4, "knn": 4, "mlp": 4, "svm": 24, "lda": 16, "ridge": 0, "mean": 0}
_BLOCK = 8192  # Rows that are worked on at a time.
_PAIRS = 20  # Of steps and gradients that L-BFGS remembers.


def estimate_memory(n: int, d: int, c: int, *, head: str = "logistic", tested: int = 0, streamed: bool = False) -> int:
    """Estimate the memory that fitting and scoring a head takes at its peak.

    Parameters
    ----------
    n, d, c : int
        Training rows, width of the embeddings, classes.
    head : str, default "logistic"
        One of `embedkit.heads.HEADS`. Another estimator is taken to make one float64 copy of its matrix.
    tested : int, default 0
        Test rows.
    streamed : bool, default False
        Whether the training rows stay in their store.

    Returns
    -------
    int
        Bytes, beside what Python and torch take by themselves.

    Examples
    --------
    >>> from embedkit.evaluation.estimates import estimate_memory
    >>> round(estimate_memory(1_000_000, 768, 1000, tested=50_000) / 1e9, 1)
    6.8
    """
    matrices = (0 if streamed else 4 + _COPIES.get(head, 8)) * n * d + 4 * tested * (d + c)
    blocks = 2 * 4 * min(n, _BLOCK) * (d + c)
    square = 3 * 8 * min(n, d) ** 2 if head in ("logistic", "ridge", "lda") else 0
    weights = 4 * (d + 1) * c * (2 * _PAIRS + 6 if head == "logistic" else 4)
    return matrices + blocks + square + weights


def warn_of_memory(
    n: int,
    d: int,
    c: int,
    *,
    head: str = "logistic",
    tested: int = 0,
    streamed: bool = False,
    available: int | None = None,
) -> bool:
    """Warn when a head needs more memory than there is, with what helps.

    Parameters
    ----------
    n, d, c, head, tested, streamed
        As in `estimate_memory`.
    available : int, optional
        Bytes that may be taken; by default what the system says.

    Returns
    -------
    bool
        Whether it needs more. False where the system does not say what there is.
    """
    free = available_memory() if available is None else available
    needed = estimate_memory(n, d, c, head=head, tested=tested, streamed=streamed)
    if free is None or needed <= free:
        return False
    helps = ["fewer rows (embedkit select, --shots)", "a narrower layer"]
    lean = (estimate_memory(n, d, c, head=name, tested=tested, streamed=True) for name in STREAMED)
    if head not in STREAMED and max(lean) <= free:
        helps.insert(0, "--head ridge or --head mean, which leave the rows of one training part in the store")
    log.warning(
        "%s rows x %s with %s classes need about %.1f GB of memory for the head %s, and %.1f GB are available: this "
        "may be very slow, or be ended by the system; what helps: %s",
        f"{n:,}", f"{d:,}", f"{c:,}", needed / 1e9, head, free / 1e9, ", ".join(helps),
    )  # fmt: skip
    return True
