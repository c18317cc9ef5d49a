"""Frozen batch normalisation, worked into the convolutions before it while gradients are computed.

With its statistics frozen, a normalisation is one multiplication and one addition for each channel, and a convolution
can do both: with weights times s and a bias of shift - mean * s, where s = scale / sqrt(variance + eps). Written that
way the network is the same function of the same parameters, so its gradients are the same too, but for rounding; the
normalisations' own passes over the feature maps, forward and backward, are gone, and what they would have kept is not
kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from embedkit.backbones import import_timm

_CLOSE = 1e-3  # Of the largest number in an embedding: rounding stays far below, another function does not.


@dataclass(frozen=True)
class Pair:
    """A convolution, and the normalisation that alone reads what it returns."""

    convolution: nn.Conv2d
    norm: Any


@dataclass(frozen=True)
class Folded:
    """What stands in for a pair's parameters: of the same shapes as a convolution's weight and bias."""

    pair: Pair
    weight: Tensor
    bias: Tensor


def find_pairs(module: nn.Module, example: Tensor) -> list[Pair]:
    """Return the normalisations of a module that can be worked into a convolution.

    Parameters
    ----------
    module : nn.Module
        Returns a Tensor, or a tuple that begins with one.
    example : Tensor of shape (b, 3, h, w)
        What it is tried on: where folding all pairs changes what it returns, none is returned.
    """
    pairs = _neighbours(module, example)
    if not pairs:
        return []
    with torch.no_grad(), _disturbed(pairs):
        before = _first(module(example))
        with standing_in(fold_pairs(pairs)):
            after = _first(module(example))
    close = bool((after - before).abs().max() <= _CLOSE * before.abs().max())  # False of NaN.
    return pairs if close else []


@contextmanager
def _disturbed(pairs: Sequence[Pair]) -> Iterator[None]:
    """Have all statistics a little otherwise inside: a new normalisation does nothing, and nobody would miss it."""
    before = [(pair.norm.running_mean.clone(), pair.norm.running_var.clone()) for pair in pairs]
    try:
        for pair in pairs:
            pair.norm.running_mean.add_(pair.norm.running_var.sqrt(), alpha=0.05)
            pair.norm.running_var.mul_(1.1)
        yield
    finally:
        for pair, (mean, variance) in zip(pairs, before, strict=True):
            pair.norm.running_mean.copy_(mean)
            pair.norm.running_var.copy_(variance)


def fold_pairs(pairs: Sequence[Pair]) -> list[Folded]:
    """Return folded weights and biases of those pairs whose statistics are frozen now; gradients flow through them."""
    folded = []
    for pair in pairs:
        norm, convolution = pair.norm, pair.convolution
        if norm.training:
            continue
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        if convolution.bias is not None:
            shift = shift + convolution.bias * scale
        folded.append(Folded(pair, convolution.weight * scale.view(-1, 1, 1, 1), shift))
    return folded


@contextmanager
def standing_in(folded: Sequence[Folded]) -> Iterator[None]:
    """Have convolutions use folded weights inside, and their normalisations do nothing but activate.

    For all threads at once: what else uses the module meanwhile sees the same numbers.
    """
    before = [(dict(each.pair.convolution._parameters), each.pair.convolution.dilation) for each in folded]
    try:
        for each in folded:
            stand_ins: dict[str, Any] = {"weight": each.weight, "bias": each.bias}  # Plain tensors, for a while.
            each.pair.convolution._parameters.update(stand_ins)
            each.pair.norm.forward = _Activation(each.pair.norm)
            if each.pair.convolution.kernel_size == (1, 1):
                # A single weight has no neighbours to be far from, but PyTorch leaves a small batch in a single thread
                # to oneDNN only when it is dilated, and its other routine takes up to twice the time.
                each.pair.convolution.dilation = (2, 2)
        yield
    finally:
        for each, (parameters, dilation) in zip(folded, before, strict=True):
            each.pair.convolution._parameters.update(parameters)
            each.pair.convolution.dilation = dilation
            each.pair.norm.__dict__.pop("forward", None)


class _Activation:
    """What is left of a normalisation when its numbers are somewhere else."""

    def __init__(self, norm: Any) -> None:
        self.drop, self.act = getattr(norm, "drop", None), getattr(norm, "act", None)

    def __call__(self, features: Tensor) -> Tensor:
        for function in (self.drop, self.act):
            if function is not None:
                features = function(features)
        return features


def _neighbours(module: nn.Module, example: Tensor) -> list[Pair]:
    """Return the pairs of which the second is called with what the first has returned, and each is called once."""
    kinds = (nn.BatchNorm2d, import_timm().layers.BatchNormAct2d)
    returned: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # The tensors are kept, so that no two have one id.
    calls: dict[nn.Module, int] = {}
    found: list[Pair] = []

    def after(convolution: nn.Conv2d, inputs: Any, output: Tensor) -> None:
        calls[convolution] = calls.get(convolution, 0) + 1
        returned[id(output)] = (convolution, output)

    def before(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[norm] = calls.get(norm, 0) + 1
        if id(inputs[0]) in returned:
            found.append(Pair(returned[id(inputs[0])][0], norm))

    hooks = []
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            hooks.append(each.register_forward_hook(after))
        elif type(each) in kinds and not each.training and each.affine and each.track_running_stats:
            hooks.append(each.register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in found if calls[pair.convolution] == 1 and calls[pair.norm] == 1]


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor.float()
