"""One update's gradients, from as many pieces as the memory asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embedkit.finetuning.training.norms import fold_pairs
from embedkit.finetuning.training.replicas import (
    lend_replicas,
    return_replicas,
    statistics_kept,
    takes_statistics,
)
from embedkit.finetuning.training.shares import sum_gradients
from embedkit.finetuning.training.ways import way_of

if TYPE_CHECKING:
    from embedkit.finetuning.feeding.feed import TrainBatch
    from embedkit.finetuning.trainee import Trainee

# What one thread computes together: enough that the cost of a part is small, and its memory too. Small images by more.
_AT_ONCE, _PIXELS_AT_ONCE = 16, 16 * 224 * 224
# Raised by the accelerator's allocator, or by the system's.
_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def accumulate(
    trainee: Trainee,
    criterion: nn.Module,
    pieces: Sequence[TrainBatch],
    total: int,
    context: Callable[[], AbstractContextManager[object]],
    scale: Callable[[Tensor], Tensor],
) -> Tensor:
    """Add the gradients of a mean loss to the parameters, piece by piece.

    On a processor, a piece whose images have nothing to do with one another is shared out: see `sum_gradients`. For a
    piece of a single image, batch normalisation keeps the statistics that it has.

    Parameters
    ----------
    trainee : Trainee
        The network and its head.
    criterion : nn.Module
        Called with outputs (b, c), embeddings (b, d), both float32, and the batch; returns their mean loss.
    pieces : sequence of TrainBatch
        What one update learns from, on the trainee's device.
    total : int
        Images in all pieces: a piece counts by its share of them.
    context : callable
        Opens the precision that the network computes in.
    scale : callable
        What the loss is multiplied with before the backward pass, for fp16.

    Returns
    -------
    Tensor
        The mean loss (), not scaled.
    """

    def loss_of(part: tuple[Trainee, TrainBatch]) -> Tensor:
        network, piece = part
        with context():
            embeddings = network.embed(piece.pixels)  # (b, 3, h, w) -> (b, d)
            outputs = network.head(embeddings)  # (b, d) -> (b, c)
        loss: Tensor = criterion(outputs.float(), embeddings.float(), piece)
        return loss * (len(piece.rows) / total)

    single = [piece for piece in pieces if len(piece.rows) == 1]
    if single and takes_statistics(trainee):
        more = [piece for piece in pieces if len(piece.rows) > 1]
        with statistics_kept(trainee):
            loss = accumulate(trainee, criterion, single, total, context, scale)
        return loss + accumulate(trainee, criterion, more, total, context, scale) if more else loss
    way = way_of(trainee, pieces[0].pixels)
    learning = [each for each in (*trainee.parameters(), *criterion.parameters()) if each.requires_grad]
    folded, threads = fold_pairs(way.pairs), torch.get_num_threads()
    # The statistics of a single image are none.
    enough = not way.takes_statistics or min(len(piece.rows) for piece in pieces) >= 2 * threads
    if not (way.is_divisible and enough and getattr(criterion, "adds_up", False)):
        return sum_gradients([[(trainee, piece) for piece in pieces]], loss_of, learning, folded=folded, scale=scale)
    if not way.takes_statistics:
        shares = in_shares(pieces, threads)
        parts = [[(trainee, piece) for piece in share] for share in shares]
        return sum_gradients(parts, loss_of, learning, folded=folded, scale=scale)
    # Statistics want as many images as there are: a share is not cut further. Its folds are the trainee's, not theirs.
    shares = in_shares(pieces, threads, whole=True)
    replicas = lend_replicas(trainee, threads)
    parts = [[(replica, piece) for piece in share] for replica, share in zip(replicas, shares, strict=True)]
    loss = sum_gradients(parts, loss_of, learning, scale=scale)
    return_replicas(trainee, replicas, [sum(len(piece.rows) for piece in share) for share in shares])
    return loss


def in_shares(pieces: Sequence[TrainBatch], count: int, *, whole: bool = False) -> list[list[TrainBatch]]:
    """Return an equal share of the images for each of `count` threads, cut into what caches hold unless `whole`."""
    shares: list[list[TrainBatch]] = [[] for _ in range(count)]
    for piece in pieces:
        for share, part in zip(shares, in_pieces([piece], -(-len(piece.rows) // count)), strict=False):
            at_once = max(_AT_ONCE, _PIXELS_AT_ONCE // part.pixels[0, 0].numel())
            share += [part] if whole else in_pieces([part], at_once)
    return shares


def in_pieces(batches: Sequence[TrainBatch], most: int) -> Iterator[TrainBatch]:
    """Yield every batch in parts of so many images at most, of which none has two more than another."""
    for batch in batches:
        count = len(batch.rows)
        parts = -(-count // most)
        for part in range(parts):
            span = slice(part * count // parts, (part + 1) * count // parts)
            yield replace(
                batch, pixels=batch.pixels[span], codes=batch.codes[span], rows=batch.rows[span],
                targets=None if batch.targets is None else batch.targets[span],
            )  # fmt: skip


def on_device(batch: TrainBatch, device: torch.device) -> TrainBatch:
    """Return a batch with all its tensors on a device."""
    pixels, codes, rows = (each.to(device, non_blocking=True) for each in (batch.pixels, batch.codes, batch.rows))
    targets = None if batch.targets is None else batch.targets.to(device, non_blocking=True)
    return replace(batch, pixels=pixels, codes=codes, rows=rows, targets=targets)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of PyTorch says that there is no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in _MEMORY_WORDS)
