"""The training loop: one for fine-tuning and distillation, flat, and resumable after every epoch."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from embedkit.errors import FinetuneError
from embedkit.finetuning.blocks import Block, set_trainable
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.training.checkpoints import LAST, check_identity, load_facts, state_folder
from embedkit.finetuning.training.distributed import World
from embedkit.finetuning.training.history import EpochRow, History, Moment
from embedkit.finetuning.training.losses import LEAST_COMPARED
from embedkit.finetuning.training.optimisers import set_rates
from embedkit.finetuning.training.recorders import Recorder
from embedkit.finetuning.training.replicas import takes_statistics
from embedkit.finetuning.training.runs import Run, begin, identity_of, keep, load_best
from embedkit.finetuning.training.schedules import rate_factor
from embedkit.finetuning.training.steps import accumulate, in_pieces, is_out_of_memory, on_device
from embedkit.finetuning.training.validation import validate_classes
from embedkit.text import counted

if TYPE_CHECKING:
    from embedkit.finetuning.feeding.feed import Feed, TrainBatch
    from embedkit.finetuning.trainee import Trainee

log = logging.getLogger("embedkit")

_SMALLEST_SCALE = 2.0**-10  # Of fp16's losses: below it, the overflow is not the scale's fault.
_ONE = "one image's gradients"
_TRY = (
    "try a tenth of --body-lr and --head-lr, --clip-grad 1, a longer --warmup-epochs, or --amp-dtype bf16 or fp32; "
    "other settings need another folder"
)


def train(
    trainee: Trainee,
    feed: Feed,
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    blocks: Sequence[Block],
    criterion: nn.Module,
    validation: Feed | None = None,
    validate: Callable[[Trainee], dict[str, float]] | None = None,
    identity: Mapping[str, Any],
    world: World | None = None,
    recorders: Sequence[Recorder] = (),
    progress: Callable[[Moment], None] | None = None,
) -> History:
    """Train a network and its head, and leave the best epoch's weights in them.

    After every epoch the whole state is on disk. The same call, in a process that begins as this one did, goes on from
    there, and ends in the very weights of a run that nobody interrupted.

    Parameters
    ----------
    trainee : Trainee
        On the device that it is trained on.
    feed : Feed
        Its `epoch` gives the training images in batches.
    recipe : Recipe
        Every setting.
    folder : path-like
        Of the run: ``state/`` and ``epochs.csv`` are written there.
    blocks : sequence of Block
        As `blocks_of` returns them.
    criterion : nn.Module
        Called with outputs (b, c), embeddings (b, d), both float32, and the batch; returns their mean loss. Its
        parameters learn like the head's.
    validation : Feed, optional
        Its `validation` gives the images that the best epoch is chosen by.
    validate : callable, optional
        Returns metrics, of which ``recipe.metric`` chooses the best epoch: the greatest, of ``loss`` the least. Called
        in every process. By default `validate_classes` of `validation`; without either the last epoch is the best.
    identity : mapping of str to JSON values
        What must agree beside the recipe for a run to be resumed, such as digests of the backbone and the images.
    world : World, optional
        The processes that train together; by default this one alone.
    recorders : sequence of Recorder
        Called by the first process.
    progress : callable, optional
        Called after every update.

    Returns
    -------
    History
        All epochs, those before an interruption too.

    Raises
    ------
    FinetuneError
        When the folder holds another run, the loss is no number any more, or memory does not hold one image.
    """
    world = world or World()
    device = next(trainee.parameters()).device
    with _steady(device), ExitStack() as ending:
        run = begin(trainee, recipe, Path(folder), blocks, criterion, identity, world, device)
        judge = validate or _judge_of(validation, run)
        recorders = recorders if world.first else ()
        for recorder in recorders:
            recorder.begin(run.history.epochs)
            ending.callback(recorder.close)
        for epoch in range(len(run.history.epochs) + 1, recipe.epochs + 1):
            if run.history.stopped:
                break
            row = _train_epoch(run, feed, epoch, progress)
            row = _validate_epoch(run, row, judge)
            for recorder in recorders:
                recorder.record(row)
        load_best(run)
    return run.history


@contextmanager
def _steady(device: torch.device) -> Iterator[None]:
    """Leave the process's random numbers alone, and let cuDNN choose what gives the same sums each time."""
    settings, accelerated = torch.backends.cudnn, device.type == "cuda"
    before = settings.deterministic, settings.benchmark
    number = torch.cuda.current_device() if accelerated and device.index is None else device.index
    with torch.random.fork_rng([number] if accelerated else []):
        settings.deterministic, settings.benchmark = True, False
        try:
            yield
        finally:
            settings.deterministic, settings.benchmark = before


def _judge_of(validation: Feed | None, run: Run) -> Callable[[Trainee], dict[str, float]]:
    if validation is None:
        return lambda trainee: {}
    return lambda trainee: validate_classes(trainee, validation, world=run.world, context=run.context)


