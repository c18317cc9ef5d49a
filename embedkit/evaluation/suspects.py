"""Suspects: labels that a classifier, fitted without them, contradicts with confidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.evaluation.columns import align_columns, short_name
from embedkit.evaluation.splits import Part
from embedkit.heads import fit_logistic, logistic_regression
from embedkit.heads.folding import assign_folds, hold_out
from embedkit.text import counted, printable

OTHERS = 5  # Classes of each row that may be its true one: the likeliest beside the given one.
HELD_OUT = 0.2
_BLOCK = 4096

Codes = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Suspect:
    """A label that is probably wrong.

    Parameters
    ----------
    id : str
        The image's id.
    given, suggested : str
        The class that it carries, and the class that the classifier sees.
    probability, given_probability : float
        What the classifier gives to the suggested class, and to the given one.
    """

    id: str
    given: str
    suggested: str
    probability: float
    given_probability: float


@dataclass(frozen=True, eq=False)
class Suspects:
    """The labels of a part that look wrong.

    Parameters
    ----------
    found : list of Suspect
        The most contradicted first: by falling difference of the two probabilities.
    contradictions : list of dict
        Files of the same bytes with different labels, ``{id: class}`` for each: at least one of them is wrong.
    small_classes : dict of str to int
        Classes with fewer rows than there are folds. Their labels are not judged.
    judged : int
        Rows that were judged.
    folds : int
        Folds of the cross-validation.
    C : float
        Penalty of the classifier.
    """

    found: list[Suspect]
    contradictions: list[dict[str, str]] = field(repr=False)
    small_classes: dict[str, int]
    judged: int
    folds: int
    C: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def to_text(self, shown: int = 20) -> str:
        """Return the first suspects as a table, with what else is wrong with the labels."""
        lines = [
            f"{len(self.found):,} of {counted(self.judged, 'label')} look wrong: a classifier fitted to the other "
            f"{self.folds - 1} of {self.folds} folds sees another class"
        ]
        table = [["given", "p", "suggested", "p", "image"]] * bool(self.found)
        table += [
            [short_name(one.given), f"{one.given_probability:.3f}", short_name(one.suggested),
             f"{one.probability:.3f}", printable(one.id)]
            for one in self.found[:shown]
        ]  # fmt: skip
        lines += align_columns(table, "<><><")
        lines += [f"... and {len(self.found) - shown:,} more"] * (len(self.found) > shown)
        for same in self.contradictions[:shown]:
            pairs = ", ".join(f"{printable(id)} ({printable(name)})" for id, name in list(same.items())[:5])
            lines.append(f"the same picture with different labels: {pairs}")
        if self.small_classes:
            some = [f"{printable(name)} ({rows})" for name, rows in list(self.small_classes.items())[:shown]]
            few = counted(len(self.small_classes), "class")
            lines.append(f"{few} with fewer than {self.folds} rows, not judged: {', '.join(some)}")
        return "\n".join(lines)


def find_suspects(
    part: Part,
    *,
    folds: int = 5,
    C: float | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Suspects:
    """Find labels that are probably wrong.

    Every row gets its probabilities from logistic regression that was fitted to the other folds, so that no label
    vouches for itself; files of the same bytes lie in one fold. A label is a suspect when another class is at least as
    probable as that class is, on average, for the rows that carry it, and more probable than the given one.

    Parameters
    ----------
    part : Part
        Rows with one class each.
    folds : int, default 5
        Folds of the cross-validation.
    C : float, optional
        Penalty of the classifier; by default chosen on held-out rows, as `embedkit.heads.fit_logistic` does.
    seed : int, default 0
        Draws the folds.
    progress : callable, optional
        Called with one line of text at each step.

    Returns
    -------
    Suspects
        A list to look at, not to delete: hard and rare pictures of a class are among them, and wrong labels of pictures
        that are unusual for their true class are not.

    Raises
    ------
    EvaluationError
        When the rows have several labels or numbers, fewer than two classes have as many rows as there are folds, or
        there are fewer than two folds.

    Notes
    -----
    The rule is that of confident learning: C. Northcutt, L. Jiang, I. Chuang, "Confident learning: estimating
    uncertainty in dataset labels", JAIR 70, 2021, section 3.1 (thresholds, the confident joint) and 3.2 (ranking by the
    normalised margin). Of more than five other classes, the five likeliest are looked at.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec, Store
    >>> from embedkit.evaluation.splits import whole_store
    >>> from embedkit.evaluation.suspects import find_suspects
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> names = ["cat", "dog"] * 10
    >>> x = np.array([[0, 1] if name == "cat" else [1, 0] for name in names])
    >>> names[4] = "dog"
    >>> with StoreWriter(f"{folder.name}/s.h5", spec) as writer:
    ...     writer.append(x, [f"{row:02}.jpg" for row in range(20)], labels=names)
    ...     writer.finalise()
    >>> suspects = find_suspects(whole_store(Store.open(f"{folder.name}/s.h5")), C=0.1)
    >>> [(one.id, one.given, one.suggested) for one in suspects.found]
    [('04.jpg', 'dog', 'cat')]
    >>> folder.cleanup()
    """
    if part.task != "class":
        raise EvaluationError(f"{part.store.path}: suspects need one class for each row, and these are {part.task}")
    if folds < 2:
        raise EvaluationError(f"suspects need at least two folds, got {folds}")
    classes, codes = np.unique(part.names, return_inverse=True)
    counts = np.bincount(codes)
    judged = counts >= folds
    if judged.sum() < 2:
        raise EvaluationError(
            f"{part.store.path}: {counted(int(judged.sum()), 'class')} of {len(classes)} with {folds} rows or more; "
            "to tell wrong labels from right ones, two are needed"
        )
    x, groups = part.embeddings(), part.groups()
    if C is None:
        held = hold_out(len(x), HELD_OUT, seed, strata=codes, groups=groups)
        C = float(fit_logistic(x, part.names, held_out=held, progress=progress)[1]["C"])
    fold_of = assign_folds(len(x), folds, seed, strata=codes, groups=groups)
    own, others, likely = _out_of_fold(x, codes, fold_of, folds, C, progress)
    # A class's threshold is how sure the classifier is of it where the label agrees that it is that class.
    sums = np.bincount(codes, weights=own)
    thresholds = np.where(judged, sums / counts, np.inf)
    confident = (likely >= thresholds[others]) & (others != codes[:, None])
    best = np.where(confident, likely, -1.0).argmax(axis=1)
    rows = np.arange(len(x))
    wrong = confident[rows, best] & (likely[rows, best] > own) & judged[codes]
    margins = likely[rows, best] - own
    order = np.flatnonzero(wrong)[np.argsort(-margins[wrong], kind="stable")]
    found = [
        Suspect(
            part.store.ids[part.rows[row]], str(classes[codes[row]]), str(classes[others[row, best[row]]]),
            float(likely[row, best[row]]), float(own[row]),
        )
        for row in order.tolist()
    ]  # fmt: skip
    small = small_classes(part.names, folds)
    return Suspects(found, _contradictions(part, groups), small, int(judged[codes].sum()), folds, C)


def small_classes(names: npt.NDArray[np.str_], least: int = 5) -> dict[str, int]:
    """Return the classes with too few rows to learn much from, and how many they have.

    Parameters
    ----------
    names : array of str of shape (n,)
        The class of each row.
    least : int, default 5
        How many rows are enough.

    Returns
    -------
    dict of str to int
        Sorted by name.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.evaluation.suspects import small_classes
    >>> small_classes(np.array(["cat"] * 9 + ["dog"]))
    {'dog': 1}
    """
    classes, counts = np.unique(names, return_counts=True)
    return {str(name): int(count) for name, count in zip(classes, counts, strict=True) if count < least}


def _out_of_fold(
    x: Values, codes: Codes, fold_of: Codes, folds: int, C: float, progress: Callable[[str], None] | None
) -> tuple[Values, Codes, Values]:
    """Return the probability of each row's own class, its likeliest classes, and their probabilities."""
    k = min(OTHERS + 1, int(codes.max()) + 1)  # The given class may be one of them.
    own = np.zeros(len(x), dtype=np.float32)
    others, likely = np.zeros((len(x), k), dtype=np.int64), np.zeros((len(x), k), dtype=np.float32)
    for fold in range(folds):
        out = np.flatnonzero(fold_of == fold)
        if progress is not None:
            progress(f"fold {fold + 1} of {folds}: judging {counted(len(out), 'label')}")
        kept = fold_of != fold
        head = logistic_regression(C).fit(x[kept], codes[kept])
        known = np.asarray(head.classes_)
        for start in range(0, len(out), _BLOCK):
            rows = out[start : start + _BLOCK]
            whole = np.zeros((len(rows), int(codes.max()) + 1), dtype=np.float32)
            whole[:, known] = head.predict_proba(x[rows])
            own[rows] = whole[np.arange(len(rows)), codes[rows]]
            top = np.argpartition(whole, whole.shape[1] - k, axis=1)[:, whole.shape[1] - k :]
            others[rows], likely[rows] = top, np.take_along_axis(whole, top, axis=1)
    return own, others, likely


def _contradictions(part: Part, groups: Codes | None) -> list[dict[str, str]]:
    """Return the files of the same bytes that carry different labels."""
    if groups is None:
        return []
    same: dict[int, list[int]] = {}
    shared = np.flatnonzero(np.bincount(groups, minlength=1)[groups] > 1)
    for position in shared.tolist():
        same.setdefault(int(groups[position]), []).append(position)
    return [
        {part.store.ids[part.rows[position]]: str(part.names[position]) for position in positions}
        for positions in same.values()
        if len({part.names[position] for position in positions}) > 1
    ]
