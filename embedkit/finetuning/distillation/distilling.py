"""Distillation: a small backbone learns to reproduce the embeddings of large ones, on images without labels."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from embedkit.backbones import Backbone
from embedkit.errors import FinetuneError
from embedkit.evaluation.benching import versions
from embedkit.evaluation.speeds import machine_name
from embedkit.extraction import Progress
from embedkit.extraction.extracting import listed
from embedkit.finetuning.blocks import blocks_of
from embedkit.finetuning.distillation.account import describe_backbone, list_failures, write_account
from embedkit.finetuning.distillation.mimicry import MIMICRIES, Mimicry, validate_mimicry
from embedkit.finetuning.distillation.students import (
    Student,
    fit_projection,
    keep_projection,
    make_student,
    with_projection,
)
from embedkit.finetuning.distillation.targets import Targets, build_targets
from embedkit.finetuning.distillation.teachers import common_ids, embed_views, load_teachers, open_stores
from embedkit.finetuning.distillation.views import check_views, list_views, name_views, view_id
from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.finetuning.feeding.feed import Feed
from embedkit.finetuning.feeding.ordering import in_steps
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.report_page import finite
from embedkit.finetuning.run_folder import RunFolder, images_sha256
from embedkit.finetuning.saving import save_backbone
from embedkit.finetuning.trainee import Trainee, check_statistics
from embedkit.finetuning.training.checkpoints import forget
from embedkit.finetuning.training.distributed import World, join_world
from embedkit.finetuning.training.history import History, Moment
from embedkit.finetuning.training.loop import resumable, train
from embedkit.finetuning.training.optimisers import check_optimiser
from embedkit.index.duplicates.grouping import copies_among
from embedkit.sources import Listing
from embedkit.spec import Preprocessing
from embedkit.store import Store
from embedkit.text import counted

Rows = npt.NDArray[np.int64]
Watcher = Callable[[str, "Progress | Moment"], None]

MAX_VALIDATION = 2000
_HELD_OUT, _ORDER, _FIRST = 11, 12, 13  # Each chance has a generator of its own.
_FIRST_IMAGES = 8192  # That a projection is fitted on; a few times as many as an embedding is wide.

log = logging.getLogger("embedkit")

DISTILLING = Recipe(
    warmup="none", freeze_norm=False, epochs=30, batch_size=64, body_lr=2e-3, head_lr=2e-3, layer_decay=1.0,
    weight_decay=0.02, metric="cosine", augmentation=Augmentation(hflip=0.5),
)  # fmt: skip


@dataclass(frozen=True)
class Distillation:
    """What a student is to reproduce, and how far it may be from it.

    Parameters
    ----------
    views : int, default 1
        Views of each image that the teachers see, once for all epochs: the whole image, and squares of it drawn by
        chance. An epoch shows the student one of them, at its own size; the next epoch the next one.
    smallest_view : float, default 0.3
        The least share of the largest square in an image that a view shows.
    width : int, default 512
        Directions that are kept of each teacher, in the order of their variance.
    whitening : float, default 0.0
        0 keeps a teacher's own geometry, 1 makes all of its directions equally loud.
    distance : {"cosine", "mse"}, default "cosine"
        What is made small.
    held_out : float, default 0.02
        Share of the images that the best epoch is chosen by, and at most 2,000 of them; nothing is learned from them,
        nor from byte-identical copies of them.

    Raises
    ------
    FinetuneError
        When a setting is none of its values.
    """

    views: int = 1
    smallest_view: float = 0.3
    width: int = 512
    whitening: float = 0.0
    distance: str = "cosine"
    held_out: float = 0.02

    def __post_init__(self) -> None:
        check_views(self.views, self.smallest_view)
        if self.distance not in MIMICRIES:
            raise FinetuneError(f"distance must be one of {', '.join(MIMICRIES)}; got {self.distance!r}")
        if self.width < 1:
            raise FinetuneError(f"width must be at least 1; got {self.width!r}")
        if not 0 <= self.whitening <= 1:
            raise FinetuneError(f"whitening must be from 0 to 1; got {self.whitening!r}")
        if not 0 <= self.held_out < 1:
            raise FinetuneError(f"held_out must be from 0 to below 1; got {self.held_out!r}")


@dataclass(frozen=True, eq=False)
class _Lesson:
    """The images that every teacher could see, their views, and the targets of these."""

    images: Listing
    views: Listing
    targets: Targets
    train: Rows  # Numbers of images.
    held: Rows
    stores: Sequence[Store]

    def rows_of(self, epoch: int, recipe: Recipe, world: int) -> list[Rows]:
        """Return the rows of each batch of an epoch: one view of every image that is learned from."""
        count = len(self.images.files)
        view = (epoch - 1) % (len(self.views.files) // count)
        order = np.random.default_rng([_ORDER, recipe.seed, epoch]).permutation(self.train)
        return list(in_steps(order + view * count, recipe.batch_size, world))


def distill(
    teachers: str | os.PathLike[str] | Backbone | Sequence[str | os.PathLike[str] | Backbone],
    student: str | os.PathLike[str] | Backbone,
    images: Any,
    output: str | os.PathLike[str],
    *,
    settings: Distillation | None = None,
    recipe: Recipe | None = None,
    img_size: int | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    stores: str | os.PathLike[str] | None = None,
    project: bool = False,
    precision: str = "fp32",
    device: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Watcher | None = None,
) -> Backbone:
    """Teach a small backbone to reproduce the embeddings of one or several others, on images without labels.

    The teachers embed the images once, into stores; the student sees the same images at its own size, and a linear map
    from its embedding to theirs learns with it. That map is dropped at the end, unless it is to be kept. After every
    epoch the whole state is on disk: the same call, after a kill, ends in the very weights of a run that nobody
    interrupted.

    Parameters
    ----------
    teachers : str, path-like or Backbone, or a sequence of them
        As `Backbone.load` takes them. Several are combined: each one's embeddings are standardised and count alike.
    student : str, path-like or Backbone
        A bare timm architecture begins with random weights; a backbone goes on from what it knows.
    images : path-like, Listing, sequence, mapping, dataset or iterator
        As `embedkit.extract` takes them. Classes are not looked at.
    output : path-like
        A folder: the student as a backbone, the teachers' stores, ``epochs.csv`` and ``report.json``.
    settings : Distillation, optional
        What is reproduced; by default ``Distillation()``.
    recipe : Recipe, optional
        How it is learned; by default ``DISTILLING``. Settings of heads and classes mean nothing here.
    img_size : int, optional
        Side of the student's crop, in pixels; by default 128 for a new network.
    arch_kwargs : mapping, optional
        Keyword arguments of the student's architecture.
    stores : path-like, optional
        Folder of the teachers' stores, to be shared between runs; by default ``OUTPUT/teachers``.
    project : bool, default False
        Whether the linear map is kept: the student's embedding is then what it says of its teachers' directions, one
        teacher beside the other.
    precision : {"fp32", "fp16"}, default "fp32"
        Number format of the weight file; the backbone computes in float32 either way.
    device : str, default "auto"
        Where teachers and student compute.
    workers : int, optional
        Threads that decode; by default one for each usable processor.
    overwrite : bool, default False
        Whether another run that is in the folder is replaced. The teachers' stores stay.
    progress : callable, optional
        Called with what is being done and how far it is.

    Returns
    -------
    Backbone
        The student, loaded from the folder.

    Raises
    ------
    FinetuneError
        When the folder holds another run, a setting makes no sense, or there are too few images.
    StoreBusyError
        When another process is at work in the folder.
    EmbedkitError
        Whatever `extract` and `Backbone.load` raise.

    Examples
    --------
    >>> student = ek.distill("resnet50.a1_in1k", "mobilenetv3_small_100", "photos/", "runs/small")  # doctest: +SKIP
    >>> ek.extract("photos/", "small.h5", student)  # doctest: +SKIP
    """
    settings, recipe = settings or Distillation(), recipe or DISTILLING
    _check_recipe(recipe)
    folder = RunFolder(output)
    with join_world(device) as world, folder.lock() if world.first else nullcontext():
        listing = listed(images)
        known = load_teachers(teachers, device=device)
        pupil = make_student(
            student, known[0].preprocessing, img_size=img_size, arch_kwargs=arch_kwargs, seed=recipe.seed,
            drop_path=recipe.drop_path, device=device,
        )  # fmt: skip
        check_statistics(pupil.network, recipe)
        identity = {**_identity(pupil, known, listing, settings), "project": project, "precision": precision}
        if world.first:
            begun = [one.recipe["model"] if isinstance(one, Backbone) else os.fspath(one) for one in (*known, student)]
            folder.claim(recipe, identity, overwrite=overwrite, inputs=begun)
        world.wait()
        if folder.finished and world.first:
            log.info("%s: this run is finished already; --overwrite repeats it", folder.path)
        if not folder.finished:
            views = list_views(listing, settings.views, settings.smallest_view, recipe.seed)
            places = stores or folder.path / "teachers"
            kind = name_views(settings.views, settings.smallest_view, recipe.seed)
            if world.first:
                embed_views(views, known, places, kind=kind, workers=workers, progress=progress)
            world.wait()  # The others find whole stores.
            found = open_stores(known, places, kind)
            lesson = _prepare(listing, found, folder, settings, recipe, world)
            history, projection = _teach(pupil, lesson, folder, settings, recipe, identity, world, workers, progress)
            if world.first:
                pupil = keep_projection(pupil, projection) if project else pupil
                _finish(pupil, lesson, folder, settings, recipe, history, precision)
        world.wait()  # Nobody loads what the first process is still writing.
    return Backbone.load(folder.path, device=device)


def _check_recipe(recipe: Recipe) -> None:
    """Refuse what would be ignored, or found out after an epoch."""
    if recipe.metric not in ("cosine", "loss"):
        raise FinetuneError(f"the best epoch of a distillation is told by cosine or loss, and not by {recipe.metric!r}")
    if recipe.augmentation.mixes:
        raise FinetuneError("mixed images have no teacher; leave mixup and cutmix at 0")
    check_optimiser(recipe)


def _identity(
    student: Student, teachers: Sequence[Backbone], listing: Listing, settings: Distillation
) -> dict[str, Any]:
    """Return what decides the student's weights beside the recipe."""
    return {
        "student": student.spec.digest,
        "teachers": [teacher.spec.digest for teacher in teachers],
        "images": images_sha256(listing.files),
        "distillation": asdict(settings),
    }