def resumable(
    folder: str | os.PathLike[str], identity: Mapping[str, Any], recipe: Recipe, *, world: World | None = None
) -> bool:
    """Whether `train` would go on from a state in this folder.

    Raises
    ------
    FinetuneError
        When the state is of another run, naming what differs, or damaged.
    """
    path = state_folder(folder) / LAST
    if not path.exists():
        return False
    check_identity(path, load_facts(path)["identity"], identity_of(identity, recipe, world or World()))
    return True


def _train_epoch(run: Run, feed: Feed, epoch: int, progress: Callable[[Moment], None] | None) -> EpochRow:
    recipe, world = run.recipe, run.world
    set_trainable(run.trainee, run.blocks, recipe, epoch)
    run.criterion.train()
    updates = -(-feed.steps // recipe.grad_accum_steps)
    images, summed, before, skipped = 0, 0.0, None, 0
    rates: dict[str, float] = {}
    started = time.perf_counter()
    with closing(feed.epoch(epoch)) as batches:
        for step in range(updates):
            factor = run.plateau.factor * rate_factor(recipe, (epoch - 1) * updates + step, updates)
            for name, rate in set_rates(run.optimiser, factor).items():
                rates[name] = rates.get(name, 0.0) + rate / updates
            _seed(recipe.seed, epoch, step, world.rank)
            group = [on_device(batch, run.device) for batch in islice(batches, recipe.grad_accum_steps)]
            count, loss, norm, left_out = _update(run, group)
            skipped += left_out
            # Of the step before: a look at its numbers does not wait for this one, where an accelerator computes.
            summed += _checked(run, before, epoch, step)
            before = (count, loss, norm)
            if progress is not None and world.first:
                mean = summed / images if images else float(loss)
                progress(_moment(run, feed, epoch, (step + 1) / updates, images + count, mean, started))
            images += count
        assert next(batches, None) is None, "the feed gives more batches than it said"
    summed += _checked(run, before, epoch, updates)
    if not images:
        first = f": {feed.failures[0]}" if feed.failures else ""
        raise FinetuneError(f"none of the {feed.images} training images can be read{first}")
    seconds = time.perf_counter() - started
    failed = int(world.total(torch.tensor(len(feed.failures), device=run.device)))
    return EpochRow(epoch, summed / images, {}, rates, images, failed, seconds, run.at_once, skipped)


def _seed(*numbers: int) -> None:
    """Let a step's chances be those of its number: a resumed run draws what an unbroken one would."""
    key = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(key) >> 1)


def _update(run: Run, batches: Sequence[TrainBatch]) -> tuple[int, Tensor, Tensor, bool]:
    """Move the weights once; return images, mean loss, the gradients' norm, and whether fp16 left the update out."""
    recipe, parameters = run.recipe, run.parameters
    images = sum(len(batch.rows) for batch in batches)
    loss = _gradients(run, batches, images)
    images, loss = run.world.add_gradients(parameters, images, loss)
    if not images:
        return 0, loss, loss, False
    run.scaler.unscale_(run.optimiser)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if recipe.clip_grad:
        nn.utils.clip_grads_with_norm_(parameters, recipe.clip_grad, norm)
    scale = run.scaler.get_scale()
    try:
        run.scaler.step(run.optimiser)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise FinetuneError(
                "memory does not hold what the optimiser keeps; try --opt sgd, or fewer blocks to --unfreeze"
            ) from error
        raise
    run.scaler.update()
    left_out = run.scaler.get_scale() < scale
    if run.average is not None and not left_out:
        run.average.update()
    return images, loss, norm, left_out


def _gradients(run: Run, batches: Sequence[TrainBatch], images: int) -> Tensor:
    """Fill the gradients of the mean loss; where memory runs out, from smaller pieces, for the rest of the run."""
    if not images:
        run.optimiser.zero_grad(set_to_none=True)
        return torch.zeros((), device=run.device)
    while True:
        run.optimiser.zero_grad(set_to_none=True)
        pieces = list(in_pieces(batches, run.at_once))
        try:
            return accumulate(run.trainee, run.criterion, pieces, images, run.context, run.scaler.scale)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            run.at_once = _fewer(run, max(len(piece.rows) for piece in pieces), error)
        # Outside the handler: the error holds on to what the failed pass had made.
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory: %d images at once from now on, and %s", run.at_once, _consequence(run))


def _fewer(run: Run, images: int, error: RuntimeError) -> int:
    """Return how many images to try at once where so many are too many; raise FinetuneError at the least."""
    compares = not getattr(run.criterion, "adds_up", False)
    least = LEAST_COMPARED if compares else 1
    if images <= least:
        needs = f"the gradients of {images} images, and the loss {run.recipe.loss} compares no fewer than {least}"
        raise FinetuneError(
            f"memory does not hold {needs if compares else _ONE}; try --grad-checkpointing, a smaller --img-size, "
            "--amp-dtype bf16, or fewer blocks to --unfreeze"
        ) from error
    return max(least, -(-images // 2))


def _consequence(run: Run) -> str:
    if getattr(run.criterion, "adds_up", False):
        kept = "; batch normalisation learns no statistics of single images"
        return f"their gradients are added up{kept if run.at_once == 1 and takes_statistics(run.trainee) else ''}"
    return f"the loss {run.recipe.loss} compares no more than these with one another: it is another loss than before"


def _checked(run: Run, step: tuple[int, Tensor, Tensor] | None, epoch: int, number: int) -> float:
    """Return the sum of a step's losses; raise FinetuneError where it, or its gradient, is no number."""
    if step is None:
        return 0.0
    images, loss, norm = step[0], float(step[1]), float(step[2])
    scaled = run.scaler.is_enabled()
    if math.isfinite(loss) and (math.isfinite(norm) or (scaled and run.scaler.get_scale() > _SMALLEST_SCALE)):
        return loss * images
    what = "the loss" if not math.isfinite(loss) else "the gradient"
    kept = f"the state after epoch {epoch - 1} is kept; " if epoch > 1 else ""
    raise FinetuneError(f"{what} is no finite number in epoch {epoch}, update {number}; {kept}{_TRY}")


def _moment(run: Run, feed: Feed, epoch: int, share: float, images: int, loss: float, started: float) -> Moment:
    seconds, ahead, total = time.perf_counter() - started, run.recipe.epochs - epoch, feed.images
    left = seconds / share * (ahead + 1 - share) + run.validating * (ahead + 1)
    return Moment(epoch, run.recipe.epochs, round(total * share), total, loss, images / seconds, left)


def _validate_epoch(run: Run, row: EpochRow, judge: Callable[[Trainee], dict[str, float]]) -> EpochRow:
    recipe, epoch = run.recipe, row.epoch
    started = time.perf_counter()
    run.trainee.eval()
    run.criterion.eval()
    with run.average.lent() if run.average else nullcontext():
        run.world.share_values(run.trainee)
        metrics = judge(run.trainee)
        score = _score(metrics, recipe, row.loss)
        counts = bool(metrics) or not run.history.judged  # An epoch that nothing judged replaces none that was.
        better = counts and (not metrics or not run.history.judged or score > run.best_score)
        best = {f"trainee.{name}": value.clone() for name, value in run.trainee.state_dict().items()} if better else {}
    run.validating = time.perf_counter() - started
    row = replace(row, metrics=metrics)
    best_epoch = epoch if better else run.history.best_epoch
    run.best_score = score if better else run.best_score
    run.plateau = run.plateau.after(score, recipe) if recipe.sched == "plateau" and counts else run.plateau
    waited = epoch - best_epoch
    stopped = (
        f"no better {recipe.metric} in {counted(waited, 'epoch')}"
        if recipe.patience and waited >= recipe.patience
        else ""
    )
    run.history = History((*run.history.epochs, row), best_epoch, stopped)
    if run.world.first:
        keep(run, best)
    _say(run, row)
    run.world.total(torch.zeros(1, device=run.device))  # No process is an epoch ahead of the state on disk.
    return row


def _score(metrics: Mapping[str, float], recipe: Recipe, loss: float) -> float:
    """Return what an epoch is judged by, greater is better; without validation its training loss."""
    if not metrics:
        return -loss
    if recipe.metric not in metrics:
        raise FinetuneError(f"no validation metric is called {recipe.metric!r}; choose one of {', '.join(metrics)}")
    value = -metrics[recipe.metric] if recipe.metric == "loss" else metrics[recipe.metric]
    return -math.inf if math.isnan(value) else value


def _say(run: Run, row: EpochRow) -> None:
    if not run.world.first:
        return
    recipe = run.recipe
    left = (row.seconds + run.validating) * (recipe.epochs - row.epoch)
    metrics = "".join(f", val {name} {value:.4f}" for name, value in row.metrics.items() if name == recipe.metric)
    best = " (best)" if row.metrics and run.history.best_epoch == row.epoch else ""
    rates = [rate for rate in row.rates.values() if rate]
    span = f"{min(rates):.2g} to {max(rates):.2g}" if rates else "0"
    failed = f", {counted(row.failed, 'image')} could not be read" if row.failed else ""
    log.info(
        "epoch %d of %d: loss %.4f%s%s, %.0f images/s, lr %s%s%s", row.epoch, recipe.epochs, row.loss, metrics, best,
        row.images_per_second, span, failed, f", {_spell(left)} left" if left and not run.history.stopped else "",
    )  # fmt: skip
    if run.history.stopped:
        log.info("stops early: %s", run.history.stopped)


def _spell(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
