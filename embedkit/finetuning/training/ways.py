"""Way: what may be done to a network's passes so that they are faster and their gradients the same."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embedkit.finetuning.training.norms import Pair, find_pairs
from embedkit.finetuning.training.replicas import lend_replicas, takes_statistics

if TYPE_CHECKING:
    from embedkit.finetuning.trainee import Trainee

_EXAMPLES = 2


@dataclass(frozen=True)
class Way:
    """What may be done to a trainee's passes in the modes that its modules have now.

    Attributes
    ----------
    pairs : sequence of Pair
        Normalisations that can be worked into convolutions while their statistics are frozen.
    is_divisible : bool
        Whether a batch may be computed in parts, by several threads at once: on a processor, when nothing draws by
        chance, from numbers that all threads share.
    takes_statistics : bool
        Whether they need replicas for it, because statistics are taken of what a thread computes.
    """

    pairs: Sequence[Pair]
    is_divisible: bool
    takes_statistics: bool


_ways: weakref.WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], Way]] = weakref.WeakKeyDictionary()


def way_of(trainee: Trainee, pixels: Tensor) -> Way:
    """Return what may be done to a trainee's passes, tried out once for every set of modes.

    Parameters
    ----------
    trainee : Trainee
        Is left as it is, and so are the generators of chance.
    pixels : Tensor of shape (b, 3, h, w)
        Real crops: some of them are what it is tried on.
    """
    known = _ways.setdefault(trainee, {})
    modes = tuple(module.training for module in trainee.modules())
    if modes not in known:
        examples = pixels[:_EXAMPLES]
        pairs = next(iter(known.values())).pairs if known else _pairs(trainee, examples)
        known[modes] = Way(pairs, _is_divisible(trainee, examples), takes_statistics(trainee))
    return known[modes]


def _pairs(trainee: Trainee, examples: Tensor) -> list[Pair]:
    with _evaluating(trainee):
        return find_pairs(trainee.network, examples)


def _is_divisible(trainee: Trainee, examples: Tensor) -> bool:
    if examples.device.type != "cpu":
        return False
    (replica,) = lend_replicas(trainee, 1)  # Whose statistics may move.
    before = torch.get_rng_state()
    with torch.no_grad():
        replica(examples)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    return torch.equal(before, after)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Have a module in evaluation mode inside, and each of its parts in its own mode again after."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode
