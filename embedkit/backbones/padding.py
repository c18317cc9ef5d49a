"""TensorFlow's padding, worked into the kernels: an engine for one size need not look at sizes in every pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from embedkit.backbones.network import Network
from embedkit.backbones.timm_import import import_timm

Sizes = dict[str, set[tuple[int, ...]]]


def with_fixed_padding(network: Network, example: Tensor) -> Network:
    """Return a network for crops of one size whose convolutions all pad by themselves.

    TensorFlow pads an odd number of rows by one more behind than in front, which no convolution of PyTorch's can, so
    timm copies the image into a larger one first. A kernel of k weights with a zero in front of them, over an image
    padded alike on both sides, sees the same pixels at the same places:

        sum_i w[i] x[s j + i - l] = sum_i w'[i] x[s j + i - r],    w' = (0, w),  r = l + 1

    Parameters
    ----------
    network : Network
        Is left as it is.
    example : Tensor
        Crops, as many and as large as they will be.

    Returns
    -------
    Network
        With the same weights, of which only the changed kernels are new; the network itself where nothing pads so.
    """
    same = import_timm().layers.Conv2dSame
    names = [name for name, module in network.model.named_modules() if type(module) is same]
    if not names:
        return network
    with _seen_sizes(network.model, names) as sizes, torch.no_grad():
        network(example)
    tensors = (*network.model.parameters(), *network.model.buffers())
    model = copy.deepcopy(network.model, {id(tensor): tensor for tensor in tensors})
    for name in names:
        parent, _, own = name.rpartition(".")
        if len(sizes[name]) == 1:  # Of several views, or unused.
            setattr(model.get_submodule(parent), own, _fixed(model.get_submodule(name), next(iter(sizes[name]))))
    fixed = Network(model, network.preprocessing, network.pools, network.views)
    return fixed.to(network.scale.device).train(network.training)


@contextmanager
def _seen_sizes(model: nn.Module, names: list[str]) -> Iterator[Sizes]:
    """Collect the sizes of what these modules are given, by their names."""
    sizes: Sizes = {name: set() for name in names}

    def look(name: str, given: tuple[Tensor, ...]) -> None:
        sizes[name].add(tuple(given[0].shape[2:]))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, given, name=name: look(name, given))
        for name in names
    ]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def _fixed(module: nn.Module, size: tuple[int, ...]) -> nn.Module:
    """Return a convolution that pads images of this size as the module does, or the module where there is none."""
    assert isinstance(module, nn.Conv2d)
    (top, bottom), (left, right) = map(_amounts, size, module.kernel_size, module.stride, module.dilation)
    more = (bottom - top, right - left)
    if any(rows and step > 1 for rows, step in zip(more, module.dilation, strict=True)):
        return module  # A zero in front would move the kernel by a whole step.
    weight = nn.functional.pad(module.weight.detach(), (more[1], 0, more[0], 0))
    fixed = nn.Conv2d(module.in_channels, module.out_channels, 1, groups=module.groups, device="meta")
    fixed.kernel_size, fixed.padding = (weight.shape[2], weight.shape[3]), (bottom, right)
    fixed.stride, fixed.dilation = module.stride, module.dilation
    fixed.weight, fixed.bias = nn.Parameter(weight, requires_grad=False), module.bias
    return fixed.train(module.training)


def _amounts(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return by how much TensorFlow pads in front and behind, so that one output stands for every `stride` inputs."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2
