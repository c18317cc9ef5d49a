"""Learning rates: which parameter gets which, and how they move over a run."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from embedkit.backbones import Backbone, import_timm
from embedkit.errors import FinetuneError
from embedkit.finetuning.blocks import blocks_of, set_trainable
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.trainee import Trainee, make_trainee
from embedkit.finetuning.training.optimisers import check_optimiser, make_optimiser, parameter_groups, set_rates
from embedkit.finetuning.training.schedules import Plateau, rate_factor

RECIPE = Recipe(body_lr=1e-3, head_lr=1e-2, layer_decay=0.5, weight_decay=0.05)


@pytest.fixture(scope="module")
def trainee(tiny_backbone: Path) -> Trainee:
    return make_trainee(Backbone.load(tiny_backbone, device="cpu"), 3, RECIPE)


def groups_by_parameter(trainee: Trainee, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in trainee.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


def test_every_block_learns_at_the_rate_that_was_asked_for(trainee: Trainee) -> None:
    blocks = blocks_of(trainee)
    found = groups_by_parameter(trainee, parameter_groups(trainee, blocks, RECIPE))
    assert found.keys() == dict(trainee.named_parameters()).keys()
    assert len(blocks) > 3
    for depth, block in enumerate(reversed(blocks)):
        for name in block.parameters:
            assert found[name]["lr"] == pytest.approx(1e-3 * 0.5**depth)
    assert found["head.weight"]["lr"] == found["head.bias"]["lr"] == 1e-2
    scratch = groups_by_parameter(trainee, parameter_groups(trainee, blocks, replace(RECIPE, from_scratch=True)))
    assert {scratch[name]["lr"] for block in blocks for name in block.parameters} == {1e-3}


def test_rates_are_told_of_what_learns(tiny_backbone: Path) -> None:
    recipe = replace(RECIPE, unfreeze="last-2", gradual=1)
    trainee = make_trainee(Backbone.load(tiny_backbone, device="cpu"), 3, recipe)
    blocks = blocks_of(trainee)
    optimiser = make_optimiser(parameter_groups(trainee, blocks, recipe), recipe)
    for epoch, learning in ((1, ["layer4.0", "head"]), (2, ["layer3.0", "layer4.0", "head"])):
        set_trainable(trainee, blocks, recipe, epoch)
        assert list(set_rates(optimiser, 1.0)) == learning


def test_what_the_embedding_does_not_depend_on_is_in_no_group() -> None:
    from embedkit.backbones.copies import fresh_network
    from embedkit.spec import Preprocessing

    network = fresh_network("test_convnext2", Preprocessing(img_size=(64, 64)), pool="avg", seed=1)
    trainee = Trainee(network, nn.Linear(128, 3))
    found = groups_by_parameter(trainee, parameter_groups(trainee, blocks_of(trainee), RECIPE))
    behind = {"network.model.head.norm.weight", "network.model.head.norm.bias"}
    assert dict(trainee.named_parameters()).keys() - found.keys() == behind


def test_norms_and_biases_do_not_decay(trainee: Trainee) -> None:
    found = groups_by_parameter(trainee, parameter_groups(trainee, blocks_of(trainee), RECIPE))
    kept = {name for name, group in found.items() if group["weight_decay"] == 0}
    norms = [name for name, module in trainee.named_modules() if isinstance(module, nn.BatchNorm2d)]
    biases = {name for name in found if name.endswith(".bias")}
    assert norms and kept == {f"{name}.weight" for name in norms} | biases
    assert {found[name]["weight_decay"] for name in found.keys() - kept} == {0.05}


def test_what_timm_exempts_does_not_decay(tmp_path: Path) -> None:
    from embedkit.backbones import import_timm
    from embedkit.backbones.network import Network
    from embedkit.spec import Preprocessing

    model = import_timm().create_model("test_vit", num_classes=0)
    size = model.default_cfg["input_size"][1:]
    trainee = Trainee(Network(model, Preprocessing(img_size=size), ("default",)), nn.Linear(model.num_features, 2))
    found = groups_by_parameter(trainee, parameter_groups(trainee, blocks_of(trainee), RECIPE))
    assert found["network.model.pos_embed"]["weight_decay"] == found["network.model.cls_token"]["weight_decay"] == 0
    assert found["network.model.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.05


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adamw", "adam", "rmsprop", "nadamw", "lamb", "lion", "adafactor"])
def test_any_optimiser_of_timm_keeps_the_rates_of_the_groups(trainee: Trainee, opt: str) -> None:
    groups = parameter_groups(trainee, blocks_of(trainee), RECIPE)
    optimiser = make_optimiser(groups, replace(RECIPE, opt=opt))
    rates = set_rates(optimiser, 0.5)
    assert rates["head"] == 5e-3 and [group["lr"] for group in optimiser.param_groups] == [
        0.5 * group["base_lr"] for group in groups
    ]
    decays = {group["weight_decay"] for group in optimiser.param_groups}
    assert decays == {0.0, 0.05}


def test_momentum_is_the_recipes(trainee: Trainee) -> None:
    groups = parameter_groups(trainee, blocks_of(trainee), RECIPE)
    optimiser = make_optimiser(groups, replace(RECIPE, opt="sgd", momentum=0.7))
    assert {group["momentum"] for group in optimiser.param_groups} == {0.7}


def test_an_optimiser_that_is_none_is_refused_with_the_closest(trainee: Trainee) -> None:
    groups = parameter_groups(trainee, blocks_of(trainee), RECIPE)
    with pytest.raises(FinetuneError, match="no optimiser is called 'adamv'; timm's are many, such as adam"):
        make_optimiser(groups, replace(RECIPE, opt="adamv"))
    with pytest.raises(FinetuneError, match="derivatives of derivatives"):
        make_optimiser(groups, replace(RECIPE, opt="adahessian"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"opt": "adafactorbv"}, "AdafactorBigVision keeps a dtype, which cannot be saved for a resumed run"),
        ({"opt": "lookahead_adafactorbv"}, "keeps a dtype, which cannot be saved"),
        ({"opt": "sgd", "momentum": 0.0}, "sgd cannot be used here: Nesterov momentum requires a momentum"),
    ],
)
def test_an_optimiser_that_cannot_work_is_found_out_before_an_epoch(changes: dict[str, Any], said: str) -> None:
    drawn = torch.random.get_rng_state()
    with pytest.raises(FinetuneError, match=said):
        check_optimiser(replace(RECIPE, **changes))
    assert torch.equal(torch.random.get_rng_state(), drawn)


def plain_optimisers() -> list[str]:
    """All of timm's that need no accelerator, derivatives of derivatives or compiler, and that a file can keep."""
    import_timm()
    names = import_module("timm.optim").list_optimizers()
    others = ("bnb", "fused", "adahessian", "kron")
    return [name for name in names if not name.startswith(others) and "adafactorbv" not in name]


