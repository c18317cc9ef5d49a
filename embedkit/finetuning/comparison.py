"""Comparison: what fine-tuning bought, on images that nothing was learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import FinetuneError
from embedkit.evaluation.columns import align_columns, short_name
from embedkit.evaluation.comparing import LEVEL, adjust, compare
from embedkit.evaluation.probing import probe
from embedkit.evaluation.reports import Report
from embedkit.index.ranking import first_rows, ranked_metrics
from embedkit.store import Store
from embedkit.text import counted, printable, say_nothing

BLOCK_BYTES = 64 << 20  # Of the scores of a block of queries.

# What each measure is, for whoever reads the table.
MEANINGS = {
    "classifier": "a linear probe on the frozen backbone, and the network with its trained head",
    "linear probe": "a linear probe on the embeddings of either",
    "k-NN": "k-NN among the training images, by the embeddings of either",
    "recall@1": "whether the nearest other image of the part is of the same class",
    "mAP@R": "how far up the other images of the same class stand in the part",
}

Codes = npt.NDArray[np.int64]
Values = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Change:
    """One measure before and after.

    Parameters
    ----------
    name : str
        One of `MEANINGS`.
    before, after : float
        Fractions in [0, 1].
    interval : list of float
        Paired 95 % interval of ``after - before``, over the images.
    p_value, adjusted_p_value : float
        How often chance alone makes such a difference; the latter corrected for the number of measures, by Holm.
    test : str
        Which paired test says so.
    rows : int
        Number of images.
    """

    name: str
    before: float
    after: float
    interval: list[float]
    p_value: float
    adjusted_p_value: float
    test: str
    rows: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Change:
        """Return a change of JSON values; whatever is of another type is an error."""
        low, high = values["interval"]
        return cls(
            str(values["name"]), float(values["before"]), float(values["after"]), [float(low), float(high)],
            float(values["p_value"]), float(values["adjusted_p_value"]), str(values["test"]), int(values["rows"]),
        )  # fmt: skip

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def real(self) -> bool:
        """Whether the difference is larger than chance, at 95 % for all measures together."""
        return self.adjusted_p_value < 1 - LEVEL


@dataclass(frozen=True, eq=False)
class BeforeAfter:
    """What fine-tuning changed.

    Parameters
    ----------
    changes : list of Change
        One for each measure.
    part : str
        Which part of the split was compared on.
    chosen_on : bool
        Whether the best epoch was chosen on the same images.
    before, after : Report, optional
        The classifiers: a probe on the frozen backbone, and the trained network.
    """

    changes: list[Change]
    part: str
    chosen_on: bool
    before: Report | None = field(default=None, repr=False)
    after: Report | None = field(default=None, repr=False)

    @property
    def verdict(self) -> str:
        """What came of it, in a sentence."""
        rose = [change.name for change in self.changes if change.real and change.difference > 0]
        fell = [change.name for change in self.changes if change.real and change.difference < 0]
        same = [change.name for change in self.changes if not change.real]
        found = [f"{', '.join(names)} {what}" for names, what in ((rose, "rose"), (fell, "fell")) if names]
        rest = f"; {', '.join(same)}: no difference larger than chance" if same else ""
        if not found:
            return f"fine-tuning did not help{rest}"
        how = "did harm" if not rose else "helped in part" if fell or same else "helped"
        return f"fine-tuning {how}: {', '.join(found)}{rest}"

    @property
    def caveat(self) -> str:
        """On which images it was compared, and what else they were used for."""
        rows = counted(max((change.rows for change in self.changes), default=0), "image")
        if self.chosen_on:
            return f"{rows} of {self.part}, on which the best epoch was chosen too: that flatters what is after"
        return f"{rows} of {self.part}, which nothing was chosen on"

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        changes = [asdict(change) | {"difference": change.difference, "real": change.real} for change in self.changes]
        return {
            "verdict": self.verdict, "part": self.part, "chosen_on": self.chosen_on, "caveat": self.caveat,
            "changes": changes,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BeforeAfter:
        """Return what `to_dict` wrote, without the reports.

        Raises
        ------
        FinetuneError
            When values are missing or of another type. They may come from a stranger.
        """
        try:
            changes = [Change.from_dict(one) for one in values["changes"]]
            return cls(changes, str(values["part"]), bool(values["chosen_on"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FinetuneError(f"this is not the comparison of a run: {error!r}") from error

    def to_text(self) -> str:
        """Return the comparison as plain text for a terminal."""
        rows = [["", "before", "after", "difference", "95 % interval", "p (Holm)", ""]]
        for change in self.changes:
            low, high = change.interval
            rows.append([
                short_name(change.name), f"{change.before:.4f}", f"{change.after:.4f}", f"{change.difference:+.4f}",
                f"[{low:+.4f}, {high:+.4f}]", f"{change.adjusted_p_value:.2g}", "*" if change.real else "",
            ])  # fmt: skip
        said = [printable(self.verdict), printable(self.caveat)]
        return "\n".join([*align_columns(rows, "<>>><><"), "", *said]) + "\n"


def compare_stores(
    before: Store,
    after: Store | None,
    split: str,
    names: tuple[str, str, str],
    *,
    trained: Report | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> BeforeAfter:
    """Compare two backbones by the stores that they made of the same images.

    Parameters
    ----------
    before, after : Store
        Of the frozen backbone and of the trained one; without the latter, only the classifiers are compared.
    split : str
        Path of the split file, with labels.
    names : tuple of str
        The parts that were trained on, chosen on, and that are compared on.
    trained : Report, optional
        What the trained network itself says about the part that is compared on; see `classifier_report`.
    seed : int, default 0
        Of the probes and the bootstrap.
    progress : callable, optional
        Called with one line of text at each step.

    Returns
    -------
    BeforeAfter
        Every difference has a paired test, since both sides are measured on the same images.
    """
    say = progress or say_nothing
    train, val, test = names
    say(f"comparing on {test}: probe before")
    frozen = probe(before, split=split, train_split=train, test_split=test, seed=seed)
    again = None
    if after is not None:
        say(f"comparing on {test}: probe after")
        again = probe(after, split=split, train_split=train, test_split=test, seed=seed)
    # An image may be there before the training and not after it: whatever is compared is so on those that all saw.
    left, *others = _among([report for report in (frozen, trained, again) if report is not None])
    pairs: dict[str, tuple[Report, Report]] = {}
    if trained is not None:
        pairs["classifier"] = left, others[0]
    if after is not None:
        pairs["linear probe"] = left, others[-1]
        pairs["k-NN"] = _neighbours(left), _neighbours(others[-1])
        found = [_retrieval(store, left) for store in (before, after)]
        pairs |= {name: (found[0][name], found[1][name]) for name in found[0]}
    raw = {name: compare(new, old, seed=seed) for name, (old, new) in pairs.items()}
    adjusted = adjust([one.p_value for one in raw.values()])
    changes = [
        Change(
            name, _top1(pairs[name][0]), _top1(pairs[name][1]), one.interval, one.p_value, p_value, one.test, one.rows
        )
        for (name, one), p_value in zip(raw.items(), adjusted, strict=True)
    ]
    return BeforeAfter(changes, test, chosen_on=test == val, before=frozen, after=trained)


def classifier_report(
    ids: list[str], true: Codes, scores: npt.NDArray[np.floating[Any]], classes: list[str], *, seed: int = 0
) -> Report:
    """Return what a classifier says about images, as a probe reports it.

    Parameters
    ----------
    ids : list of str
        Of the n images.
    true : array of int of shape (n,)
        Class codes.
    scores : array of shape (n, c)
        Probabilities of the classes.
    classes : list of str
        Names of the c classes.
    seed : int, default 0
        Of the bootstrap.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.finetuning.comparison import classifier_report
    >>> report = classifier_report(["a", "b"], np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]), ["cat", "dog"])
    >>> report.metrics["top1"], report.metrics["confusion"]
    (0.5, [[1, 0], [1, 0]])
    """
    from embedkit.evaluation.metrics import rank_of_true
    from embedkit.evaluation.scoring import score_classes

    predicted = scores.argmax(axis=1).astype(np.int64)
    found: Values = {
        "true": true, "predicted": predicted, "correct": predicted == true,
        "confidence": scores[np.arange(len(scores)), predicted].astype(np.float32),
        "rank": rank_of_true(scores, true),
    }  # fmt: skip
    metrics = score_classes(found, classes, seed=seed)
    return Report(metrics, {"task": "class", "seed": seed}, {}, classes, {"ids": np.array(ids), **found})


def retrieval_within(x: npt.NDArray[np.float32], codes: Codes) -> Values:
    """Return how each row finds the others of its class among all others, by cosine.

    Parameters
    ----------
    x : array of shape (n, d)
        Embeddings.
    codes : array of int of shape (n,)
        Class codes.

    Returns
    -------
    dict of str to array
        "rows" of shape (m,): those whose class has another row; "recall@1" and "mAP@R" of shape (m,), as
        `embedkit.index.ranking.ranked_metrics` says.
    """
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit = (x / np.where(norms > 0, norms, 1)).astype(np.float32)
    counts = np.bincount(codes)[codes] - 1
    rows = np.flatnonzero(counts > 0)
    size = max(1, BLOCK_BYTES // (4 * max(1, len(x))))
    parts: list[Values] = []
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        scores = unit[block] @ unit.T
        scores[np.arange(len(block)), block] = -np.inf
        found = first_rows(scores, int(counts[block].max()))
        relevant = (codes[found] == codes[block][:, None]) & (found != block[:, None])
        first = np.where(relevant.any(axis=1), relevant.argmax(axis=1) + 1.0, np.inf)
        parts.append(ranked_metrics(relevant, counts[block], first, [1]))
    return {"rows": rows} | {
        name: np.concatenate([part[name] for part in parts] or [np.empty(0)]) for name in ("recall@1", "mAP@R")
    }


def _among(reports: Sequence[Report]) -> list[Report]:
    """Return reports on the images that all of them are on."""
    shared = set.intersection(*(set(report.predictions["ids"].tolist()) for report in reports))
    if not shared:
        raise FinetuneError("no image that is compared on could be read both before the training and after it")
    found = []
    for report in reports:
        ids = report.predictions["ids"].tolist()
        if len(ids) > len(shared):
            rows = np.flatnonzero([id in shared for id in ids])
            arrays = {name: array[rows] for name, array in report.predictions.items() if len(array) == len(ids)}
            report = replace(report, metrics={"top1": float(arrays["correct"].mean())}, predictions=arrays)
        found.append(report)
    return found


def _neighbours(report: Report) -> Report:
    """Return what the k-NN of a default probe said, as a report of its own."""
    found = report.predictions
    return _report(report, np.arange(len(found["ids"])), found["knn"] == found["true"])


def _retrieval(store: Store, report: Report) -> dict[str, Report]:
    """Return how the images of a report find each other in a store, as reports."""
    ids = report.predictions["ids"].tolist()
    found = retrieval_within(store.rows(ids=ids), report.predictions["true"].astype(np.int64))
    if not len(found["rows"]):
        return {}
    hit = found["recall@1"] > 0
    return {
        "recall@1": _report(report, found["rows"], hit),
        "mAP@R": _report(report, found["rows"], found["mAP@R"]),
    }


def _report(report: Report, rows: Codes, correct: npt.NDArray[Any]) -> Report:
    """Return another measure on some images of a report, so that `compare` pairs them."""
    arrays = {name: report.predictions[name][rows] for name in ("ids", "true")}
    metrics = {"top1": float(correct.mean())}
    return Report(metrics, {"task": "class"}, {}, report.classes, {**arrays, "correct": correct})


def _top1(report: Report) -> float:
    return float(report.metrics["top1"])
