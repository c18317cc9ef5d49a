"""Probing: how well something can be read off frozen embeddings, by a named protocol."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from embedkit import __version__
from embedkit.backbones import log_differences
from embedkit.errors import EvaluationError, StoreFormatError
from embedkit.evaluation.estimates import warn_of_memory
from embedkit.evaluation.fitted import FittedHead
from embedkit.evaluation.leaks import THRESHOLD, Leaks, find_leaks
from embedkit.evaluation.outcomes import Job, Outcome, measure_folds, measure_once, measure_shots
from embedkit.evaluation.protocols import Protocol, find_protocol
from embedkit.evaluation.reports import Report
from embedkit.evaluation.splits import TASKS, Part, Split, split_sha256, split_store, training_part, whole_store
from embedkit.evaluation.streaming import StoredRows, is_streamed
from embedkit.evaluation.suspects import small_classes
from embedkit.evaluation.targets import Training, find_truth, fitted_labels, training_targets
from embedkit.store import Store
from embedkit.text import counted, printable, say_nothing

# Of few-shot runs where nobody said how many; one draw of a few rows tells little.
FEW_SHOT_SEEDS = 5

# Multiplications that looking for pictures that are alike may stand for: minutes of two processors, since a few
# coordinates settle most pairs.
MOST_PRODUCTS = 5e12
LONG_PRODUCTS = 1e11

Progress = Callable[[str], None]
StoreLike = Store | str | os.PathLike[str]


def probe(
    train: StoreLike,
    test: StoreLike | None = None,
    *,
    split: str | os.PathLike[str] | None = None,
    protocol: str = "default",
    head: Any = None,
    shots: int | Sequence[int] | None = None,
    seeds: int | None = None,
    folds: int | None = None,
    target: str = "class",
    drop_leaks: bool = False,
    device: str = "cpu",
    seed: int = 0,
    train_split: str = "train",
    test_split: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure how well something can be read off frozen embeddings.

    A head is fitted to the training rows by a protocol and scored on the test rows. Whatever is chosen, is chosen on
    held-out training rows; byte-identical pictures are never on both sides of them. Test rows influence nothing but
    the score.

    Parameters
    ----------
    train : Store or path-like
        The store to train on; with `split`, the store of both parts. ``Store.open(path, layer=...)`` probes a layer.
    test : Store or path-like, optional
        The store to test on. Classes are matched by name.
    split : path-like, optional
        Instead of `test`: a CSV file with the columns path (an id of the store) and split, and optionally label, which
        then wins over the store's labels, and target, a number.
    protocol : str, default "default"
        Name of one of `PROTOCOLS`.
    head : str or estimator, optional
        What takes the place of logistic regression in the default protocol: one of `embedkit.heads.HEADS`, or any
        estimator with scikit-learn's interface. The estimator that is passed in stays as it is.
    shots : int or sequence of int, optional
        Train on so many rows of each class only, drawn by seed; each number gives a line of the report.
    seeds : int, optional
        How many draws of few-shot rows to average over, from `seed` on; by default the protocol's number, or 5.
    folds : int, optional
        Cross-validate `train`, or its part `train_split` of the split file, in place of a test part: every row is
        scored by the head of the other folds.
    target : str, default "class"
        What is read off: "class"; "multi-label", class names with ``;`` between the labels of an image; or
        "regression", the numbers of the split file's column target.
    drop_leaks : bool, default False
        Whether to leave out training rows that show a picture of the test part. They are counted in any case.
    device : str, default "cpu"
        Where logistic regression and the perceptron are fitted, in torch's words, such as "cuda". Every other head
        runs on the CPU and refuses another device.
    seed : int, default 0
        Draws the held-out rows, folds, shots and the bootstrap.
    train_split : str, default "train"
        Which part of the split file to train on.
    test_split : str, optional
        Which part to test on; by default the first of test, val and validation that the file has.
    progress : callable, optional
        Called with one line of text at each step.

    Returns
    -------
    Report
        Metrics, parameters, inputs, predictions, and the fitted head. `embedkit.evaluation.compare` says whether two
        reports differ by more than chance.

    Raises
    ------
    EvaluationError
        When labels, rows or files are missing or contradict each other, embeddings are not finite, fewer than two
        classes are trained on, or options exclude each other.
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
    recipe = find_protocol(protocol, head)
    options = _Options.checked(recipe, protocol, test, split, shots, seeds, folds, target, seed, device)
    if drop_leaks and folds:
        raise EvaluationError("folds have no test part whose pictures could be left out; drop_leaks goes without them")
    if split is None and (train_split, test_split) != ("train", None):
        raise EvaluationError("train_split and test_split name parts of a split file; pass it as split, or drop them")
    if folds and test_split is not None:
        raise EvaluationError("folds score every row of train_split and no other part; drop test_split, or the folds")
    say = progress or say_nothing
    trained, tested, left_out = _parts(train, test, split, (train_split, test_split), options)
    log_differences(trained.store.spec, trained.store.recipe)
    leaks = None if folds else _leaks_of(trained, tested, say)
    if leaks is not None and drop_leaks:
        trained = trained.take(np.delete(np.arange(len(trained.rows)), leaks.drop))
        if not len(trained.rows):
            raise EvaluationError(f"{trained.store.path}: every training row shows a picture of the test part")
    inputs = _inputs(trained, tested, left_out, split)
    if leaks is not None:
        inputs["leaks"] = {**leaks.summary(), "dropped": len(leaks.drop) if drop_leaks else 0}
    _warn(trained, tested, recipe, options, say)
    say(f"reading {len(trained.rows)} training and {len(tested.rows)} test rows")
    x = StoredRows(trained) if _stays(trained, recipe, options) else trained.embeddings()
    rows = Training(x, training_targets(trained), target, trained.groups())
    labels = fitted_labels(trained) if target == "multi-label" else []
    job = Job(recipe, rows, labels, find_truth(trained, tested), seed, say, device)
    outcome = _measure(job, tested, options)
    parameters = {
        "protocol": protocol, "protocol_version": recipe.version, "task": target, "seed": seed, "device": device,
        **recipe.settings(), **outcome.choice, **options.told(),
    }  # fmt: skip
    if "k" in parameters:
        parameters["k"] = min(parameters["k"], len(rows.x))
    return Report(
        metrics=outcome.metrics,
        parameters=parameters,
        inputs=inputs,
        classes=job.truth.classes,
        predictions={"ids": np.array([tested.store.ids[row] for row in tested.rows]), **outcome.predictions},
        head=_fitted_head(outcome.estimator, job, trained, parameters),
    )


@dataclass(frozen=True)
class _Options:
    """How to score, after checking that it makes sense together."""

    target: str
    shots: tuple[int, ...]
    seeds: int
    folds: int | None

    @classmethod
    def checked(
        cls, recipe: Protocol, name: str, test: Any, split: Any, shots: int | Sequence[int] | None, seeds: int | None,
        folds: int | None, target: str, seed: int, device: str,
    ) -> _Options:  # fmt: skip
        if seed < 0:
            raise EvaluationError(f"the seed must not be negative; got {seed}")
        if target not in TASKS:
            raise EvaluationError(f"there is no target {target!r}; known: {', '.join(map(repr, TASKS))}")
        if target not in recipe.tasks:
            raise EvaluationError(f"the protocol {name!r} is for classes; {target} goes with 'default'")
        if folds and test is not None:
            raise EvaluationError("folds cross-validate one store; leave the test store out, or the folds")
        if device != "cpu" and not recipe.runs_on_devices(target):
            raise EvaluationError(
                f"the head of this probe is fitted on the CPU, not on {device!r}; a device goes with logistic "
                "regression and the head 'mlp'"
            )
        if not folds and (test is None) == (split is None):
            found = "neither" if test is None else "both"
            raise EvaluationError(
                f"a probe needs a test store or a split file, one of the two; got {found}; "
                "folds=5 cross-validates one store"
            )
        if folds is not None and folds < 2:
            raise EvaluationError(f"there must be at least two folds; got {folds}")
        if folds and recipe.shots:
            raise EvaluationError(f"the protocol {name!r} fits to a few rows and has no folds; name a test part")
        wanted = recipe.shots if shots is None else _numbers(shots)
        if wanted and (folds or target != "class"):
            raise EvaluationError(f"shots go with classes and without folds; got {'folds' if folds else target}")
        if seeds is not None and (seeds < 1 or not wanted):
            raise EvaluationError(f"seeds are draws of few-shot rows, at least one, and go with shots; got {seeds}")
        return cls(target, wanted, seeds or (recipe.seeds if recipe.shots else FEW_SHOT_SEEDS), folds)

    def told(self) -> dict[str, Any]:
        """Return what a report says about them."""
        if self.folds:
            return {"folds": self.folds}
        return {"shots": list(self.shots), "seeds": self.seeds} if self.shots else {}


def _numbers(shots: int | Sequence[int] | None) -> tuple[int, ...]:
    numbers = () if shots is None else (shots,) if isinstance(shots, int) else tuple(sorted(set(shots)))
    if shots is not None and (not numbers or min(numbers) < 1):
        raise EvaluationError(f"shots are numbers of rows of each class, at least 1; got {shots!r}")
    return numbers


def _parts(
    train: StoreLike,
    test: StoreLike | None,
    split: str | os.PathLike[str] | None,
    names: tuple[str, str | None],
    options: _Options,
) -> tuple[Part, Part, dict[str, Any]]:
    """Return the rows to train on and those to test on, and what is left out of either."""
    left_out: dict[str, Any] = {"not_in_split": 0, "other_splits": {}}
    store = _opened(train)
    if test is not None:
        other = _opened(test)
        store.spec.require_same(other.spec, "cannot probe: train and test were embedded differently")
        return whole_store(store, options.target), whole_store(other, options.target), left_out
    parts = None if split is None else Split.read(split)
    if options.folds or parts is None:
        part = training_part(store, parts, names[0], options.target)
        return part, part, left_out
    return split_store(store, parts, *names, options.target)


def _opened(store: StoreLike) -> Store:
    return store if isinstance(store, Store) else Store.open(store)


def _inputs(train: Part, test: Part, left_out: dict[str, Any], split: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the facts about what is measured, after refusing a training part of one class."""
    trained, tested = train.summary(), test.summary()
    known = trained["rows_per_class"]
    least = {"class": 2, "multi-label": 1, "regression": 0}[train.task]
    if len(known) < least:
        found = f"are of the class {next(iter(known))!r}" if known else "have no label"
        raise EvaluationError(
            f"{train.store.path}: all {len(train.rows)} training rows {found}; a probe needs at least "
            f"{'two classes' if least > 1 else 'one label'}"
        )
    return {
        "digest": train.store.digest,
        "train": trained,
        "test": tested,
        "split": None if split is None else os.fsdecode(split),
        "split_sha256": None if split is None else split_sha256(split),
        "left_out": left_out,
        "unseen_classes": {name: rows for name, rows in tested["rows_per_class"].items() if name not in known},
        "software": {"embedkit": __version__, **{name: version(name) for name in ("numpy", "scikit-learn")}},
    }


