"""The gradients of an update, however they are computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from embedkit.backbones.copies import fresh_network
from embedkit.finetuning.feed import TrainBatch
from embedkit.finetuning.losses import CrossEntropy
from embedkit.finetuning.norms import find_pairs, fold_pairs, standing_in
from embedkit.finetuning.shares import sum_gradients
from embedkit.finetuning.steps import accumulate
from embedkit.finetuning.trainee import Trainee
from embedkit.finetuning.ways import way_of
from embedkit.spec import Preprocessing

PIXELS = Preprocessing(img_size=(64, 64), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def trainee_of(arch: str, *, freeze_norm: bool = True, frozen: tuple[str, ...] = (), drop_path: float = 0.0) -> Trainee:
    network = fresh_network(arch, PIXELS, seed=1, drop_path=drop_path)
    random = torch.Generator().manual_seed(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # As trained ones are: not the identity.
            module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=random))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=random))
    dim = network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[0].shape[1]
    head = nn.Linear(dim, 3)
    nn.init.normal_(head.weight, generator=random)
    trainee = Trainee(network, head, freeze_norm=freeze_norm)
    trainee.set_trainable([name for name in trainee.body if not name.startswith(frozen)] if frozen else trainee.body)
    return trainee.train()


def batch_of(count: int, *, mixed: bool = False) -> TrainBatch:
    random = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=random)
    codes = torch.randint(0, 3, (count,), generator=random)
    targets = torch.softmax(torch.randn(count, 3, generator=random), 1) if mixed else None
    return TrainBatch(pixels.contiguous(memory_format=torch.channels_last), codes, targets, torch.arange(count))


def plainly(trainee: Trainee, criterion: nn.Module, pieces: list[TrainBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients as autograd has them without any of ours."""
    trainee.zero_grad(set_to_none=True)
    total = sum(len(piece) for piece in pieces)
    whole = torch.zeros(())
    for piece in pieces:
        embeddings = trainee.embed(piece.pixels)
        loss = criterion(trainee.head(embeddings), embeddings, piece) * (len(piece) / total)
        loss.backward()
        whole += loss.detach()
    return whole, gradients_of(trainee)


def gradients_of(trainee: Trainee) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in trainee.named_parameters() if each.grad is not None}


def ours(trainee: Trainee, criterion: nn.Module, pieces: list[TrainBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    trainee.zero_grad(set_to_none=True)
    total = sum(len(piece) for piece in pieces)
    loss = accumulate(trainee, criterion, pieces, total, nullcontext, lambda loss: loss)
    return loss, gradients_of(trainee)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-3 * largest + 1e-6, msg=name)


@pytest.mark.parametrize("arch", ["test_resnet", "test_efficientnet", "test_byobnet", "test_vit", "test_convnext"])
def test_gradients_are_those_of_autograd(arch: str, threads: int) -> None:
    trainee, criterion = trainee_of(arch), CrossEntropy(smoothing=0.1)
    pieces = [batch_of(21), batch_of(2, mixed=True)]
    loss, wanted = plainly(trainee, criterion, pieces)
    found_loss, found = ours(trainee, criterion, pieces)
    torch.testing.assert_close(found_loss, loss, rtol=1e-4, atol=1e-5)
    assert_close(found, wanted)
