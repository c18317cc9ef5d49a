"""How well a trainee tells the validation images apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embedkit.finetuning.distributed import World
from embedkit.finetuning.steps import in_pieces, is_out_of_memory

if TYPE_CHECKING:
    from embedkit.finetuning.feed import Feed, TrainBatch
    from embedkit.finetuning.trainee import Trainee


@torch.no_grad()
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
    device = next(trainee.parameters()).device
    sums: Tensor | None = None
    for batch in feed.validation():
        if not len(batch.rows):
            continue
        logits = outputs_of(trainee, batch, context)  # (b, c)
        codes = batch.codes.to(device)  # (b,)
        if sums is None:
            sums = torch.zeros(3, logits.shape[1], dtype=torch.float64, device=device)
        losses = nn.functional.cross_entropy(logits, codes, reduction="none")
        for row, values in zip(sums, (torch.ones_like(losses), logits.argmax(1) == codes, losses), strict=True):
            row.index_add_(0, codes, values.double())
    if sums is None:  # This process's share may be empty where another's is not.
        answers = [layer for layer in trainee.head.modules() if isinstance(layer, nn.Linear)][-1].out_features
        sums = torch.zeros(3, answers, dtype=torch.float64, device=device)
    counts, right, losses = (world or World()).total(sums)  # (c,) each
    if not (n := float(counts.sum())):
        return {}
    seen = counts > 0
    return {
        "top1": float(right.sum()) / n,
        "mean_class_accuracy": float((right[seen] / counts[seen]).mean()),
        "loss": float(losses.sum()) / n,
    }


@torch.no_grad()
def outputs_of(
    trainee: Trainee, batch: TrainBatch, context: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Tensor:
    """Return the head's answers (b, c) in float32 for a batch, in as many parts as the memory asks for."""
    device = next(trainee.parameters()).device
    most = len(batch.rows)
    while True:
        try:
            with context():
                found = [trainee(each.pixels.to(device, non_blocking=True)) for each in in_pieces([batch], most)]
            return torch.cat(found).float()
        except RuntimeError as error:
            if not is_out_of_memory(error) or most == 1:
                raise
        most = -(-most // 2)
