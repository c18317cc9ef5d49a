"""Plain: scikit-learn's own estimators, for recipes that name them."""

from __future__ import annotations

from sklearn.linear_model import LogisticRegression


def plain_logistic(C: float = 1.0, *, max_iter: int = 100) -> LogisticRegression:
    """Return scikit-learn's unfitted logistic regression.

    Where a recipe stops after few steps, its numbers are those of the solver's path and not of the solution, and only
    the same solver gives them.

    Parameters
    ----------
    C : float, default 1.0
        Inverse strength of the L2 penalty.
    max_iter : int, default 100
        Limit on the L-BFGS iterations.

    Returns
    -------
    LogisticRegression

    Examples
    --------
    >>> from embedkit.heads.plain import plain_logistic
    >>> head = plain_logistic().fit([[0.0], [1.0], [2.0], [3.0]], ["low", "low", "high", "high"])
    >>> head.predict([[0.2], [2.8]]).tolist()
    ['low', 'high']
    """
    return LogisticRegression(C=C, solver="lbfgs", max_iter=max_iter)
