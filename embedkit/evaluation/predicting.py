"""Predicting: a saved head says what is on new images, and refuses images that were embedded otherwise."""

from __future__ import annotations

import csv
import heapq
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from embedkit.backbones import Backbone, in_batches
from embedkit.errors import EmbedkitError, EvaluationError, ImageError, SpecMismatchError
from embedkit.evaluation.scoring import class_scores
from embedkit.extraction import Embedded, embed_batches, listed
from embedkit.heads import load_head
from embedkit.images.formats import PAD_ADVICE
from embedkit.spec import EmbeddingSpec
from embedkit.store import Store
from embedkit.store.durable import aside, publish_over

# Rows that the head sees at a time: enough that a call of the estimator costs little beside its arithmetic.
BLOCK = 64

Scores = npt.NDArray[np.float64]
_Embedded: TypeAlias = tuple[str, npt.NDArray[np.float32] | ImageError]  # An id and its embedding, or why it has none.


class Head(Protocol):
    """A head with what it was fitted to: a `FittedHead` of a report, or what `embedkit.heads.load_head` returns."""

    @property
    def estimator(self) -> Any:
        """Fitted; it takes embeddings as they are stored."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes or labels."""
        ...

    @property
    def spec(self) -> EmbeddingSpec:
        """How the embeddings were made."""
        ...

    @property
    def task(self) -> str:
        """One of "class", "multi-label" and "regression"."""
        ...

    @property
    def information(self) -> Mapping[str, Any]:
        """With the key "recipe", how the backbone was loaded."""
        ...


