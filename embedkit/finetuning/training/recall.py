"""How well a trainee's embeddings find pictures of the same class, for losses that have no head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from embedkit.finetuning.training.distributed import World
from embedkit.finetuning.training.steps import in_pieces

if TYPE_CHECKING:
    from embedkit.finetuning.feeding.feed import Feed
    from embedkit.finetuning.trainee import Trainee

RECALL_METRICS = ("recall@1",)
_BLOCK = 1024
_AT_ONCE = 64  # Images in a pass: without gradients, any machine that trains has memory for them.


@torch.no_grad()
def validate_recall(
    trainee: Trainee,
    feed: Feed,
    *,
    world: World | None = None,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """Return how often the nearest other validation image, by cosine, is of the same class.

    Parameters
    ----------
    trainee : Trainee
        In evaluation mode; its head is not asked.
    feed : Feed
        Its `validation` gives the images, plain.
    world : World, optional
        The processes; by default this one alone.
    context : callable
        Opens the precision that the network computes in.

    Returns
    -------
    dict of str to float
        ``recall@1`` over the images that are not alone in their class, a fraction in [0, 1]; empty when all are.
    """
    device = next(trainee.parameters()).device
    width = next(layer for layer in trainee.head.modules() if isinstance(layer, nn.Linear)).in_features
    # A process's share may be empty where another's is not.
    found, codes = [torch.zeros(0, width, device=device)], [torch.zeros(0, dtype=torch.int64, device=device)]
    for batch in feed.validation():
        for piece in in_pieces([batch], _AT_ONCE):
            with context():
                embeddings = trainee.embed(piece.pixels.to(device, non_blocking=True))  # (b, d)
            found.append(nn.functional.normalize(embeddings.float(), dim=1))
            codes.append(piece.codes.to(device))
    world = world or World()
    unit, labels = world.rows(torch.cat(found)), world.rows(torch.cat(codes))  # (n, d), (n,)
    right = asked = 0
    for start in range(0, len(unit), _BLOCK):
        cosines = unit[start : start + _BLOCK] @ unit.T  # (q, n)
        own = torch.arange(start, start + len(cosines), device=device)
        cosines[own - start, own] = -torch.inf
        same = labels[own, None] == labels
        company = same.sum(1) > 1
        right += int((labels[cosines.argmax(1)] == labels[own])[company].sum())
        asked += int(company.sum())
    return {"recall@1": right / asked} if asked else {}
