"""How well a trainee tells the validation images apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embedkit.finetuning.training.distributed import World
from embedkit.finetuning.training.norms import fold_pairs, standing_in
from embedkit.finetuning.training.shares import at_once
from embedkit.finetuning.training.steps import in_pieces, in_shares, is_out_of_memory, on_device
from embedkit.finetuning.training.ways import way_of

if TYPE_CHECKING:
    from embedkit.finetuning.feeding.feed import Feed, TrainBatch
    from embedkit.finetuning.trainee import Trainee

CLASS_METRICS = ("top1", "mean_class_accuracy", "loss")


def validate_classes(
    trainee: Trainee,
    feed: Feed,
    *,
    world: World | None = None,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """Return how well a trainee's head classifies the validation images, each process doing its share.

    Parameters
    ----------
    trainee : Trainee
        In evaluation mode.
    feed : Feed
        Its `validation` gives the images, plain.
    world : World, optional
        The processes; by default this one alone.
    context : callable
        Opens the precision that the network computes in.

    Returns
    -------
    dict of str to float
        ``top1`` and ``mean_class_accuracy``, fractions in [0, 1], and ``loss``, the mean cross-entropy. Empty when
        there are no such images.
    """
    world = world or World()
    sums: Tensor | None = None
    for batch in feed.validation():
        if not len(batch.rows):
            continue
        logits, codes = outputs_of(trainee, batch, context).cpu(), batch.codes.cpu()  # (b, c), (b,)
        losses = nn.functional.cross_entropy(logits, codes, reduction="none")
        if sums is None:
            sums = torch.zeros(3, logits.shape[1], dtype=torch.float64)
        for row, values in zip(sums, (torch.ones_like(losses), logits.argmax(1) == codes, losses), strict=True):
            row.index_add_(0, codes, values.double())
    if sums is None:  # This process's share may be empty where another's is not.
        answers = [layer for layer in trainee.head.modules() if isinstance(layer, nn.Linear)][-1].out_features
        sums = torch.zeros(3, answers, dtype=torch.float64)
    if world.size > 1:
        sums = world.total(sums.to(next(trainee.parameters()).device)).cpu()
    counts, right, losses = sums  # (c,) each
    if not (n := float(counts.sum())):
        return {}
    seen = counts > 0
    return {
        "top1": float(right.sum()) / n,
        "mean_class_accuracy": float((right[seen] / counts[seen]).mean()),
        "loss": float(losses.sum()) / n,
    }


def outputs_of(
    trainee: Trainee, batch: TrainBatch, context: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Tensor:
    """Return the head's answers (b, c) in float32 for a batch that is not empty, in as many parts as memory asks for.

    Parameters
    ----------
    trainee : Trainee
        In evaluation mode.
    batch : TrainBatch
        On any device.
    context : callable
        Opens the precision that the network computes in.
    """
    batch = on_device(batch, next(trainee.parameters()).device)
    most = len(batch.rows)
    while True:
        try:
            return torch.cat([_answers(trainee, piece, context) for piece in in_pieces([batch], most)])
        except RuntimeError as error:
            if not is_out_of_memory(error) or most == 1:
                raise
        most = -(-most // 2)


def _answers(trainee: Trainee, piece: TrainBatch, context: Callable[[], AbstractContextManager[object]]) -> Tensor:
    @torch.no_grad()  # In each thread: it is a setting of its own.
    def compute(share: Sequence[TrainBatch]) -> Tensor:
        with context():
            return torch.cat([trainee(part.pixels).float() for part in share])

    way = way_of(trainee, piece.pixels)
    shares = in_shares([piece], torch.get_num_threads()) if way.is_divisible else [[piece]]
    with torch.no_grad(), standing_in(fold_pairs(way.pairs)):
        return torch.cat(at_once([share for share in shares if share], compute))
