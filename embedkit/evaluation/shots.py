"""Shots: a few training rows of each class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def draw_shots(names: npt.NDArray[np.str_], shots: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the rows of a few-shot training set.

    Parameters
    ----------
    names : array of str of shape (n,)
        Class of each training row.
    shots : int
        Rows of each class; all of them where a class has fewer.
    seed : int
        Draws the rows. With one seed, the rows of fewer shots are among those of more.

    Returns
    -------
    array of int of shape (at most shots * c,)
        Ascending row numbers.

    Notes
    -----
    As big_vision's ``evaluators/fewshot_lsr.py`` draws them: ``numpy.random.default_rng(seed).permutation`` of each
    class in turn. With its order of the training rows, these are its rows.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.shots import draw_shots
    >>> names = np.array(["cat", "dog", "cat", "dog", "cat", "emu"])
    >>> names[draw_shots(names, 2, seed=0)].tolist().count("cat")
    2
    >>> set(draw_shots(names, 1, seed=0)) <= set(draw_shots(names, 2, seed=0))
    True
    """
    generator = np.random.default_rng(seed)
    _, codes, counts = np.unique(names, return_inverse=True, return_counts=True)
    of_classes = np.split(np.argsort(codes, kind="stable"), np.cumsum(counts)[:-1])
    return np.sort(np.concatenate([generator.permutation(rows)[:shots] for rows in of_classes]))