@dataclass(frozen=True)
class Prediction:
    """What a head says about one image.

    Parameters
    ----------
    id : str
        The image's id.
    labels : tuple of str
        Class names, the likeliest first; empty for regression, and for an image that could not be read.
    scores : tuple of float
        The score of each label, or for regression the values of the targets; see `Predictions.score`.
    error : ImageError, optional
        Why there is no prediction.
    """

    id: str
    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    error: ImageError | None = None


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions for some images, computed as they are asked for.

    Iterating yields one `Prediction` for every image, in the order of the ids, those that cannot be read included. It
    holds a few batches in memory, however many images there are; every iteration computes them anew.

    Parameters
    ----------
    total : int
        Number of images.
    score : str
        What a score is: "probability" in [0, 1]; "score", a decision value without unit, of heads that know no
        probabilities; or "value" of a regression target.
    top : int
        Labels of each image, or values of the targets of a regression.
    classes : list of str
        All labels that the head knows; empty for regression.
    failures : list of ImageError
        Images without a prediction, of the last iteration.
    """

    total: int
    score: str
    top: int
    classes: list[str]
    _embedded: Callable[[], Generator[_Embedded, None, None]] = field(repr=False)
    _scores: Callable[[npt.NDArray[np.float32]], Scores] = field(repr=False)
    failures: list[ImageError] = field(default_factory=list)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Prediction]:
        self.failures.clear()
        with closing(self._embedded()) as embedded:
            for batch in in_batches(embedded, BLOCK):
                embeddings = [found for _, found in batch if not isinstance(found, ImageError)]
                predicted = iter(self._predicted(np.stack(embeddings)) if embeddings else ())
                for id, found in batch:
                    if isinstance(found, ImageError):
                        self.failures.append(found)
                        yield Prediction(id, error=found)
                    else:
                        yield Prediction(id, *next(predicted))

    def _predicted(self, embeddings: npt.NDArray[np.float32]) -> Iterator[tuple[tuple[str, ...], tuple[float, ...]]]:
        scores = self._scores(embeddings)
        if not self.classes:
            return (((), tuple(values)) for values in scores.tolist())
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.top]
        chosen = np.take_along_axis(scores, best, axis=1).tolist()
        return (
            (tuple(self.classes[column] for column in columns), tuple(values))
            for columns, values in zip(best.tolist(), chosen, strict=True)
        )

    def to_csv(self, path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> None:
        """Write every prediction as a line of a CSV file, in UTF-8; the file appears when it is whole.

        The columns are path (the id), label and probability (score for a head without probabilities), then label2 and
        so on, and at the end error, which says why an image has no prediction. For regression there is value, value2
        and so on instead of labels.

        Parameters
        ----------
        path : path-like
            The file. What stands there is replaced.
        progress : callable, optional
            Called with how many images are done, and how many there are.
        """
        target = Path(path)
        numbers = ["", *map(str, range(2, self.top + 1))]
        names = ["label", self.score] if self.classes else [self.score]
        with aside(target.parent) as temporary:
            # File names are written byte for byte.
            with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                writer = csv.writer(file)
                writer.writerow(["path", *(name + number for number in numbers for name in names), "error"])
                for done, one in enumerate(self, start=1):
                    if progress is not None:
                        progress(done, self.total)
                    scores = [f"{score:.6g}" for score in one.scores]
                    cells = list(chain(*zip(one.labels, scores, strict=True))) if self.classes else scores
                    error = "" if one.error is None else one.error.reason
                    writer.writerow([one.id, *(cells or [""] * len(names) * self.top), error])
                file.flush()
                os.fsync(file.fileno())
            publish_over(temporary, target)


def predict(
    head: Head | str | os.PathLike[str],
    images: Any,
    *,
    backbone: Backbone | None = None,
    model: str | os.PathLike[str] | None = None,
    device: str = "auto",
    top: int = 1,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Predictions:
    """Predict what a head says about images, or about the rows of a store.

    The images are embedded by the backbone and preprocessing that the head was fitted to, and by no other.

    Parameters
    ----------
    head : path-like, SavedHead or FittedHead
        A folder that ``report.head.save`` wrote, or a head itself.
    images : Store, path-like, Listing, sequence or mapping
        A store, or the path of one (``.h5``): its own embeddings are used, or the layer of it that agrees with the
        head. Otherwise images as `embedkit.extract` takes them.
    backbone : Backbone, optional
        What embeds the images; by default the head's own, loaded.
    model : str or path-like, optional
        Where the weights are now, when they have moved since.
    device : str, default "auto"
        As for `Backbone.load`.
    top : int, default 1
        How many labels each image gets, at most.
    batch_size, workers
        As for `embedkit.extract`.

    Returns
    -------
    Predictions
        An iterable of `Prediction`; nothing has been embedded yet.

    Raises
    ------
    SpecMismatchError
        When the backbone or the store at hand embeds otherwise than what the head was fitted to, naming the fields.
    EvaluationError
        When the head gives no scores, or does not take embeddings as wide as its spec says.
    BackboneError
        When the head does not say where its backbone came from, or the weights cannot be had.
    ImageError
        When there are no images. One that cannot be read is part of the result instead.

    Examples
    --------
    >>> import embedkit as ek
    >>> from embedkit.evaluation.predicting import predict
    >>> report = ek.probe("train.h5", "test.h5")  # doctest: +SKIP
    >>> report.head.save("flowers.head")  # doctest: +SKIP
    >>> for prediction in predict("flowers.head", "new/"):  # doctest: +SKIP
    ...     print(prediction.id, prediction.labels[0], prediction.scores[0])
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    opened: Head = load_head(head) if isinstance(head, str | os.PathLike) else head
    score, classes, scores = _scoring(opened)
    columns = _tried(scores, opened).shape[1]
    top = min(top, columns) if classes else columns
    if isinstance(images, Store) or (isinstance(images, str | os.PathLike) and os.fspath(images).endswith(".h5")):
        store = _agreeing(images if isinstance(images, Store) else Store.open(images), opened.spec)
        total = len(store) + len(store.failures)
        return Predictions(total, score, top, classes, lambda: _of_store(store), scores)
    listing = listed(images)
    backbone = backbone or reload_backbone(opened, model=model, device=device)
    opened.spec.require_same(backbone.spec, "cannot predict: the head was fitted to what another backbone embeds")
    flow = partial(embed_batches, listing, backbone, batch_size=batch_size, workers=workers)
    total = len(listing.files) + len(listing.failures)
    return Predictions(total, score, top, classes, lambda: _of_images(flow(), listing.failures), scores)


def reload_backbone(head: Head, *, model: str | os.PathLike[str] | None = None, device: str = "auto") -> Backbone:
    """Load the backbone that a head was fitted to; see `Backbone.reload`, which says what it raises."""
    recipe = head.information.get("recipe")
    try:
        return Backbone.reload(head.spec, recipe if isinstance(recipe, dict) else {}, model=model, device=device)
    except SpecMismatchError as error:
        message = "cannot predict: this is not the backbone that the head was fitted to"
        raise SpecMismatchError(message, error.differences) from None


