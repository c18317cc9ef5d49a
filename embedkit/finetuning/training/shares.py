"""Gradients of a batch in shares: one for each processor, each computed by a single thread.

Several threads for each layer wait for one another at its end, and a small network has hundreds of ends. A share for
each processor waits once an update. The shares' gradients are summed in their order, so that the sum is the same
whichever comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

from embedkit.finetuning.training.norms import Folded, standing_in

Part = TypeVar("Part")
Share = TypeVar("Share")
Made = TypeVar("Made")


def sum_gradients(
    shares: Sequence[Sequence[Part]],
    loss_of: Callable[[Part], Tensor],
    parameters: Sequence[Tensor],
    *,
    folded: Sequence[Folded] = (),
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Add the gradients of a sum of losses to some parameters.

    Parameters
    ----------
    shares : sequence of sequences
        The parts of each share. A share's parts are computed one after the other, the shares at the same time.
    loss_of : callable
        Returns the loss () of a part; called in threads, so it must leave the network as it is.
    parameters : sequence of Tensor
        What learns. Those that no loss depends on are left alone.
    folded : sequence of Folded
        What stands in for some of the parameters meanwhile.
    scale : callable, optional
        What a loss is multiplied with before its gradients are taken.

    Returns
    -------
    Tensor
        The sum of the losses (), not scaled.
    """
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for each in folded for tensor in _tensors(each)]
    inside = [Folded(each.pair, *leaves[2 * k : 2 * k + 2]) for k, each in enumerate(folded)]
    learning = [leaf for leaf in leaves if leaf.requires_grad]
    wanted = [*parameters, *learning]

    def compute(parts: Sequence[Part]) -> tuple[Tensor, list[Tensor | None]]:
        total = torch.zeros((), device=wanted[0].device)
        gradients: list[Tensor | None] = [None] * len(wanted)
        for part in parts:
            loss = loss_of(part)
            total += loss.detach()
            found = torch.autograd.grad(loss if scale is None else scale(loss), wanted, allow_unused=True)
            gradients = _added(gradients, found)
        return total, gradients

    with standing_in(inside):
        results = at_once([share for share in shares if share], compute)
    total, gradients = results[0]
    for loss, more in results[1:]:
        total, gradients = total + loss, _added(gradients, more)
    for parameter, gradient in zip(parameters, gradients, strict=False):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    _through(folded, gradients[len(parameters) :])
    return total


def at_once(shares: Sequence[Share], compute: Callable[[Share], Made]) -> list[Made]:
    """Return what becomes of each share, in their order; a single one is computed with all threads.

    Parameters
    ----------
    shares : sequence
        What each thread computes.
    compute : callable
        Called in threads, each of which computes by itself.
    """
    if len(shares) == 1:
        return [compute(shares[0])]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(shares), "embedkit-share", torch.set_num_threads, (1,)) as pool:
            futures = [pool.submit(compute, share) for share in shares]
            wait(futures)  # Before the first error is raised: the others still use the network.
    finally:
        torch.set_num_threads(threads)  # For threads to come: the number is the process's too.
    return [future.result() for future in futures]


def _added(sums: list[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add gradients to their sums, in place; parameters that were not reached have none.

    A first one is copied: autograd may return one tensor for two parameters, or one number for all of a parameter's.
    """
    both = [(each, other) for each, other in zip(sums, more, strict=True) if each is not None and other is not None]
    if both:
        torch._foreach_add_([each for each, _ in both], [other for _, other in both])
    return [
        other.clone() if each is None and other is not None else each for each, other in zip(sums, more, strict=True)
    ]


def _tensors(folded: Folded) -> tuple[Tensor, Tensor]:
    return folded.weight, folded.bias


def _through(folded: Sequence[Folded], gradients: Sequence[Tensor | None]) -> None:
    """Pass the gradients of what stood in on to what it was made of."""
    learning = [tensor for each in folded for tensor in _tensors(each) if tensor.requires_grad]
    reached = [(tensor, found) for tensor, found in zip(learning, gradients, strict=True) if found is not None]
    if reached:
        tensors, found = zip(*reached, strict=True)
        torch.autograd.backward(tensors, found)