def _prepare(
    listing: Listing, stores: Sequence[Store], folder: RunFolder, settings: Distillation, recipe: Recipe, world: World
) -> _Lesson:
    """Find the images that all teachers embedded, make their targets, and hold some of them out."""
    names = [os.fsencode(file.id) for file in listing.files]
    every = [[os.fsencode(view_id(os.fsdecode(name), view)) for name in names] for view in range(settings.views)]
    ids = np.array(names if settings.views == 1 else every).reshape(settings.views, -1)
    embedded = np.isin(ids, common_ids(stores)).all(axis=0)
    kept = np.flatnonzero(embedded)
    if len(kept) < len(names):
        log.warning(
            "%s cannot be learned from: a teacher could not read them", counted(len(names) - len(kept), "image")
        )
    images = replace(listing, files=[listing.files[number] for number in kept.tolist()])
    path = folder.path / "state" / "targets.npy"
    targets = None
    for turn in (True, False):  # The first process makes what all others then find.
        if world.first is turn:
            targets = build_targets(
                stores, ids[:, kept].reshape(-1), path, width=settings.width, whitening=settings.whitening,
                seed=recipe.seed,
            )  # fmt: skip
        world.wait()
    assert targets is not None
    order = np.random.default_rng([_HELD_OUT, recipe.seed]).permutation(len(kept))
    wanted = max(round(settings.held_out * len(kept)), int(settings.held_out > 0))  # Of few images, one at least.
    held, train = np.split(order, [min(MAX_VALIDATION, wanted)])
    copies = copies_among(stores[0], np.searchsorted(stores[0].images.ids, ids[0, kept]))
    if copies is not None:
        train = train[~np.isin(copies[train], copies[held])]
    if len(train) < 2:
        raise FinetuneError(f"{counted(len(kept), 'image')} of {listing.root} are too few to learn from")
    views = list_views(images, settings.views, settings.smallest_view, recipe.seed)
    return _Lesson(images, views, targets, np.sort(train), np.sort(held), stores)


def _teach(
    student: Student, lesson: _Lesson, folder: RunFolder, settings: Distillation, recipe: Recipe,
    identity: Mapping[str, Any], world: World, workers: int | None, progress: Watcher | None,
) -> tuple[History, nn.Module]:  # fmt: skip
    """Train the student, leave the best epoch's weights in it, and return its projection too."""
    targets, pixels = lesson.targets, student.spec.preprocessing
    criterion = Mimicry(targets.widths, settings.distance)
    trainee = with_projection(student, sum(targets.widths), freeze_norm=recipe.freeze_norm, seed=recipe.seed)
    known = {**identity, "stores": [store.content_id for store in lesson.stores]}
    if not student.fresh and not resumable(folder.path, known, recipe, world=world):
        _fit_first(trainee, lesson, pixels, recipe, workers)
    feed = Feed(
        lesson.views.files, None, pixels, recipe, workers=workers, rank=world.rank, world=world.size,
        targets=lambda rows, epoch: targets.rows(rows),
        batches=lambda epoch: lesson.rows_of(epoch, recipe, world.size),
    )  # fmt: skip
    validate = None
    if len(lesson.held):
        files = [lesson.images.files[number] for number in lesson.held.tolist()]
        held = Feed(files, None, pixels, recipe, workers=workers, rank=world.rank, world=world.size)

        def validate(trainee: Trainee) -> dict[str, float]:
            return validate_mimicry(trainee, held, lambda rows: targets.rows(lesson.held[rows]), criterion, world=world)

    history = train(
        trainee, feed, recipe, folder.path, blocks=blocks_of(trainee), validate=validate, world=world,
        identity=known,
        criterion=criterion,
        progress=None if progress is None else lambda moment: progress("training", moment),
    )  # fmt: skip
    return history, trainee.head


