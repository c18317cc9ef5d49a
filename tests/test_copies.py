"""Copies that may be trained: the same function, and gradients that are right."""

from __future__ import annotations

import subprocess
import sys

import torch

from embedkit.backbones import import_timm
from embedkit.backbones.copies import fresh_network
from embedkit.spec import Preprocessing

# In a process of its own: where this goes wrong, the process ends.
STEM = """
import itertools
import torch
torch.set_num_threads(2)
from embedkit.backbones.copies import fresh_network
from embedkit.spec import Preprocessing
network = fresh_network("repvgg_a0", Preprocessing(img_size=(64, 64)), seed=1)
stem = network.model.stem.conv_1x1.conv
for size, side in itertools.product((4, 8, 13, 16, 32), (32, 65, 112, 224)):
    pixels = torch.rand(size, 3, side, side).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        stem.weight.grad = None
        stem(pixels).square().sum().backward()
        found = stem.weight.grad.double()
    weight = stem.weight.detach().double().requires_grad_()
    torch.nn.functional.conv2d(pixels.double(), weight, stride=2).square().sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-3)
print("right")
"""


def test_a_narrow_convolution_with_a_stride_is_the_same_function() -> None:
    network = fresh_network("repvgg_a0", Preprocessing(img_size=(64, 64)), seed=1)
    plain = import_timm().create_model("repvgg_a0", num_classes=0).eval()
    plain.load_state_dict(network.model.state_dict())
    crops = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    pixels = torch.addcmul(network.shift, crops.float(), network.scale)
    with torch.no_grad():
        torch.testing.assert_close(network(crops)[0], plain(pixels), rtol=1e-4, atol=1e-5)


def test_its_gradient_is_right() -> None:
    done = subprocess.run([sys.executable, "-c", STEM], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "right", done.stderr[-2000:]
