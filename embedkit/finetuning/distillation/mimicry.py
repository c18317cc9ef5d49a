"""Mimicry: how far a student is from what its teachers say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from embedkit.errors import FinetuneError
from embedkit.finetuning.training.distributed import World
from embedkit.finetuning.training.losses import Answers
from embedkit.finetuning.training.validation import outputs_of

if TYPE_CHECKING:
    from embedkit.finetuning.feeding.feed import Feed
    from embedkit.finetuning.trainee import Trainee

MIMICRIES = ("cosine", "mse")


class Mimicry(nn.Module):
    """The distance between a student's projected embeddings and the targets, averaged over the teachers.

    Parameters
    ----------
    widths : sequence of int
        How many of the targets' columns belong to each teacher.
    kind : {"cosine", "mse"}, default "cosine"
        One minus the cosine, which leaves lengths free; or the mean squared error, of targets whose variance is 1.

    Raises
    ------
    FinetuneError
        When there is no such distance.

    Examples
    --------
    >>> import torch
    >>> from types import SimpleNamespace
    >>> from embedkit.finetuning.distillation.mimicry import Mimicry
    >>> batch = SimpleNamespace(codes=torch.zeros(2), targets=torch.eye(2))
    >>> round(float(Mimicry([2])(torch.eye(2) * 3, torch.zeros(2, 8), batch)), 6)
    0.0
    """

    adds_up = True  # The mean of a batch is that of its parts' means, weighted by their images.

    def __init__(self, widths: Sequence[int], kind: str = "cosine") -> None:
        super().__init__()
        if kind not in MIMICRIES:
            raise FinetuneError(f"there is no distance {kind!r} of a student; choose one of {', '.join(MIMICRIES)}")
        self.widths, self.kind = tuple(widths), kind

    def forward(self, outputs: Tensor, embeddings: Tensor, batch: Answers) -> Tensor:
        """Return the mean distance () of outputs (b, d) from the batch's targets (b, d)."""
        assert batch.targets is not None
        return self.distances(outputs, batch.targets).sum() / max(1, len(outputs))

    def distances(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the distance of every image, of shape (b,)."""
        pairs = zip(_parts(outputs, self.widths), _parts(targets, self.widths), strict=True)
        if self.kind == "mse":
            return torch.stack([(found - wanted).square().mean(1) for found, wanted in pairs]).mean(0)
        return torch.stack([1 - nn.functional.cosine_similarity(*pair, dim=1) for pair in pairs]).mean(0)


@torch.no_grad()
def validate_mimicry(
    trainee: Trainee,
    feed: Feed,
    targets: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]],
    criterion: Mimicry,
    *,
    world: World | None = None,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """Return how well a student reproduces its teachers' embeddings of images that it does not learn from.

    Parameters
    ----------
    trainee : Trainee
        In evaluation mode.
    feed : Feed
        Its `validation` gives the images, plain.
    targets : callable
        Takes the feed's rows of shape (b,) and returns their targets of shape (b, d).
    criterion : Mimicry
        Says the widths, and the loss.
    world : World, optional
        The processes; by default this one alone.
    context : callable
        Opens the precision that the network computes in.

    Returns
    -------
    dict of str to float
        ``cosine``, the mean over images and teachers; with several teachers ``cosine_1``, ``cosine_2`` and so on, of
        each; and ``loss``, the mean of the criterion. Empty when there are no such images.
    """
    device, widths = next(trainee.parameters()).device, criterion.widths
    sums = torch.zeros(len(widths) + 2, dtype=torch.float64, device=device)
    for batch in feed.validation():
        if not len(batch.rows):  # None of its images can be read any more.
            continue
        outputs = outputs_of(trainee, batch, context)  # (b, d)
        wanted = torch.from_numpy(targets(batch.rows.cpu().numpy())).to(device)
        pairs = zip(_parts(outputs, widths), _parts(wanted, widths), strict=True)
        cosines = [nn.functional.cosine_similarity(*pair, dim=1).sum() for pair in pairs]
        loss = criterion.distances(outputs, wanted).sum()
        sums += torch.stack([*cosines, loss, outputs.new_tensor(len(outputs))]).double()
    *values, count = (world or World()).total(sums).tolist()
    if not count:
        return {}
    *cosine, loss = (value / count for value in values)
    each = {f"cosine_{number}": value for number, value in enumerate(cosine, 1)} if len(widths) > 1 else {}
    return {"cosine": sum(cosine) / len(widths), **each, "loss": loss}


def _parts(values: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the columns of each teacher."""
    return torch.split(values, list(widths), dim=1)
