"""Convolutions that pad by themselves see the same pixels at the same places."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from embedkit import Preprocessing
from embedkit.backbones import import_timm
from embedkit.backbones.network import Network
from embedkit.backbones.padding import with_fixed_padding


def crops(height: int, width: int) -> torch.Tensor:
    values = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(values).permute(0, 3, 1, 2)


def padded(network: Network) -> list[str]:
    same = import_timm().layers.Conv2dSame
    return [name for name, module in network.model.named_modules() if type(module) is same]


class Alone(nn.Module):
    """One convolution, as a model of timm."""

    num_features = 4

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv(x)
        return found

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize(("kernel", "stride"), list(itertools.product([1, 2, 3, 5, 6], [1, 2, 3])))
@pytest.mark.parametrize("dilation", [1, 2])
def test_every_output_is_the_same(kernel: int, stride: int, dilation: int) -> None:
    torch.manual_seed(kernel)
    conv = import_timm().layers.Conv2dSame(3, 4, (kernel, 3), stride=stride, dilation=dilation, bias=kernel % 2 == 0)
    for height, width in ((16, 17), (19, 18)):
        network = Network(Alone(conv).eval(), Preprocessing(img_size=(height, width)), ("default",))
        images = crops(height, width)
        fixed = with_fixed_padding(network, images)
        with torch.no_grad():
            expected, found = network(images)[0], fixed(images)[0]
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert dilation == 2 or not padded(fixed)
    assert isinstance(network.model.conv, import_timm().layers.Conv2dSame)


def test_a_network_shares_its_weights_and_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model = import_timm().create_model("test_efficientnet", num_classes=0, pad_type="same").eval().requires_grad_(False)
    network = Network(model, Preprocessing(img_size=(65, 64)), ("default", "avg")).eval()
    names, images = padded(network), crops(65, 64)
    fixed = with_fixed_padding(network, images)
    assert len(names) > 3 and padded(network) == names and padded(fixed) == []
    for left, right in zip(fixed(images), network(images), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    own = {id(parameter) for parameter in network.parameters()}
    new = [name for name, parameter in fixed.named_parameters() if id(parameter) not in own]
    assert 0 < len(new) <= len(names)
    assert all(not module._forward_pre_hooks for module in network.modules())


def test_views_of_several_sizes_keep_their_padding() -> None:
    torch.manual_seed(0)
    model = import_timm().create_model("test_efficientnet", num_classes=0, pad_type="same").eval().requires_grad_(False)
    network = Network(model, Preprocessing(img_size=(64, 64)), ("default",), ("scale:0.7",)).eval()
    fixed = with_fixed_padding(network, crops(64, 64))
    assert padded(fixed) == padded(network)


def test_a_network_that_pads_alike_is_returned_itself() -> None:
    model = import_timm().create_model("test_resnet", num_classes=0).eval()
    network = Network(model, Preprocessing(img_size=(64, 64)), ("default",)).eval()
    assert with_fixed_padding(network, crops(64, 64)) is network
