"""Replicas: copies of a trainee that share its parameters, each with statistics of its own.

Batch normalisation that learns its statistics cannot be shared between threads: each would write what the other reads.
Each thread has a replica, normalises its own share of a batch (ghost batch normalisation), and moves running statistics
of its own; afterwards the trainee's are the mean of theirs.

Hoffer, Hubara, Soudry, "Train longer, generalize better", 2017.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from embedkit.finetuning.trainee import Trainee

Module = TypeVar("Module", bound=nn.Module)

_replicas: weakref.WeakKeyDictionary[nn.Module, list[Trainee]] = weakref.WeakKeyDictionary()


def lend_replicas(trainee: Trainee, count: int) -> list[Trainee]:
    """Return replicas of a trainee, in its modes and with its statistics as they are now.

    Parameters
    ----------
    trainee : Trainee
    count : int
        How many.

    Returns
    -------
    list of Trainee
        The same ones at the next call.
    """
    found = _replicas.setdefault(trainee, [])
    found += [_replica(trainee) for _ in range(count - len(found))]
    for replica in found[:count]:
        for own, other in zip(trainee.modules(), replica.modules(), strict=True):
            other.training = own.training
        for now, before in zip(statistics_of(trainee), statistics_of(replica), strict=True):
            before.copy_(now)
    return found[:count]


def return_replicas(trainee: Trainee, replicas: list[Trainee], images: list[int]) -> None:
    """Give a trainee the mean of its replicas' statistics, weighted by the images that each of them saw."""
    shares = torch.tensor(images, dtype=torch.float32) / max(1, sum(images))
    for own, *theirs in zip(statistics_of(trainee), *map(statistics_of, replicas), strict=True):
        own.copy_(torch.tensordot(shares, torch.stack(theirs), 1))


def takes_statistics(trainee: nn.Module) -> bool:
    """Return whether any batch normalisation of a trainee is learning its statistics."""
    return any(module.training for module in trainee.modules() if isinstance(module, _BatchNorm))


@contextmanager
def statistics_kept(trainee: nn.Module) -> Iterator[None]:
    """Have batch normalisation use the statistics that it has inside, and learn none: a single image has none."""
    norms = [module for module in trainee.modules() if isinstance(module, _BatchNorm) and module.training]
    try:
        for norm in norms:
            norm.training = False
        yield
    finally:
        for norm in norms:
            norm.training = True


def statistics_of(trainee: nn.Module) -> list[Tensor]:
    """Return the running means and variances of a trainee."""
    norms = [module for module in trainee.modules() if isinstance(module, _BatchNorm)]
    return [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]


def _replica(trainee: Trainee) -> Trainee:
    network = _shallow(trainee.network)
    # What the memo names is not copied: parameters are the very same ones.
    network._modules["model"] = copy.deepcopy(trainee.network.model, {id(each): each for each in trainee.parameters()})
    replica = _shallow(trainee)
    replica._modules["network"] = network
    return replica


def _shallow(module: Module) -> Module:
    """Return a copy of a module that holds the same children, but in a dictionary of its own."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin
