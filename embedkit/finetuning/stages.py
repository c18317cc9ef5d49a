"""The stages of fine-tuning: embed, warm up, train, save, embed again, compare."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from embedkit.backbones import Backbone
from embedkit.errors import EvaluationError, FinetuneError, ImageError
from embedkit.evaluation.cells import write_whole
from embedkit.evaluation.leaks import Leaks
from embedkit.evaluation.splits import Split
from embedkit.extraction import listed
from embedkit.finetuning.blocks import Block, blocks_of, list_states, trainable_at
from embedkit.finetuning.dividing import divide, own_split
from embedkit.finetuning.examples import Division, Examples, leaks_across
from embedkit.finetuning.feeding.feed import Feed
from embedkit.finetuning.feeding.ordering import class_batches
from embedkit.finetuning.job import Job, Watcher
from embedkit.finetuning.layers import as_estimator
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.report_page import WARMUP_TOP1
from embedkit.finetuning.results import conclude
from embedkit.finetuning.run_folder import RunFolder, images_sha256, read_object
from embedkit.finetuning.trainee import Trainee, check_statistics, make_trainee
from embedkit.finetuning.training.checkpoints import forget, state_folder
from embedkit.finetuning.training.distributed import World, join_world
from embedkit.finetuning.training.history import History
from embedkit.finetuning.training.loop import resumable, train
from embedkit.finetuning.training.losses import COMPARING, METRIC_LOSSES, make_criterion
from embedkit.finetuning.training.optimisers import check_optimiser
from embedkit.finetuning.training.recall import RECALL_METRICS, validate_recall
from embedkit.finetuning.training.recorders import Recorder, TensorBoardRecorder, WandbRecorder
from embedkit.finetuning.training.validation import CLASS_METRICS, validate_classes
from embedkit.finetuning.warmup import warm_up
from embedkit.index.duplicates.grouping import copies_among
from embedkit.sources import content_sha256
from embedkit.store import Store
from embedkit.text import counted, printable, say_nothing

Rows = npt.NDArray[np.int64]

log = logging.getLogger("embedkit")


def finetune(
    images: Any,
    backbone: Backbone | str,
    output: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    split: Split | str | os.PathLike[str] | None = None,
    train_split: str = "train",
    val_split: str | None = None,
    test_split: str | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    reextract: bool = True,
    workers: int | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    wandb_offline: bool = False,
    overwrite: bool = False,
    progress: Watcher | None = None,
) -> Backbone:
    """Adapt a backbone to labelled images, embed them again with it, and say what that bought.

    The images are embedded once; a new head is fitted to the embeddings of the training part while the body is frozen;
    then body and head learn together from the images; the epoch that the validation images like best is kept. Before
    and after are compared on images that nothing was learned from.

    After every epoch everything that is needed to go on is on disk: the same call, after a kill, ends in the very
    weights of a run that nobody interrupted. Under ``torchrun`` several processes train together.

    Parameters
    ----------
    images : path-like, Listing, sequence, mapping, dataset or iterator
        As `embedkit.extract` takes them, with classes: a folder for each, or a table with a column label. Or images of
        any shape whose classes the split file says.
    backbone : Backbone or str
        What is adapted; a name is loaded with its defaults. It is left as it is.
    output : path-like
        A folder: the adapted backbone, its head, the split, the stores before and after, and a report.
    recipe : Recipe, optional
        Every setting; by default ``Recipe()``.
    split : Split or path-like, optional
        A CSV file with the columns path and split, and optionally label. Without one, a table of images with a column
        split is divided as that says; of anything else, a fifth of each class is held out by the recipe's seed. Either
        way the split is recorded in the folder.
    train_split, val_split, test_split : str, optional
        What the split file calls the parts to train on, to choose the best epoch on, and to compare on; see
        `embedkit.finetuning.dividing.divide`.
    store : Store or path-like, optional
        Embeddings of these images by this backbone, so that they need not be made.
    reextract : bool, default True
        Whether the images are embedded again, and the embeddings compared.
    workers : int, optional
        Threads that decode; by default one for each usable processor.
    tensorboard : bool, default False
        Whether the figures are written for TensorBoard, too.
    wandb : str, optional
        A project of Weights & Biases that gets them, too.
    wandb_offline : bool, default False
        Whether they are kept for ``wandb sync`` instead of being sent.
    overwrite : bool, default False
        Whether another run in the folder, or this one when it is finished, is replaced.
    progress : callable, optional
        Called with the name of a stage, and a `Progress` of embedding or a `Moment` of training.

    Returns
    -------
    Backbone
        The adapted one, as ``Backbone.load(output)`` returns it.

    Raises
    ------
    FinetuneError
        When the recipe asks for what this backbone cannot do, the folder holds another run (naming the settings that
        differ), the loss is no number any more (with what to try), or memory does not hold a single image.
    EvaluationError
        When there are no classes or no honest split; see `embedkit.finetuning.dividing.divide`.
    SpecMismatchError
        When `store` was made otherwise.
    StoreBusyError
        When another process is at work in the folder.
    MissingExtraError
        When a loss, adapters or a recorder need a package that is not installed.

    Examples
    --------
    >>> import embedkit as ek
    >>> backbone = ek.Backbone.load("mobilenetv2_100.ra_in1k")  # doctest: +SKIP
    >>> adapted = ek.finetune("flowers/", backbone, "runs/flowers")  # doctest: +SKIP
    >>> ek.extract("more/", "more.h5", adapted)  # doctest: +SKIP
    """
    recipe = _settled(recipe or Recipe())
    listing = listed(images)
    split = own_split(images, listing) if split is None else split
    if isinstance(backbone, str):
        backbone = Backbone.load(backbone)
    folder = RunFolder(output)
    with join_world(str(backbone.device)) as world, folder.lock() if world.first else nullcontext():
        division = divide(
            listing, split, train_split=train_split, val_split=val_split, test_split=test_split, seed=recipe.seed
        )
        job = _prepared(backbone, recipe, division, folder, world, workers, progress or say_nothing)
        _check_company(job)
        recorders = _recorders(job, tensorboard, wandb, wandb_offline)
        given = _checked_store(job, store)
        if _claimed(job, overwrite, given, reextract):
            return job.adapted()
        wanted = reextract or recipe.warmup_kind != "none"
        before = _embed_before(job, wanted=wanted) if given is None else given
        if before is not None:  # Pictures that were replaced since an epoch was learned from are another run.
            job = replace(job, identity={**job.identity, "embeddings": before.content_id})
        job = replace(job, division=_readable(job, before))
        leaks = _leaks(job, before)
        warmup = _warm_up(job, before)
        history = _train(job, recorders)
        if world.first:
            conclude(job, before, leaks, warmup, history, reextract=reextract)
        job.wait()
        return job.adapted()


def make_ready(backbone: Backbone, recipe: Recipe, classes: int) -> tuple[Trainee, Sequence[Block], nn.Module]:
    """Make what learns, and find out whatever cannot work, before anything is written.

    Parameters
    ----------
    backbone : Backbone
        What is adapted.
    recipe : Recipe
        Every setting.
    classes : int
        How many there are.

    Returns
    -------
    tuple of Trainee, sequence of Block, and nn.Module
        What learns, its blocks, and what is made small.

    Raises
    ------
    FinetuneError
        When the recipe asks for what this backbone cannot do, or names an optimiser or a metric that is none.
    """
    recipe = _settled(recipe)
    offered = RECALL_METRICS if recipe.loss in METRIC_LOSSES else CLASS_METRICS
    if recipe.metric not in offered:
        raise FinetuneError(
            f"no epoch of the loss {recipe.loss} is chosen by {recipe.metric!r}; choose one of {', '.join(offered)}"
        )
    check_optimiser(recipe)
    trainee = make_trainee(backbone, classes, recipe)
    check_statistics(trainee.network, recipe)
    blocks = blocks_of(trainee)
    late = trainable_at(blocks, recipe, sys.maxsize) - trainable_at(blocks, recipe, max(1, recipe.epochs))
    if late and recipe.epochs:
        asleep = sum(not late.isdisjoint(block.parameters) for block in blocks)
        log.warning(
            "%s of %d would only thaw after the last epoch, and never will: one thaws every %s, and there are %d",
            counted(asleep, "block"), len(blocks), counted(recipe.gradual, "epoch"), recipe.epochs,
        )  # fmt: skip
    return trainee, blocks, make_criterion(recipe, classes, backbone.dim)


def _settled(recipe: Recipe) -> Recipe:
    """Return the recipe with the metric that its loss can be judged by."""
    if recipe.loss in METRIC_LOSSES and recipe.metric == Recipe.metric:
        log.info("the best epoch is chosen by recall@1: the loss %s trains no head", recipe.loss)
        return replace(recipe, metric="recall@1")
    return recipe


def _prepared(
    backbone: Backbone, recipe: Recipe, division: Division, folder: RunFolder, world: World, workers: int | None,
    watch: Watcher,
) -> Job:  # fmt: skip
    """Return the job, after finding out whatever cannot work: rather now than after hours."""
    trainee, blocks, criterion = make_ready(backbone, recipe, len(division.classes))
    images = images_sha256(entry for part in division.parts for entry in part.entries)
    identity = {"backbone": backbone.spec.digest, "images": images, "division": division.sha256}
    return Job(backbone, recipe, division, folder, world, workers, watch, trainee, blocks, criterion, identity)


def _check_company(job: Job) -> None:
    """Refuse a patience that nothing could end, and say where no epoch can be judged by the validation images."""
    recipe, val = job.recipe, job.division.val
    if recipe.loss not in METRIC_LOSSES or not recipe.epochs or len(np.unique(val.codes)) < len(val.codes):
        return
    found = f"no class has two images in {val.name}, so recall@1 can judge no epoch"
    if recipe.patience:
        raise FinetuneError(
            f"{found}, and --patience would never end the run; drop it, or give more images to {val.name} by --split"
        )
    if job.world.first:
        log.warning("%s: the last one is kept; to choose the best, give more images to %s by --split", found, val.name)


def _recorders(job: Job, tensorboard: bool, wandb: str | None, offline: bool) -> list[Recorder]:
    if not job.world.first:
        return []
    found: list[Recorder] = [TensorBoardRecorder(job.folder.path)] if tensorboard else []
    settings = {**job.recipe.to_dict(), **job.identity}
    return found + ([WandbRecorder(job.folder.path, wandb, settings, offline=offline)] if wandb else [])


def _claimed(job: Job, overwrite: bool, given: Store | None, reextract: bool) -> bool:
    """Take the folder, and return whether all is done there already."""
    if job.world.first:
        log.info("%s", job.division.to_text())
        inputs = [str(job.backbone.recipe["model"]), *([] if given is None else [str(given.path)])]
        job.folder.claim(job.recipe, job.identity, overwrite=overwrite, inputs=inputs)
        if job.folder.finished and reextract and not job.folder.after.exists():
            raise FinetuneError(
                f"{job.folder.path}: this run ended with --no-reextract; embedkit extract IMAGES -o {job.folder.after} "
                f"-m {job.folder.path} embeds the images by its backbone, and --overwrite repeats the run and compares"
            )
        if job.folder.finished:
            log.info("%s: this run is finished already; --overwrite repeats it", job.folder.path)
            forget(job.folder.path)
        else:
            job.division.write(job.folder.split)
    job.wait()
    return job.folder.finished


def _checked_store(job: Job, given: Store | str | os.PathLike[str] | None) -> Store | None:
    """Return the embeddings that were given, when they are of this backbone and these images."""
    if given is None:
        return None
    store = given if isinstance(given, Store) else Store.open(given)
    job.backbone.spec.require_same(store.spec, f"{store.path} was not made by this backbone, whose facts stand first")
    known = {*store.ids, *(failure.id for failure in store.failures)}
    missing = [id for part in job.division.parts for id in part.ids if id not in known]
    if missing:
        raise EvaluationError(
            f"{store.path} lacks {counted(len(missing), 'image')}, such as {missing[0]!r}; bring it up to date "
            "with embedkit extract, or leave --store out"
        )
    other = _other_picture(job, store)
    if other is not None:
        raise EvaluationError(
            f"{store.path} was made of another picture than the {other!r} of {job.listing.root}; bring it up to date "
            "with embedkit extract, or leave --store out"
        )
    return store


def _other_picture(job: Job, store: Store) -> str | None:
    """Return the id of an image that is no longer what the store was made of."""
    known, rows = store.images, {id: row for row, id in enumerate(store.ids)}
    entries = (entry for part in job.division.parts for entry in part.entries)
    found = [(entry, rows[entry.id]) for entry in entries if entry.id in rows]
    found = [(entry, row) for entry, row in found if entry.status() != (known.sizes[row], known.mtimes_ns[row])]
    found = [(entry, row) for entry, row in found if known.content_sha256[row].any()]
    if len(found) > 1000 and job.world.first:
        log.info("comparing the content of %s with what %s was made of", counted(len(found), "image"), store.path)
    for entry, row in found:
        try:
            if content_sha256(entry.read()) != known.content_sha256[row].tobytes():
                return entry.id
        except ImageError:
            continue  # The decoder will say so.
    return None


def _embed_before(job: Job, *, wanted: bool) -> Store | None:
    """Return the embeddings of the frozen backbone; None where no stage needs them."""
    if not wanted:
        return None
    with job.stage("embedding", f"{counted(len(job.listing.files), 'image')} by {job.backbone.description}"):
        return job.embed(job.backbone, job.folder.before, "embedding")


def _readable(job: Job, store: Store | None) -> Division:
    if store is None:
        return job.division
    division = job.division.without(failure.id for failure in store.failures)
    lost = [(len(part) - len(left), part.name) for part, left in zip(job.division.parts, division.parts, strict=True)]
    if any(count for count, _ in lost) and job.world.first:
        each = ", ".join(f"{count:,} of {name}" for count, name in lost if count)
        log.warning("images that could not be read are left out: %s", each)
    return division


def _leaks(job: Job, store: Store | None) -> dict[str, Leaks]:
    """Return the pictures that a part shares with the training part, and warn of them."""
    if store is None or not job.world.first:
        return {}
    found = leaks_across(job.division, store, job.folder.split)
    for part, leaks in found.items():
        if leaks.pairs:
            first = leaks.pairs[0]
            log.warning(
                "%d of %d images of %s have a copy in %s (%d pairs of the same bytes, %d alike), such as %s and %s: "
                "mend split.csv and pass it as --split", len(leaks.test_rows), leaks.tested, part,
                job.division.train.name, leaks.exact, leaks.near, printable(first.test_id), printable(first.train_id),
            )  # fmt: skip
    return found


def _warm_up(job: Job, before: Store | None) -> dict[str, Any]:
    """Fit the head to the stored embeddings, and return how; where a run goes on, how it was."""
    recipe, kept = job.recipe, state_folder(job.folder.path) / "warmup.json"
    if resumable(job.folder.path, job.identity, recipe, world=job.world):
        return _kept_facts(kept) if kept.is_file() else {}
    if before is None or recipe.warmup_kind == "none" or recipe.loss in METRIC_LOSSES:
        return {"warm-up": "none"}
    train = job.division.train
    with job.stage("warm-up", f"the head ({recipe.head}) on {counted(len(train), 'stored embedding')}, body frozen"):
        rows = np.array([before.index_of(id) for id in train.ids], dtype=np.int64)
        groups = copies_among(before, rows)
        found = warm_up(job.trainee, before.rows(rows), train.codes, recipe, groups=groups)
    facts = {"warm-up": found.kind, "warm-up rows": found.rows, "warm-up top1 on them": round(found.top1, 4)}
    facts |= {f"warm-up {name}": value for name, value in found.choice.items() if isinstance(value, int | float)}
    answers = as_estimator(job.trainee.head).predict(before.rows(ids=job.division.val.ids))
    facts[WARMUP_TOP1] = round(float((answers == job.division.val.codes).mean()), 4)
    if job.world.first:
        kept.parent.mkdir(exist_ok=True)
        write_whole(kept, json.dumps(facts).encode())
        log.info("warm-up: top1 %.4f on its rows, val top1 %.4f", found.top1, facts[WARMUP_TOP1])
    return facts


def _kept_facts(path: Path) -> dict[str, Any]:
    """Return how the head of a run that goes on was fitted."""
    advice = f"remove the folder {path.parent} to begin the run again"
    facts = read_object(path, advice)
    top1 = facts.get(WARMUP_TOP1, 0.0)
    if type(top1) not in (int, float) or not 0 <= top1 <= 1:
        raise FinetuneError(f"{path} is not what a run writes: its {WARMUP_TOP1} is {top1!r}; {advice}")
    return facts


def _train(job: Job, recorders: Sequence[Recorder]) -> History:
    recipe, world, division = job.recipe, job.world, job.division

    def feed(part: Examples, batches: Any = None) -> Feed:
        return Feed(
            part.entries, part.codes, job.backbone.preprocessing, recipe, classes=len(job.classes),
            workers=job.workers, rank=world.rank, world=world.size, batches=batches, max_pixels=job.backbone.max_pixels,
        )  # fmt: skip

    def class_steps(epoch: int) -> Sequence[Rows]:
        return class_batches(
            division.train.codes, recipe.batch_size, balance=recipe.balance, processes=world.size, seed=recipe.seed,
            epoch=epoch,
        )  # fmt: skip

    learnt = feed(division.train, class_steps if recipe.loss in COMPARING else None)
    val, judge = feed(division.val), _judge(recipe.loss in METRIC_LOSSES)
    learning = sum(state.trainable for state in list_states(job.trainee, recipe)) if recipe.epochs else 0
    with job.stage("training", f"{counted(recipe.epochs, 'epoch')}, {learning:,} parameters learn"):
        history = train(
            job.trainee, learnt, recipe, job.folder.path,
            blocks=job.blocks, criterion=job.criterion, validate=lambda trainee: judge(trainee, val, world=world),
            identity=job.identity, world=world, recorders=recorders,
            progress=lambda moment: job.watch("training", moment),
        )  # fmt: skip
    job.failures.update({failure.id: failure.reason for part in (learnt, val) for failure in part.failures})
    return history


def _judge(metric: bool) -> Callable[..., dict[str, float]]:
    """Return what validates a trainee: its head, or how its embeddings find each other."""
    if metric:
        return validate_recall
    return validate_classes