def test_every_other_optimiser_can_be_used_and_moves_no_setting_but_its_counters() -> None:
    names = plain_optimisers()
    assert len(names) > 40
    for name in [*names, "lookahead_adamw"]:
        recipe = replace(RECIPE, opt=name)
        weights = [nn.Parameter(torch.linspace(-1, 1, 24).reshape(shape)) for shape in ((24,), (4, 6), (2, 3, 2, 2))]
        optimiser = make_optimiser(
            [{"params": [weight], "name": "head", "lr": 1e-2, "base_lr": 1e-2} for weight in weights], recipe
        )
        before = copy.deepcopy([{**group, "params": None} for group in optimiser.param_groups])
        for _ in range(2):
            set_rates(optimiser, 1.0)
            for weight in weights:
                weight.grad = weight.detach().clone()
            optimiser.step()
        for group, was in zip(optimiser.param_groups, before, strict=True):
            moved = {key for key in group.keys() - {"params", "lr"} if key not in was or group[key] != was[key]}
            assert moved <= {"step", "lookahead_step"}, name


def test_the_parameters_of_a_loss_learn_like_the_head(trainee: Trainee) -> None:
    loss = nn.Linear(2, 3)
    groups = parameter_groups(trainee, blocks_of(trainee), RECIPE, loss)
    assert {group["lr"] for group in groups if group["name"] == "criterion"} == {1e-2}
    assert sum(len(group["params"]) for group in groups if group["name"] == "criterion") == 2


def factors(steps: int, **changes: Any) -> list[float]:
    recipe = replace(Recipe(epochs=10, warmup_epochs=0.0), **changes)
    return [rate_factor(recipe, step, steps) for step in range(10 * steps)]


def test_a_warm_up_rises_evenly_and_step_by_step() -> None:
    found = factors(4, sched="constant", warmup_epochs=1.0)
    assert found[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert set(found[4:]) == {1.0}


def test_cosine_falls_from_the_warm_up_to_the_least_rate() -> None:
    found = factors(5, sched="cosine", warmup_epochs=2.0, min_lr=0.1)
    assert found[10] == 1.0 and found[30] == pytest.approx(0.55) and found[49] < 0.105
    assert all(left > right > 0.1 for left, right in pairwise(found[10:]))


def test_exponential_falls_by_the_decay_over_the_run() -> None:
    found = factors(5, sched="exponential", decay_rate=0.01)
    assert found[25] == pytest.approx(0.1) and found[49] / found[48] == pytest.approx(0.01 ** (1 / 50))
    assert min(factors(5, sched="exponential", decay_rate=1e-9, min_lr=0.2)) == 0.2


def test_step_falls_after_so_many_epochs() -> None:
    found = factors(2, sched="step", decay_rate=0.1, decay_epochs=4)
    assert found == pytest.approx([1.0] * 8 + [0.1] * 8 + [0.01] * 4)


def test_one_cycle_is_that_of_pytorch() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    # Theirs counts its steps from 0 to total - 1, and turns at 0.3 * total - 1.
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1.0, total_steps=1000, final_div_factor=400)
    expected = []
    for _ in range(1000):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step() if len(expected) < 1000 else None
    assert factors(100, sched="one-cycle") == pytest.approx(expected, abs=0.01)
    assert expected[-1] == pytest.approx(1e-4) == factors(100, sched="one-cycle")[-1]


def test_plateau_waits_falls_and_stops_falling() -> None:
    recipe = Recipe(decay_epochs=2, decay_rate=0.1, min_lr=0.05)
    state, found = Plateau(), []
    for score in (0.5, 0.4, 0.5, 0.3, 0.6, 0.6, 0.6, 0.6, math.nan, math.nan):
        state = state.after(score, recipe)
        found.append(state.factor)
    assert found == [1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05]
    assert state.best == 0.6
