"""The gradients of an update, however they are computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from embedkit.backbones.copies import fresh_network
from embedkit.finetuning.feeding.feed import TrainBatch
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.trainee import Trainee
from embedkit.finetuning.training.losses import CrossEntropy, make_criterion
from embedkit.finetuning.training.norms import find_pairs, fold_pairs, standing_in
from embedkit.finetuning.training.shares import sum_gradients
from embedkit.finetuning.training.steps import accumulate, in_pieces
from embedkit.finetuning.training.ways import way_of
from embedkit.spec import Preprocessing

PIXELS = Preprocessing(img_size=(64, 64), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


@pytest.fixture(params=[1, 2])
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


def test_gradients_of_arcface_are_those_of_autograd_and_so_are_its_prototypes(threads: int) -> None:
    pytest.importorskip("pytorch_metric_learning")
    trainee = trainee_of("test_resnet")
    criterion = make_criterion(Recipe(loss="arcface"), 3, trainee.head.in_features)
    loss, wanted = plainly(trainee, criterion, [batch_of(40)])
    (prototypes,) = criterion.parameters()
    expected, prototypes.grad = prototypes.grad, None
    found_loss, found = ours(trainee, criterion, [batch_of(40)])
    torch.testing.assert_close(found_loss, loss, rtol=1e-4, atol=1e-5)
    assert_close({**found, "prototypes": prototypes.grad}, {**wanted, "prototypes": expected})


def test_a_single_image_leaves_statistics_alone_where_others_move_them(threads: int) -> None:
    single, others = next(in_pieces([batch_of(6)], 1)), batch_of(7)
    trainee, criterion = trainee_of("test_resnet", freeze_norm=False), CrossEntropy()
    frozen, other = copy.deepcopy(trainee), copy.deepcopy(trainee)
    frozen.freeze_norm = True
    before = [norm.running_mean.clone() for norm in norms_of(trainee)]
    loss, found = ours(trainee, criterion, [single])
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms_of(trainee), before, strict=True))
    assert all(norm.training for norm in norms_of(trainee))
    assert_close(found, plainly(frozen.train(), criterion, [single])[1])
    more_loss, more = ours(other, criterion, [others])
    both_loss, both = ours(trainee, criterion, [single, others])
    torch.testing.assert_close(both_loss, loss / 8 + more_loss * 7 / 8, rtol=1e-3, atol=1e-4)
    assert_close(both, {name: found[name] / 8 + more[name] * 7 / 8 for name in both})
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms_of(trainee), before, strict=True))


def norms_of(trainee: Trainee) -> list[nn.Module]:
    return [module for module in trainee.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("arch", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_every_normalisation_behind_a_convolution_is_folded(arch: str) -> None:
    trainee = trainee_of(arch)
    pixels = batch_of(4).pixels
    pairs = way_of(trainee, pixels).pairs
    assert {id(pair.norm) for pair in pairs} == {id(norm) for norm in norms_of(trainee)}
    weights = {name: id(parameter) for name, parameter in trainee.named_parameters()}
    with torch.no_grad():
        before = trainee(pixels)
        with standing_in(fold_pairs(pairs)):
            inside = trainee(pixels)
            assert not any(isinstance(pair.convolution.weight, nn.Parameter) for pair in pairs)
    torch.testing.assert_close(inside, before, rtol=1e-3, atol=1e-4)
    assert {name: id(parameter) for name, parameter in trainee.named_parameters()} == weights
    assert all("forward" not in vars(norm) for norm in norms_of(trainee))
    assert {pair.convolution.dilation for pair in pairs} == {(1, 1)}
    assert torch.equal(trainee(pixels), before)


class Branching(nn.Module):
    """A convolution that two read: its normalisation, and whoever adds the two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last, self.other = nn.Conv2d(4, 5, 3, bias=True), nn.BatchNorm2d(5)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.uniform_(self.other.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.relu(self.other(self.last(x + self.norm(x)))).mean((2, 3))


def test_a_convolution_that_others_read_too_is_left_alone() -> None:
    torch.manual_seed(0)
    module, pixels = Branching().eval(), torch.rand(2, 3, 12, 12)
    assert find_pairs(module, pixels) == []
    module.forward = lambda x: torch.relu(module.other(module.last(module.norm(module.first(x))))).mean((2, 3))  # type: ignore[method-assign]
    pairs = find_pairs(module, pixels)
    assert [pair.norm for pair in pairs] == [module.norm, module.other]
    with standing_in(fold_pairs(pairs)):
        folded = module(pixels)
    torch.testing.assert_close(folded, module(pixels))


def test_statistics_and_frozen_parts_stay_as_they_are(threads: int) -> None:
    trainee = trainee_of(
        "test_efficientnet", frozen=("network.model.conv_stem", "network.model.bn1", "network.model.blocks.0")
    )
    before = copy.deepcopy(trainee.state_dict())
    _, found = ours(trainee, CrossEntropy(), [batch_of(12)])
    _, wanted = plainly(trainee, CrossEntropy(), [batch_of(12)])
    assert not any(name.startswith("network.model.blocks.0") for name in found)
    assert_close(found, wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainee.state_dict().items())


def test_the_same_update_has_the_same_bits(threads: int) -> None:
    trainee = trainee_of("test_resnet")
    _, first = ours(trainee, CrossEntropy(), [batch_of(40)])
    for _ in range(4):
        _, again = ours(trainee, CrossEntropy(), [batch_of(40)])
        assert all(torch.equal(again[name], gradient) for name, gradient in first.items())


def test_gradients_are_added_to_those_that_are_there() -> None:
    trainee = trainee_of("test_resnet")
    _, once = ours(trainee, CrossEntropy(), [batch_of(9)])
    accumulate(trainee, CrossEntropy(), [batch_of(9)], 9, nullcontext, lambda loss: loss)
    assert_close(gradients_of(trainee), {name: 2 * gradient for name, gradient in once.items()})


def test_a_scaled_loss_scales_gradients_and_is_told_unscaled() -> None:
    trainee = trainee_of("test_resnet")
    loss, once = ours(trainee, CrossEntropy(), [batch_of(9)])
    trainee.zero_grad(set_to_none=True)
    told = accumulate(trainee, CrossEntropy(), [batch_of(9)], 9, nullcontext, lambda loss: 8 * loss)
    assert torch.equal(told, loss)
    assert_close(gradients_of(trainee), {name: 8 * gradient for name, gradient in once.items()})


def test_the_precision_that_is_asked_for_reaches_every_share(threads: int) -> None:
    seen = []

    class Watching(CrossEntropy):
        def forward(self, outputs: Tensor, embeddings: Tensor, batch: TrainBatch) -> Tensor:
            seen.append(embeddings.dtype)
            return super().forward(outputs, embeddings, batch)

    trainee = trainee_of("test_resnet")
    head_dtypes = []
    trainee.head.register_forward_hook(lambda module, inputs, output: head_dtypes.append(output.dtype))
    accumulate(
        trainee, Watching(), [batch_of(12)], 12, lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda loss: loss
    )  # fmt: skip
    assert set(head_dtypes[1:]) == {torch.bfloat16} and set(seen) == {torch.float32}
    assert all(gradient.dtype == torch.float32 for gradient in gradients_of(trainee).values())


def test_what_draws_by_chance_is_not_divided_and_trying_draws_nothing() -> None:
    trainee = trainee_of("test_vit", drop_path=0.4)
    state = torch.get_rng_state()
    assert not way_of(trainee, batch_of(4).pixels).is_divisible
    assert torch.equal(torch.get_rng_state(), state)
    assert way_of(trainee.eval(), batch_of(4).pixels).is_divisible
    assert way_of(trainee_of("test_vit"), batch_of(4).pixels).is_divisible


def test_a_loss_that_compares_images_sees_whole_batches(threads: int) -> None:
    seen = []

    class Comparing(nn.Module):
        def forward(self, outputs: Tensor, embeddings: Tensor, batch: TrainBatch) -> Tensor:
            seen.append(len(embeddings))
            return (embeddings @ embeddings.T).mean()

    trainee = trainee_of("test_resnet")
    _, found = ours(trainee, Comparing(), [batch_of(20)])
    assert seen == [20]
    _, wanted = plainly(trainee, Comparing(), [batch_of(20)])
    assert_close(found, wanted)


def test_an_error_in_a_share_is_raised_when_all_have_ended_and_nothing_is_left_changed(threads: int) -> None:
    trainee = trainee_of("test_resnet")
    way_of(trainee, batch_of(4).pixels)

    def refuse(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 1:
            raise RuntimeError("not enough memory: you tried to allocate 8 bytes")

    handle = trainee.head.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="not enough memory"):
        ours(trainee, CrossEntropy(), [batch_of(12)])
    handle.remove()
    assert all("forward" not in vars(norm) for norm in norms_of(trainee))
    assert all(isinstance(parameter, nn.Parameter) for parameter in trainee.parameters())
    assert torch.get_num_threads() == threads
    _, found = ours(trainee, CrossEntropy(), [batch_of(12)])
    _, wanted = plainly(trainee, CrossEntropy(), [batch_of(12)])
    assert_close(found, wanted)


def test_shares_are_summed_in_their_order() -> None:
    weight = torch.zeros(3, requires_grad=True)
    twin, unused = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
    learning = [weight, twin, unused]  # The gradients of the first two are one tensor, and all of it one number.
    total = sum_gradients([[1.0, 2.0], [4.0], []], lambda part: part * (weight + twin).sum() + part, learning)
    assert float(total) == 7.0 and unused.grad is None
    assert weight.grad is not None and weight.grad.tolist() == [7.0] * 3
    assert twin.grad is not None and twin.grad.tolist() == [7.0] * 3


@pytest.mark.parametrize(("count", "most"), [(10, 3), (25, 4), (32, 16), (7, 100), (5, 1), (0, 4)])
def test_pieces_differ_by_one_image_at_most(count: int, most: int) -> None:
    # The statistics of a piece of one image, where its neighbours have three, would be none.
    pieces = list(in_pieces([batch_of(count, mixed=True)], most))
    sizes = [len(piece) for piece in pieces]
    assert sum(sizes) == count and max(sizes, default=0) <= most and max(sizes, default=0) - min(sizes, default=0) <= 1
    assert [int(row) for piece in pieces for row in piece.rows] == list(range(count))
    assert all(len(piece.pixels) == len(piece.codes) == len(piece.targets) == len(piece) for piece in pieces)  # type: ignore[arg-type]


def test_a_new_norm_beside_which_others_read_the_convolution_is_not_folded() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, pixels: Tensor) -> Tensor:
            found = self.convolution(pixels)
            return (found + self.norm(found)).mean((2, 3))

    module, crops = Beside().eval(), torch.rand(2, 3, 8, 8)
    statistics = [value.clone() for value in module.norm.buffers()]
    assert find_pairs(module, crops) == []  # Though both would agree while the statistics are 0 and 1.
    assert all(torch.equal(now, then) for now, then in zip(module.norm.buffers(), statistics, strict=True))
