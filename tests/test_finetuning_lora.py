"""Low-rank adapters: they begin as nothing, learn alone, and end inside the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from embedkit.backbones import Backbone
from embedkit.backbones.copies import fresh_network
from embedkit.errors import FinetuneError, MissingExtraError
from embedkit.finetuning.blocks import blocks_of, list_states, set_trainable
from embedkit.finetuning.lora import add_adapters, merged
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.saving import save_backbone
from embedkit.finetuning.trainee import make_trainee
from embedkit.spec import EmbeddingSpec, Preprocessing

PIXELS = Preprocessing(img_size=(48, 48))
CROPS = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("vit")
    save_backbone(folder, fresh_network("test_vit", PIXELS), EmbeddingSpec("test_vit", "", 64, preprocessing=PIXELS))
    return Backbone.load(folder, device="cpu")


@pytest.fixture
def peft() -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")


@pytest.mark.usefixtures("peft")
def test_adapters_begin_as_nothing(vit: Backbone) -> None:
    plain, adapted = (make_trainee(vit, 2, Recipe(lora=rank)) for rank in (0, 4))
    assert torch.allclose(plain.embed(CROPS), adapted.embed(CROPS), atol=1e-5)


@pytest.mark.usefixtures("peft")
def test_adapters_alone_learn_and_end_in_the_weights(vit: Backbone, tmp_path: Path) -> None:
    recipe = Recipe(lora=4, unfreeze="last-3")
    trainee = make_trainee(vit, 2, recipe)
    set_trainable(trainee, blocks_of(trainee), recipe, 1)
    learning = {name for name, weight in trainee.named_parameters() if weight.requires_grad}
    assert {name.split(".")[3] for name in learning if name.startswith("network")} == {"3", "4", "5"}
    assert all(".lora_" in name or name.startswith("head.") for name in learning)
    before = {name: value.clone() for name, value in trainee.state_dict().items()}
    optimiser = torch.optim.SGD([weight for weight in trainee.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(trainee(CROPS), torch.tensor([0, 1, 0, 1])).backward()
        optimiser.step()
    moved = {name for name, value in trainee.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == learning
    expected = trainee.eval().embed(CROPS).detach()
    assert not torch.allclose(expected, make_trainee(vit, 2, Recipe()).embed(CROPS), atol=1e-3)
    save_backbone(tmp_path, trainee.network, vit.spec)
    adapted = Backbone.load(tmp_path, device="cpu")
    found = torch.tensor(adapted.embed_pixels(list(CROPS.permute(0, 2, 3, 1).numpy())))
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(trainee.embed(CROPS).detach(), expected)  # Merged in a copy.


@pytest.mark.usefixtures("peft")
def test_a_merged_network_is_timms_again(vit: Backbone) -> None:
    trainee = make_trainee(vit, 2, Recipe(lora=4))
    plain = make_trainee(vit, 2, Recipe())
    model = merged(trainee.network)
    assert model.state_dict().keys() == plain.network.model.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.network.model.modules()]


@pytest.mark.usefixtures("peft")
def test_adapters_are_few_and_drawn_by_the_seed(vit: Backbone) -> None:
    recipe = Recipe(lora=2)
    rows = list_states(make_trainee(vit, 2, recipe), recipe)
    learning = sum(row.trainable for row in rows[:-1])
    # Six layers of four linear ones: rank * (inputs + outputs) each.
    assert learning == 6 * 2 * ((64 + 192) + (64 + 64) + (64 + 192) + (192 + 64))
    torch.manual_seed(0)
    first = make_trainee(vit, 2, recipe).state_dict()
    torch.manual_seed(1)
    second = make_trainee(vit, 2, recipe).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = make_trainee(vit, 2, Recipe(lora=2, seed=1)).state_dict()
    assert any(not torch.equal(first[name], third[name]) for name in first if "lora_A" in name)


@pytest.mark.usefixtures("peft")
def test_convolutions_take_no_adapters(tiny_backbone: Path) -> None:
    with pytest.raises(FinetuneError, match="this backbone has none: lora is for transformers"):
        make_trainee(Backbone.load(tiny_backbone, device="cpu"), 2, Recipe(lora=4))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"embedkit\[lora\]"):
        add_adapters(fresh_network("test_vit", PIXELS), 4)
