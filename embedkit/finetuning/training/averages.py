"""A moving average of weights, which often validates better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """An exponential moving average of a module's parameters and buffers.

    Parameters
    ----------
    module : nn.Module
        Whose values are averaged; the average begins with them.
    decay : float
        Share of the average that an update leaves, in (0, 1).

    Notes
    -----
    The n-th update leaves at most ``n / (n + 9)``, so that a short run does not keep its first weights (as TensorFlow's
    ExponentialMovingAverage with ``num_updates``). It is kept beside the module, not as a copy of it: a network may
    hold hooks that a copy would share.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's values in."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        current = self.module.state_dict()
        moving = [name for name, value in self.values.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.values[name] for name in moving], [current[name] for name in moving], weight=1 - decay
        )
        for name in self.values.keys() - set(moving):
            self.values[name].copy_(current[name])

    def load(self, values: Mapping[str, Tensor], updates: int) -> None:
        """Go on from an average that was saved."""
        for name, value in self.values.items():
            value.copy_(values[name])
        self.updates = updates

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the module hold the average for a while."""
        own = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        _copy(self.values, self.module)
        try:
            yield
        finally:
            _copy(own, self.module)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], module: nn.Module) -> None:
    for name, value in module.state_dict().items():
        value.copy_(values[name])