def _of_images(
    batches: Generator[Embedded, None, None], failures: Sequence[ImageError]
) -> Generator[_Embedded, None, None]:
    """Yield the images of batches and those that failed when they were listed, in the order of their ids."""

    def embedded() -> Iterator[_Embedded]:
        for batch in batches:
            good = zip((entry.id for entry in batch.items), batch.embeddings, strict=True)
            # Under the image's own id: a decoder may know the file only. How images are read, the head has settled.
            bad = (
                (entry.id, ImageError(entry.id, error.reason.removesuffix(PAD_ADVICE), error.kind))
                for entry, error in batch.failures
            )
            yield from heapq.merge(good, bad, key=_by_bytes)

    with closing(batches):
        yield from heapq.merge(embedded(), ((failure.id, failure) for failure in failures), key=_by_bytes)


def _of_store(store: Store) -> Generator[_Embedded, None, None]:
    """Yield the rows and the failures of a store, in the order of their ids."""

    def embedded() -> Iterator[_Embedded]:
        start = 0
        for block in store.iter_blocks():
            bad = set(np.flatnonzero(~np.isfinite(block).all(axis=1)).tolist())
            for row, id in enumerate(store.ids[start : start + len(block)]):
                yield id, ImageError(id, "its embedding is not finite", "damaged") if row in bad else block[row]
            start += len(block)

    failed = ((one.id, ImageError(one.id, one.error, one.kind)) for one in store.failures)
    yield from heapq.merge(embedded(), failed, key=_by_bytes)


def _by_bytes(found: _Embedded) -> bytes:
    return os.fsencode(found[0])


def _agreeing(store: Store, spec: EmbeddingSpec) -> Store:
    """Return a store as it shows the embeddings of a spec: as it is, or by one of its layers."""
    if store.digest != spec.digest:
        for layer, found in store.layers.items():
            if found.digest == spec.digest:
                return Store.open(store.path, layer=layer)
    spec.require_same(store.spec, f"cannot predict: the head was fitted to other embeddings than those of {store.path}")
    return store


def _tried(scores: Callable[[npt.NDArray[np.float32]], Scores], head: Head) -> Scores:
    """Return the scores of one row of zeros, or say that a head gives none, before anything is embedded."""
    try:
        return scores(np.zeros((1, head.spec.dim), dtype=np.float32))
    except EmbedkitError:
        raise
    except Exception as error:  # A stranger's head of sound shapes may have a parameter that makes no sense.
        raise EvaluationError(f"the head cannot be used, {type(error).__name__}: {error}") from error


def _scoring(head: Head) -> tuple[str, list[str], Callable[[npt.NDArray[np.float32]], Scores]]:
    """Return what a head's scores are, the names of their columns, and a function that computes them."""
    estimator = head.estimator
    wide = getattr(estimator, "n_features_in_", head.spec.dim)
    if wide != head.spec.dim:
        raise EvaluationError(
            f"the head takes embeddings of width {wide}, and its spec says {head.spec.dim}: they do not belong together"
        )
    if head.task == "regression":
        return "value", [], lambda x: np.asarray(estimator.predict(x), dtype=np.float64).reshape(len(x), -1)
    classes = _class_names(head)
    for method, score in (("predict_proba", "probability"), ("decision_function", "score")):
        if hasattr(estimator, method):
            return score, classes, partial(_columns, estimator, len(classes))
    raise EvaluationError(
        f"the head is a {type(estimator).__name__}, which gives neither probabilities nor scores; fit another one"
    )


def _class_names(head: Head) -> list[str]:
    """Return the names of the columns that a head's estimator returns."""
    names, known = list(head.classes), getattr(head.estimator, "classes_", None)
    if head.task == "multi-label" or known is None:
        return names
    codes = np.asarray(known)
    if codes.dtype.kind in "iu" and len(codes) and codes.min() >= 0 and codes.max() < len(names):
        return [names[code] for code in codes.tolist()]
    return [str(name) for name in codes.tolist()]


def _columns(estimator: Any, c: int, x: npt.NDArray[np.float32]) -> Scores:
    """Return scores as one column for each class, whatever an estimator calls them."""
    scores = np.asarray(class_scores(estimator, x)[0], dtype=np.float64).reshape(len(x), -1)
    if scores.shape[1] != c:
        raise EvaluationError(f"the head gives {scores.shape[1]} scores for {c} classes; it is damaged")
    return scores