def _fit_first(trainee: Trainee, lesson: _Lesson, pixels: Preprocessing, recipe: Recipe, workers: int | None) -> None:
    """Fit the projection of a student that has weights, on whole images."""
    numbers = np.random.default_rng([_FIRST, recipe.seed]).permutation(lesson.train)[:_FIRST_IMAGES]
    feed = Feed([lesson.images.files[number] for number in numbers.tolist()], None, pixels, recipe, workers=workers)
    embeddings, targets = [], []
    with torch.no_grad():
        for batch in feed.validation():
            if not len(batch.rows):
                continue
            device = next(trainee.parameters()).device
            embeddings.append(trainee.embed(batch.pixels.to(device)).cpu())
            targets.append(torch.from_numpy(lesson.targets.rows(numbers[batch.rows.numpy()])))
    if not embeddings:
        raise FinetuneError(f"none of the {len(numbers):,} training images can be read any more: {feed.failures[0]}")
    fit_projection(trainee, torch.cat(embeddings), torch.cat(targets))


def _finish(
    student: Student, lesson: _Lesson, folder: RunFolder, settings: Distillation, recipe: Recipe, history: History,
    precision: str,
) -> None:  # fmt: skip
    """Write the backbone and the report, and remove what a resumed run would have needed."""
    measured = history.best.metrics if history.best else {}
    metrics = {name: value for name, value in measured.items() if math.isfinite(value)}  # Others are none of JSON's.
    facts = {
        "images": len(lesson.train), "held_out": len(lesson.held), "views": settings.views,
        "seconds": round(sum(row.seconds for row in history.epochs)), "machine": machine_name(),
        "finished": time.strftime("%Y-%m-%d %H:%M %Z"), **versions(),
    }  # fmt: skip
    begun = None if student.fresh else describe_backbone(student.spec)
    save_backbone(
        folder.path, student.network, student.spec, parents=[store.spec for store in lesson.stores],
        recipe={**recipe.to_dict(), "distillation": asdict(settings)}, metrics=metrics,
        information={**facts, "began_with": begun}, precision=precision,
    )  # fmt: skip
    taught = Backbone.load(folder.path, device="cpu").spec
    height, width = student.spec.preprocessing.img_size
    account = {
        "title": f"{student.spec.backbone} at {width} x {height} pixels",
        "metrics": metrics, "student": describe_backbone(taught), "began_with": begun, "facts": facts,
        "teachers": [describe_backbone(store.spec) for store in lesson.stores], "settings": asdict(settings),
        "recipe": recipe.to_dict(), "history": finite(history.to_dict()),
        **list_failures(lesson.stores, settings.views),
    }  # fmt: skip
    write_account(folder, account)
    forget(folder.path)
