"""What of a backbone learns, block by block, and what stays as it is to the last bit."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from embedkit.backbones import Backbone
from embedkit.backbones.copies import fresh_network, trainable_network
from embedkit.errors import BackboneError, FinetuneError
from embedkit.finetuning.blocks import blocks_of, list_states, set_trainable, trainable_at
from embedkit.finetuning.layers import make_layers
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.saving import save_backbone
from embedkit.finetuning.stages import make_ready
from embedkit.finetuning.trainee import Trainee, make_trainee
from embedkit.spec import EmbeddingSpec, Preprocessing

SIZE = 64
PIXELS = Preprocessing(img_size=(SIZE, SIZE))


@pytest.fixture
def backbone(tiny_backbone: Path) -> Backbone:
    return Backbone.load(tiny_backbone, device="cpu")


@pytest.fixture
def crops() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def fresh(arch: str, pool: str = "default", **options: float) -> Trainee:
    network = fresh_network(arch, PIXELS, pool=pool, **options)
    width = network(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))[0].shape[1]
    return Trainee(network, make_layers("linear", width, 3))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def learn(trainee: Trainee, crops: torch.Tensor, steps: int = 2) -> None:
    optimiser = torch.optim.SGD([weight for weight in trainee.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(trainee(crops), torch.tensor([0, 1, 2, 0])).backward()
        optimiser.step()


def test_a_trainee_begins_as_its_backbone_and_leaves_it_alone(backbone: Backbone, crops: torch.Tensor) -> None:
    arrays = list(crops.permute(0, 2, 3, 1).numpy())
    expected = torch.tensor(backbone.embed_pixels(arrays))
    trainee = make_trainee(backbone, 3, Recipe())
    assert torch.allclose(trainee.embed(crops), expected, atol=1e-6)
    set_trainable(trainee, blocks_of(trainee), Recipe(), 1)
    learn(trainee, crops)
    assert not torch.allclose(trainee.embed(crops), expected, atol=1e-3)
    assert torch.equal(torch.tensor(backbone.embed_pixels(arrays)), expected)


def test_a_frozen_body_changes_no_parameter_and_no_statistic(backbone: Backbone, crops: torch.Tensor) -> None:
    trainee = make_trainee(backbone, 3, Recipe(freeze_norm=False))
    trainee.set_trainable(())
    trainee.train()
    before = state(trainee)
    learn(trainee, crops)
    assert changed(before, trainee) == {"head.weight", "head.bias"}


def test_thawed_blocks_alone_change(backbone: Backbone, crops: torch.Tensor) -> None:
    recipe = Recipe(unfreeze="last-2", freeze_norm=False)
    trainee = make_trainee(backbone, 3, recipe)
    set_trainable(trainee, blocks_of(trainee), recipe, 1)
    before = state(trainee)
    learn(trainee, crops)
    moved = changed(before, trainee)
    assert {name.split(".")[2] for name in moved if name.startswith("network")} == {"layer3", "layer4"}
    assert {"network.model.layer4.0.bn1.running_mean", "network.model.layer3.0.conv1.weight"} <= moved


def test_frozen_statistics_stay_while_their_weights_learn(backbone: Backbone, crops: torch.Tensor) -> None:
    trainee = make_trainee(backbone, 3, Recipe())
    set_trainable(trainee, blocks_of(trainee), Recipe(), 1)
    before = state(trainee)
    learn(trainee, crops)
    moved = changed(before, trainee)
    assert not any("running" in name or "tracked" in name for name in moved)
    assert "network.model.layer4.0.bn2.weight" in moved


def test_from_scratch_statistics_learn(backbone: Backbone, crops: torch.Tensor) -> None:
    recipe = Recipe(from_scratch=True)
    trainee = make_trainee(backbone, 3, recipe)
    set_trainable(trainee, blocks_of(trainee), recipe, 1)
    before = state(trainee)
    learn(trainee, crops)
    assert "network.model.bn1.running_mean" in changed(before, trainee)


def test_from_scratch_weights_are_drawn_by_the_seed_alone(backbone: Backbone) -> None:
    torch.manual_seed(5)
    first = state(make_trainee(backbone, 3, Recipe(from_scratch=True, seed=1)))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)  # The process's own numbers are not used up.
    assert not changed(first, make_trainee(backbone, 3, Recipe(from_scratch=True, seed=1)))
    other = changed(first, make_trainee(backbone, 3, Recipe(from_scratch=True, seed=2)))
    assert {"head.weight", "network.model.conv1.0.weight"} <= other
    assert "network.model.conv1.0.weight" in changed(first, make_trainee(backbone, 3, Recipe()))


def test_nothing_is_dropped_in_frozen_parts(crops: torch.Tensor) -> None:
    trainee = fresh("test_vit", drop_path=0.5)
    blocks = blocks_of(trainee)
    assert [block.name for block in blocks[-2:]] == ["blocks.4", "blocks.5 + norm"]
    set_trainable(trainee, blocks, Recipe(unfreeze="last-1"), 1)
    dropping = [name for name, module in trainee.named_modules() if "drop_path" in name and module.training]
    assert {name.split(".")[3] for name in dropping} == {"5"}
    trainee.set_trainable(())
    assert torch.equal(trainee.train()(crops), trainee.eval()(crops))


def test_evaluation_freezes_everything_for_as_long_as_it_takes(backbone: Backbone) -> None:
    trainee = make_trainee(backbone, 3, Recipe(freeze_norm=False))
    set_trainable(trainee, blocks_of(trainee), Recipe(unfreeze="last-1"), 1)
    before = [module.training for module in trainee.modules()]
    assert any(before) and not all(before)
    trainee.eval()
    assert not any(module.training for module in trainee.modules())
    trainee.train()
    assert [module.training for module in trainee.modules()] == before


def test_copies_are_independent(backbone: Backbone, crops: torch.Tensor) -> None:
    trainee = make_trainee(backbone, 3, Recipe())
    set_trainable(trainee, blocks_of(trainee), Recipe(), 1)
    twin = copy.deepcopy(trainee)
    before, answers = state(trainee), trainee(crops)
    assert torch.equal(twin(crops), answers) and twin.body == trainee.body
    learn(twin, crops)
    assert not changed(before, trainee)
    assert torch.equal(trainee(crops), answers)


@pytest.mark.parametrize("pool", ["default", "flatten", "layer2:avg"])
def test_copies_of_every_pooling_work(tiny_backbone: Path, crops: torch.Tensor, pool: str) -> None:
    trainee = make_trainee(Backbone.load(tiny_backbone, pool=pool, device="cpu"), 3, Recipe())
    assert torch.equal(copy.deepcopy(trainee)(crops), trainee(crops))


def test_what_the_embedding_does_not_depend_on_never_learns(tiny_backbone: Path) -> None:
    trainee = make_trainee(Backbone.load(tiny_backbone, pool="layer2:avg", device="cpu"), 3, Recipe())
    assert [block.name for block in blocks_of(trainee)] == ["conv1 + bn1", "layer1.0", "layer2.0"]
    set_trainable(trainee, blocks_of(trainee), Recipe(), 1)
    idle = {name for name, weight in trainee.named_parameters() if not weight.requires_grad}
    assert {name.split(".")[2] for name in idle} == {"layer3", "layer4"}
    rows = list_states(trainee, Recipe())
    assert sum(row.trainable for row in rows) == sum(w.numel() for w in trainee.parameters() if w.requires_grad)


def test_blocks_are_those_of_timm() -> None:
    blocks = blocks_of(fresh("test_efficientnet"))
    assert [block.name for block in blocks] == [
        "conv_stem + bn1", "blocks.0.0", "blocks.1.0", "blocks.2.0", "blocks.3.0", "blocks.4.0 + conv_head + bn2",
    ]  # fmt: skip
    assert [block.depth for block in blocks] == [5, 4, 3, 2, 1, 0]


def test_a_norm_behind_the_last_block_belongs_to_it() -> None:
    assert blocks_of(fresh("test_convnext"))[-1].name == "stages.3.blocks.1 + head.norm"


@pytest.mark.parametrize(
    "arch", ["test_resnet", "test_vit", "test_vit3", "test_convnext", "test_byobnet", "test_nfnet"]
)
def test_blocks_share_out_the_body(arch: str) -> None:
    trainee = fresh(arch)
    names = [name for block in blocks_of(trainee) for name in block.parameters]
    assert sorted(names) == sorted(trainee.body)
    assert set(names) <= {name for name, _ in trainee.named_parameters()}


def names(trainee: Trainee, epoch: int = 1, **settings: object) -> set[str]:
    found = trainable_at(blocks_of(trainee), Recipe(**settings), epoch)
    assert found <= set(trainee.body)
    return {name.removeprefix("network.model.") for name in found}


def test_unfreeze_names_blocks_modules_or_parameters(backbone: Backbone) -> None:
    trainee = make_trainee(backbone, 3, Recipe())
    whole = {name.removeprefix("network.model.") for name in trainee.body}
    assert names(trainee) == names(trainee, unfreeze="last-99") == whole
    assert names(trainee, unfreeze="none") == set()
    last = {name for name in whole if name.startswith("layer4.")}
    assert names(trainee, unfreeze="last-1") == names(trainee, unfreeze="layer4") == last
    assert (
        names(trainee, unfreeze="layer[34]")
        == names(trainee, unfreeze="layer3, layer4")
        == names(trainee, unfreeze="last-2")
    )
    norms = names(trainee, unfreeze="*.bn*")
    assert {name for name in norms if "conv" in name} == set() and "layer1.0.bn2.bias" in norms
    assert names(trainee, unfreeze="layer1.0.conv1.weight") == {"layer1.0.conv1.weight"}
    with pytest.raises(FinetuneError, match=r"layer9 names nothing in this backbone; its blocks are: conv1 \+ bn1, "):
        names(trainee, unfreeze="layer9")
    with pytest.raises(FinetuneError, match=r"--unfreeze layer9\* names nothing in this backbone"):
        names(trainee, unfreeze="layer4, layer9*")


def test_a_pattern_names_no_longer_number() -> None:
    trainee = fresh("test_vit3")
    assert {name.split(".")[1] for name in names(trainee, unfreeze="blocks.1")} == {"1"}


def test_gradual_thaws_from_the_head_to_the_input(backbone: Backbone) -> None:
    trainee = make_trainee(backbone, 3, Recipe())
    thawed = [
        {name.split(".")[0] for name in names(trainee, epoch, unfreeze="last-3", gradual=2)} for epoch in range(1, 7)
    ]
    assert thawed[0] == thawed[1] == {"layer4"}
    assert thawed[2] == thawed[3] == {"layer4", "layer3"}
    assert thawed[4] == thawed[5] == {"layer4", "layer3", "layer2"}


def test_the_table_says_when_each_block_begins(backbone: Backbone) -> None:
    trainee = make_trainee(backbone, 3, Recipe())
    rows = list_states(trainee, Recipe(unfreeze="last-3", gradual=2, epochs=4))
    assert [(row.name, row.from_epoch) for row in rows] == [
        ("conv1 + bn1", 0), ("layer1.0", 0), ("layer2.0", 0), ("layer3.0", 3), ("layer4.0", 1), ("head", 1),
    ]  # fmt: skip
    assert all((row.trainable == 0) == (row.from_epoch == 0) for row in rows)
    assert sum(row.frozen + row.trainable for row in rows) == sum(weight.numel() for weight in trainee.parameters())


def test_blocks_that_would_thaw_after_the_end_are_told(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    make_ready(backbone, Recipe(gradual=1, epochs=5), 3)
    assert not caplog.text
    make_ready(backbone, Recipe(gradual=2, epochs=4), 3)
    assert "3 blocks of 5 would only thaw after the last epoch" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"freeze_norm": False}, "2 or more, or --freeze-norm"), ({"from_scratch": True, "warmup": "none"}, "2 or more$")],
)
def test_batches_of_one_image_have_no_statistics_to_learn(
    backbone: Backbone, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(FinetuneError, match=f"no statistics of a single image; choose a --batch-size of {words}"):
        make_ready(backbone, Recipe(batch_size=1, **changes), 3)
    make_ready(backbone, Recipe(batch_size=2, **changes), 3)
    make_ready(backbone, Recipe(batch_size=1), 3)


def test_vgg16_without_its_top_has_the_published_numbers() -> None:
    with torch.device("meta"):  # Counted without half a gigabyte of weights.
        network = fresh_network("vgg16", Preprocessing(img_size=(224, 224)), pool="flatten")
        trainee = Trainee(network, make_layers("mlp:512", 7 * 7 * 512, 5))
        assert trainee(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).shape == (1, 5)
    rows = list_states(trainee, Recipe(head="mlp:512", unfreeze="none"))
    assert sum(row.frozen for row in rows) == 14_714_688
    assert sum(row.trainable for row in rows) == 12_848_133


def test_drop_path_keeps_the_weights(tmp_path: Path, crops: torch.Tensor) -> None:
    save_backbone(tmp_path, fresh_network("test_vit", PIXELS), EmbeddingSpec("test_vit", "", 64, preprocessing=PIXELS))
    backbone = Backbone.load(tmp_path, device="cpu")
    plain, dropping = trainable_network(backbone), trainable_network(backbone, drop_path=0.4)
    assert torch.equal(plain(crops)[0], dropping(crops)[0])
    assert torch.equal(plain.train()(crops)[0], plain.eval()(crops)[0])
    assert not torch.equal(dropping.train()(crops)[0], plain(crops)[0])


def test_architectures_without_drop_path_say_so(tiny_backbone: Path) -> None:
    with pytest.raises(BackboneError, match="vgg11 cannot be built with"):
        fresh_network("vgg11", PIXELS, drop_path=0.1)


def test_views_and_half_precision_are_not_trained(tiny_backbone: Path) -> None:
    for options in ({"views": ("flip",)}, {"precision": "bf16"}):
        backbone = Backbone.load(tiny_backbone, device="cpu", **options)
        with pytest.raises(FinetuneError, match="on plain views in fp32"):
            make_trainee(backbone, 3, Recipe())


def test_a_trainee_takes_pixels_of_any_kind(backbone: Backbone, crops: torch.Tensor) -> None:
    trainee = make_trainee(backbone, 3, Recipe())
    assert torch.equal(trainee(crops.float()), trainee(crops))
    assert trainee(crops.to(memory_format=torch.channels_last)).shape == (4, 3)


def test_memory_stays_channels_last(backbone: Backbone) -> None:
    for recipe in (Recipe(), Recipe(from_scratch=True), Recipe(drop_path=0.1)):
        weight = make_trainee(backbone, 3, recipe).network.model.layer4[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_heads_are_drawn_by_the_seed(backbone: Backbone) -> None:
    first, second = (make_trainee(backbone, 3, Recipe(seed=seed)).head.weight for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, make_trainee(backbone, 3, dataclasses.replace(Recipe(), seed=0)).head.weight)
