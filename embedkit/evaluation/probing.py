"""Probing: frozen embeddings scored by a linear head and by their nearest neighbours."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.evaluation.intervals import bootstrap_interval
from embedkit.evaluation.metrics import class_accuracies, confusion_matrix
from embedkit.evaluation.reports import Report
from embedkit.evaluation.splits import Part, Split, split_store, whole_store
from embedkit.heads import C_GRID, WeightedKNN, fit_logistic
from embedkit.store import Store

# Beyond this, the matrix would outweigh the embeddings, and nobody reads a JSON file of it.
CONFUSION_CLASSES = 2000

Progress = Callable[[str], None]
StoreLike = Store | str | os.PathLike[str]


@dataclass(frozen=True)
class Protocol:
    """The choices that make two probes comparable.

    Parameters
    ----------
    C_grid : tuple of float
        Penalties of the linear head to choose from.
    fraction : float
        Share of the training rows on which they are compared.
    k, temperature
        Of the k-NN head.
    """

    C_grid: tuple[float, ...] = C_GRID
    fraction: float = 0.2
    k: int = 20
    temperature: float = 0.07


PROTOCOLS = {"default": Protocol()}


def probe(
    train: StoreLike,
    test: StoreLike | None = None,
    *,
    split: str | os.PathLike[str] | None = None,
    protocol: str = "default",
    seed: int = 0,
    train_split: str = "train",
    test_split: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure how well a class can be read off frozen embeddings.

    Two heads are fitted to the training rows and scored on the test rows: logistic regression on standardised
    embeddings, its penalty chosen on held-out training rows, and DINO's weighted k-NN. Test rows influence nothing
    but the score.

    Parameters
    ----------
    train : Store or path-like
        The store to train on; with `split`, the store of both parts.
    test : Store or path-like, optional
        The store to test on. Classes are matched by name.
    split : path-like, optional
        Instead of `test`: a CSV file with the columns path (an id of the store) and split, and optionally label, which
        then wins over the store's labels.
    protocol : str, default "default"
        Name of one of `PROTOCOLS`.
    seed : int, default 0
        Draws the held-out rows and the bootstrap.
    train_split : str, default "train"
        Which part of the split file to train on.
    test_split : str, optional
        Which part to test on; by default the first of test, val and validation that the file has.
    progress : callable, optional
        Called with one line of text at each step.

    Returns
    -------
    Report
        Metrics, parameters, inputs, and the fitted linear head.

    Raises
    ------
    EvaluationError
        When labels, rows or files are missing or contradict each other, embeddings are not finite, fewer than two
        classes are trained on, or the protocol is unknown.
    SpecMismatchError
        When the two stores were embedded differently.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from embedkit import EmbeddingSpec
    >>> from embedkit.evaluation import probe
    >>> from embedkit.store import StoreWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    >>> for name in ("train.h5", "test.h5"):
    ...     with StoreWriter(f"{folder.name}/{name}", spec) as writer:
    ...         writer.append(
    ...             [[0, 1], [0, 2], [1, 0], [2, 0]], ["a", "b", "c", "d"], labels=["cat", "cat", "dog", "dog"]
    ...         )
    ...         writer.finalise()
    >>> report = probe(f"{folder.name}/train.h5", f"{folder.name}/test.h5")
    >>> report.metrics["top1"], report.metrics["confusion"]
    (1.0, [[2, 0], [0, 2]])
    >>> folder.cleanup()
    """
    if protocol not in PROTOCOLS:
        raise EvaluationError(f"there is no protocol {protocol!r}; known: {', '.join(map(repr, sorted(PROTOCOLS)))}")
    if seed < 0:
        raise EvaluationError(f"the seed must not be negative; got {seed}")
    if (test is None) == (split is None):
        found = "neither" if test is None else "both"
        raise EvaluationError(f"a probe needs a test store or a split file, one of the two; got {found}")
    left_out: dict[str, Any] = {"not_in_split": 0, "other_splits": {}}
    if test is not None:
        train_store, test_store = _opened(train), _opened(test)
        train_store.spec.require_same(test_store.spec, "cannot probe: train and test were embedded differently")
        trained, tested = whole_store(train_store), whole_store(test_store)
    elif split is not None:
        trained, tested, left_out = split_store(_opened(train), Split.read(split), train_split, test_split)
    inputs = _inputs(trained, tested, left_out, split)
    return _score(trained, tested, inputs, protocol, seed, progress or _silent)


def _opened(store: StoreLike) -> Store:
    return store if isinstance(store, Store) else Store.open(store)


def _silent(line: str) -> None:
    """Take a line of progress and say nothing."""


def _inputs(train: Part, test: Part, left_out: dict[str, Any], split: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the facts about what is measured, after refusing a training part of one class."""
    trained, tested = train.summary(), test.summary()
    known = trained["rows_per_class"]
    if len(known) < 2:
        raise EvaluationError(
            f"{train.store.path}: all {len(train.rows)} training rows are of the class {next(iter(known))!r}; "
            "a probe needs at least two classes"
        )
    return {
        "digest": train.store.digest,
        "train": trained,
        "test": tested,
        "split": None if split is None else os.fsdecode(split),
        "left_out": left_out,
        "unseen_classes": {name: rows for name, rows in tested["rows_per_class"].items() if name not in known},
    }


def _score(train: Part, test: Part, inputs: dict[str, Any], protocol: str, seed: int, progress: Progress) -> Report:
    """Fit both heads to the training part and score them on the test part."""
    settings = PROTOCOLS[protocol]
    progress(f"reading {len(train.rows)} training and {len(test.rows)} test rows")
    x, queries = train.embeddings(), test.embeddings()
    head, choice = fit_logistic(
        x, train.names, seed=seed, fraction=settings.fraction, C_grid=settings.C_grid, progress=progress
    )
    progress("scoring the linear head and the k-NN head")
    knn = WeightedKNN(k=settings.k, temperature=settings.temperature).fit(x, train.names)
    classes = np.unique(np.concatenate([train.names, test.names]))
    true, linear, nearest = (
        np.searchsorted(classes, names) for names in (test.names, head.predict(queries), knn.predict(queries))
    )
    return Report(
        metrics=_metrics(true, linear, nearest, classes.tolist(), seed),
        parameters={
            "protocol": protocol,
            "seed": seed,
            **choice,
            "C_grid": list(settings.C_grid),
            "fraction": settings.fraction,
            "k": min(settings.k, len(x)),
            "temperature": settings.temperature,
        },
        inputs=inputs,
        classes=classes.tolist(),
        predictions={
            "ids": np.array([test.store.ids[row] for row in test.rows]),
            "true": true,
            "linear": linear,
            "knn": nearest,
        },
        head=head,
    )


def _metrics(
    true: npt.NDArray[np.int64],
    linear: npt.NDArray[np.int64],
    nearest: npt.NDArray[np.int64],
    classes: list[str],
    seed: int,
) -> dict[str, Any]:
    c = len(classes)
    return {
        "top1": float(np.mean(linear == true)),
        "top1_interval": bootstrap_interval(linear == true, seed=seed),
        "knn_top1": float(np.mean(nearest == true)),
        "knn_top1_interval": bootstrap_interval(nearest == true, seed=seed),
        "per_class": dict(zip(classes, class_accuracies(true, linear, c), strict=True)),
        "confusion": confusion_matrix(true, linear, c).tolist() if c <= CONFUSION_CLASSES else None,
    }