def _leaks_of(train: Part, test: Part, progress: Progress) -> Leaks:
    """Return the pictures that both parts have; those that are only alike where comparing all pairs is affordable."""
    near = len(train.rows) * len(test.rows) * train.store.dim <= MOST_PRODUCTS
    if near and len(train.rows) * len(test.rows) * train.store.dim > LONG_PRODUCTS:
        progress(f"comparing {len(test.rows):,} test rows with {len(train.rows):,} training rows, to find leaks")
    try:
        leaks = find_leaks(train, test, threshold=THRESHOLD if near else None)
    except StoreFormatError:  # Rows that are not finite: those of the two parts are named when they are read.
        progress("embeddings that are not finite: pictures that are only alike are not looked for")
        leaks = find_leaks(train, test, threshold=None)
    for line in leaks.to_text().splitlines() if leaks.pairs else ():
        progress(line)
    if not near:
        progress(
            f"{len(train.rows):,} x {len(test.rows):,} pairs are too many to look for pictures that are only alike"
        )
    return leaks


def _warn(trained: Part, tested: Part, recipe: Protocol, options: _Options, progress: Progress) -> None:
    """Say what makes numbers doubtful or the run impossible, before it begins."""
    few = small_classes(trained.names) if trained.task == "class" else {}
    if few:
        some = ", ".join(f"{printable(name)} ({rows})" for name, rows in list(few.items())[:10])
        more = f" and {len(few) - 10:,} more" if len(few) > 10 else ""
        progress(f"{counted(len(few), 'class')} with fewer than 5 training rows: {some}{more}")
    c = len(np.unique(trained.names)) if trained.task == "class" else max(1, len(fitted_labels(trained)))
    rows = min(len(trained.rows), max(options.shots) * c) if options.shots else len(trained.rows)
    streamed = _stays(trained, recipe, options)
    warn_of_memory(rows, trained.store.dim, c, head=recipe.head_name, tested=len(tested.rows), streamed=streamed)


def _stays(trained: Part, recipe: Protocol, options: _Options) -> bool:
    """Return whether training rows are read from their store block by block, and never held."""
    return is_streamed(recipe.head_name, trained) and not (options.folds or options.shots)


def _measure(job: Job, tested: Part, options: _Options) -> Outcome:
    if options.folds:
        return measure_folds(job, options.folds)
    if options.shots:
        return measure_shots(job, tested.embeddings(), options.shots, options.seeds)
    return measure_once(job, tested.embeddings())


def _fitted_head(estimator: Any, job: Job, trained: Part, parameters: dict[str, Any]) -> FittedHead:
    """Return the head with what a stranger needs to use it and to know where it comes from."""
    store, task = trained.store, trained.task
    classes = job.labels if task == "multi-label" else [] if task == "regression" else estimator.classes_.tolist()
    information = {
        "protocol": parameters["protocol"],
        "head": parameters.get("head"),
        "chosen": {"C": parameters["C"]} if "C" in parameters else parameters.get("chosen", {}),
        "seed": parameters["seed"],
        "digest": store.digest,
        "content_id": store.content_id,
        "rows": len(trained.rows),
        "recipe": store.recipe,
    }
    return FittedHead(estimator, classes, store.spec, task, information)
