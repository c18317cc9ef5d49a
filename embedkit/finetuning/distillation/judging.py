"""Judging: what a student's embeddings are worth beside those of a store, on the store's own images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from embedkit.backbones import Backbone
from embedkit.errors import FinetuneError, ImageError
from embedkit.evaluation.columns import align_columns
from embedkit.evaluation.probing import probe
from embedkit.evaluation.splits import Split, split_store, whole_store
from embedkit.extraction import Progress, extract
from embedkit.images import Data
from embedkit.index.pictures import read_picture
from embedkit.sources import Listing
from embedkit.sources.entries import Entries
from embedkit.store import Store

FOLDS = 5
ROLES = ("judge", "student")


@dataclass(frozen=True)
class Verdict:
    """How one backbone did.

    Attributes
    ----------
    name : str
        Its architecture and tag.
    dim : int
        Width of its embedding.
    linear_top1, knn_top1 : float
        Of the default protocol: a linear probe and k-NN, fractions in [0, 1].
    """

    name: str
    dim: int
    linear_top1: float
    knn_top1: float


class _Picture(NamedTuple):
    """An image that a store has a row for."""

    id: str
    label: str | None
    store: Store
    row: int

    def status(self) -> tuple[int, int]:
        """Return size and modification time as the store has them."""
        images = self.store.images
        return int(images.sizes[self.row]), int(images.mtimes_ns[self.row])

    def read(self) -> Data:
        """Read the image where the store says that it is."""
        return read_picture(self.store, self.id)


class _Pictures(Entries):
    """The images of a store, in the order of its rows."""

    def __init__(self, store: Store) -> None:
        assert store.labels is not None
        self.store, self.codes = store, store.labels

    def __len__(self) -> int:
        return len(self.store)

    def entry(self, number: int) -> _Picture:
        code = int(self.codes[number])
        return _Picture(self.store.ids[number], None if code < 0 else self.store.classes[code], self.store, number)


def check_judge(store: Store, split: str | os.PathLike[str] | None = None) -> None:
    """Find out what would keep a store from judging, before there is anything to judge.

    Parameters
    ----------
    store : Store
        As for `judge_backbone`.
    split : path-like, optional
        As for `judge_backbone`.

    Raises
    ------
    FinetuneError
        When the store has no labels, or its images are gone.
    EvaluationError
        When the split does not fit the store.
    """
    if store.labels is None:
        raise FinetuneError(f"{store.path} has no labels to judge by; make it of a folder of classes")
    if split is None:
        whole_store(store)
    else:
        split_store(store, Split.read(split), "train", None)
    try:
        read_picture(store, store.ids[0])  # Of a folder that was moved, the first is gone, too.
    except ImageError as error:
        raise FinetuneError(
            f"the images of {store.path} are not where it says, such as {store.ids[0]!r} ({error.reason}); embed them "
            "again, and judge by that store"
        ) from error


def judge_backbone(
    backbone: Backbone,
    store: Store,
    output: str | os.PathLike[str],
    *,
    split: str | os.PathLike[str] | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Verdict, Verdict]:
    """Embed the images of a labelled store by a backbone, and probe both.

    Parameters
    ----------
    backbone : Backbone
        Mostly a student.
    store : Store
        Of any other backbone, mostly a teacher, with labels; its images are where it says that they are.
    output : path-like
        The store to make of the backbone's embeddings; one of another backbone that is there is replaced.
    split : path-like, optional
        As for `embedkit.probe`; without one, both are cross-validated in five folds.
    seed : int, default 0
        As for `embedkit.probe`.
    workers : int, optional
        As for `extract`.
    progress : callable, optional
        As for `extract`.

    Returns
    -------
    tuple of Verdict
        Of the store, and of the backbone.

    Raises
    ------
    FinetuneError
        When the store has no labels, or its images are gone.
    EmbedkitError
        Whatever `extract` and `probe` raise.
    """
    check_judge(store, split)
    listing = Listing(store.root or store.path, _Pictures(store), store.classes, [], 0, has_paths=True)
    stale = os.path.exists(output) and Store.open(output).digest != backbone.spec.digest
    made = extract(listing, output, backbone, workers=workers, overwrite=stale, progress=progress)
    if len(made) < len(store):
        raise FinetuneError(
            f"{len(store) - len(made):,} of the {len(store):,} images of {store.path} are not there any more, such as "
            f"{made.failures[0].id!r}; embed them again, and judge by that store"
        )
    return _verdict(store, split, seed), _verdict(made, split, seed)


def verdict_text(verdicts: tuple[Verdict, Verdict]) -> str:
    """Return a table of verdicts."""
    rows = [["", "", "width", "linear top1", "k-NN top1"]]
    rows += [
        [role, each.name, str(each.dim), f"{each.linear_top1:.3f}", f"{each.knn_top1:.3f}"]
        for role, each in zip(ROLES, verdicts, strict=True)
    ]
    return "\n".join(align_columns(rows, "<<>>>"))


def verdict_dict(
    verdicts: tuple[Verdict, Verdict], store: Store, split: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Return JSON values, with what was judged on."""
    return {
        **{name: asdict(each) for name, each in zip(ROLES, verdicts, strict=True)},
        "store": os.path.abspath(store.path), "content_id": store.content_id, "images": len(store),
        "split": None if split is None else os.path.abspath(split),
    }  # fmt: skip


def _verdict(store: Store, split: str | os.PathLike[str] | None, seed: int) -> Verdict:
    folds = None if split else FOLDS
    linear = probe(store, split=split, folds=folds, seed=seed).metrics
    # The folds' own report has one head.
    nearest = linear["knn_top1"] if split else probe(store, head="knn", folds=folds, seed=seed).metrics["top1"]
    return Verdict(store.spec.name_of(store.recipe), store.dim, float(linear["top1"]), float(nearest))
