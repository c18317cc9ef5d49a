"""Linear heads of scikit-learn on standardised embeddings."""

from __future__ import annotations

from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC


def linear_svm(C: float = 0.01, *, max_iter: int = 5000, random_state: int = 0) -> Pipeline:
    """Return an unfitted linear support vector machine, one class against the rest.

    Parameters
    ----------
    C : float, default 0.01
        Inverse strength of the L2 penalty; it weighs the sum of the squared hinge losses.
    max_iter : int, default 5000
        Limit on the passes of its solver, liblinear, which works in float64.
    random_state : int, default 0
        Draws the order in which the solver takes the rows.

    Returns
    -------
    Pipeline
        With the steps "scaler" and "svm".

    Examples
    --------
    >>> from embedkit.heads import linear_svm
    >>> linear_svm().fit([[0.0], [1.0], [2.0], [3.0]], ["low", "low", "high", "high"]).predict([[0.2]]).tolist()
    ['low']
    """
    svm = LinearSVC(C=C, max_iter=max_iter, random_state=random_state, dual="auto")
    return Pipeline([("scaler", StandardScaler()), ("svm", svm)])


def discriminant_analysis(shrinkage: float | str | None = 0.1) -> Pipeline:
    """Return an unfitted linear discriminant analysis: classes are normal clouds of one covariance.

    Parameters
    ----------
    shrinkage : float, "auto" or None, default 0.1
        Share of the identity in the covariance; "auto" is Ledoit and Wolf's.

    Returns
    -------
    Pipeline
        With the steps "scaler" and "lda".

    Examples
    --------
    >>> from embedkit.heads import discriminant_analysis
    >>> discriminant_analysis().fit([[0.0], [1.0], [2.0], [3.0]], list("aabb")).predict([[0.2]]).tolist()
    ['a']
    """
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    return Pipeline([("scaler", StandardScaler()), ("lda", lda)])
