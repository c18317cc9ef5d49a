"""Replicas: batch normalisation that learns, on several threads at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from embedkit.backbones.copies import fresh_network
from embedkit.finetuning.feeding.feed import TrainBatch
from embedkit.finetuning.trainee import Trainee
from embedkit.finetuning.training.losses import CrossEntropy
from embedkit.finetuning.training.replicas import lend_replicas, return_replicas, statistics_of, takes_statistics
from embedkit.finetuning.training.steps import accumulate
from embedkit.finetuning.training.ways import way_of
from embedkit.spec import Preprocessing


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trainee_of(*, drop_path: float = 0.0) -> Trainee:
    network = fresh_network("test_resnet", Preprocessing(img_size=(32, 32)), seed=1, drop_path=drop_path)
    head = nn.Linear(96, 3)
    nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(head.bias)
    trainee = Trainee(network, head, freeze_norm=False)
    trainee.set_trainable(trainee.body)
    return trainee.train()


def batch_of(count: int) -> TrainBatch:
    random = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=random)
    codes = torch.randint(0, 3, (count,), generator=random)
    return TrainBatch(pixels.contiguous(memory_format=torch.channels_last), codes, None, torch.arange(count))


def update(trainee: Trainee, batch: TrainBatch) -> tuple[Tensor, list[Tensor]]:
    trainee.zero_grad(set_to_none=True)
    loss = accumulate(trainee, CrossEntropy(), [batch], len(batch), nullcontext, lambda loss: loss)
    return loss, [each.grad.clone() for each in trainee.parameters() if each.grad is not None]


def half_of(trainee: Trainee, batch: TrainBatch, span: slice) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return loss, gradients and statistics of a part of a batch by autograd alone."""
    alone = copy.deepcopy(trainee.network.model), copy.deepcopy(trainee.head)
    network = fresh_network("test_resnet", Preprocessing(img_size=(32, 32)))
    network.model = alone[0]
    model = nn.ModuleList([network, alone[1]]).train()
    outputs = alone[1](network(batch.pixels[span])[0])
    loss = nn.functional.cross_entropy(outputs, batch.codes[span])
    loss.backward()
    return loss.detach(), [each.grad for each in model.parameters() if each.grad is not None], statistics_of(model)


@pytest.mark.usefixtures("two_threads")
def test_two_threads_normalise_each_its_half() -> None:
    trainee, batch = trainee_of(), batch_of(16)
    way = way_of(trainee, batch.pixels)
    assert way.is_divisible and way.takes_statistics
    halves = [half_of(trainee, batch, span) for span in (slice(0, 8), slice(8, 16))]
    loss, gradients = update(trainee, batch)
    torch.testing.assert_close(loss, (halves[0][0] + halves[1][0]) / 2)
    for found, one, other in zip(gradients, halves[0][1], halves[1][1], strict=True):
        torch.testing.assert_close(found, (one + other) / 2, rtol=1e-3, atol=1e-5)
    for found, one, other in zip(statistics_of(trainee), halves[0][2], halves[1][2], strict=True):
        torch.testing.assert_close(found, (one + other) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("two_threads")
def test_the_same_updates_end_in_the_same_bits() -> None:
    ends = []
    for _ in range(2):
        trainee = trainee_of()
        optimiser = torch.optim.SGD(trainee.parameters(), lr=0.1)
        for size in (16, 12, 16):
            update(trainee, batch_of(size))
            optimiser.step()
        ends.append([value.clone() for value in trainee.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.usefixtures("two_threads")
def test_trying_out_the_way_leaves_statistics_alone() -> None:
    trainee = trainee_of()
    before = [value.clone() for value in statistics_of(trainee)]
    way_of(trainee, batch_of(4).pixels)
    assert all(torch.equal(one, other) for one, other in zip(before, statistics_of(trainee), strict=True))


@pytest.mark.usefixtures("two_threads")
def test_a_batch_too_small_for_two_is_computed_as_one() -> None:
    trainee, batch = trainee_of(), batch_of(3)
    loss, _, statistics = half_of(trainee, batch, slice(0, 3))
    found, _ = update(trainee, batch)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(statistics_of(trainee), statistics)


def test_replicas_share_parameters_and_follow_modes() -> None:
    trainee = trainee_of()
    one, other = lend_replicas(trainee, 2)
    assert all(own is its for own, its in zip(trainee.parameters(), one.parameters(), strict=True))
    assert not any(own is its for own, its in zip(statistics_of(one), statistics_of(other), strict=True))
    assert [id(each) for each in lend_replicas(trainee, 2)] == [id(one), id(other)]
    trainee.eval()
    lend_replicas(trainee, 2)
    assert not any(module.training for module in one.modules())
    assert not takes_statistics(trainee)


def test_statistics_are_weighted_by_images() -> None:
    trainee = trainee_of()
    replicas = lend_replicas(trainee, 2)
    for value, replica in zip((1.0, 5.0), replicas, strict=True):
        for each in statistics_of(replica):
            each.fill_(value)
    return_replicas(trainee, replicas, [3, 1])
    assert all(float(each.min()) == float(each.max()) == 2.0 for each in statistics_of(trainee))


@pytest.mark.usefixtures("two_threads")
def test_what_draws_by_chance_is_not_divided() -> None:
    assert not way_of(trainee_of(drop_path=0.5), batch_of(8).pixels).is_divisible
