"""Recipes: frozen settings that check themselves and travel as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from embedkit.errors import FinetuneError
from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.finetuning.recipe import Recipe


def test_a_recipe_survives_json() -> None:
    recipe = Recipe(
        head="mlp:64", unfreeze="blocks.[56],*norm*", body_lr=3e-5, balance=True,
        augmentation=Augmentation(crop_scale=(0.5, 1.0), mixup=0.2),
    )  # fmt: skip
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe and hash(again) == hash(recipe)


def test_absent_settings_have_their_defaults() -> None:
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"epochs": 3, "augmentation": {"hflip": 0.5}}) == Recipe(
        epochs=3, augmentation=Augmentation(hflip=0.5)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_decya": 0.5}, "there is no setting 'layer_decya'; did you mean layer_decay"),
        ({"augmentation": {"mixp": 0.5}}, "there is no setting 'mixp'; did you mean mixup"),
        ({"augmentation": [1]}, "so is its augmentation"),
        ([1], "a recipe is an object of settings"),
        ({"epochs": "ten"}, "epochs must be a whole number; got 'ten'"),
        ({"epochs": True}, "epochs must be a whole number; got True"),
        ({"body_lr": "1e-3"}, "body_lr must be a number"),
        ({"balance": 1}, "balance must be true or false"),
        ({"opt": None}, "opt must be text"),
        ({"body_lr": 10**400}, "body_lr must be 0 or more, and finite; got 1000"),
        ({"augmentation": {"crop_scale": [0.1, 0.5, 1]}}, "crop_scale must be two numbers"),
        ({"augmentation": {"crop_scale": ["a", "b"]}}, "crop_scale must be two numbers"),
        ({"augmentation": {"crop_ratio": 2}}, "crop_ratio must be two numbers; got 2"),
        ({"augmentation": {"aa": 3}}, "aa must be text; got 3"),
        ({"augmentation": {"hflip": True}}, "hflip must be a number; got True"),
        ({"augmentation": {"hflip": "0.5"}}, "hflip must be a number"),
        ({"augmentation": {"mixup_off_epoch": 2.5}}, "mixup_off_epoch must be a whole number"),
    ],
)
def test_a_strangers_recipe_is_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(FinetuneError, match=message):
        Recipe.from_dict(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sched": "cosin"}, "sched must be one of constant, cosine, .*; got 'cosin'"),
        ({"warmup": "yes"}, "warmup must be one of auto, probe, sgd, none"),
        ({"amp_dtype": "int8"}, "amp_dtype must be one of fp32, bf16, fp16"),
        ({"loss": "mse"}, "loss must be one of"),
        ({"head": "mlp"}, "there is no head 'mlp'; choose linear, or mlp:UNITS such as mlp:512"),
        ({"head": "mlp:0"}, "there is no head"),
        ({"head": "mlp:٣"}, "there is no head"),
        ({"head": "mlp:9999999"}, "there is no head"),
        ({"unfreeze": "last-0"}, "unfreeze must be all, none, last-N or a pattern"),
        ({"unfreeze": " "}, "unfreeze must be"),
        ({"epochs": -1}, "epochs must be 0 or more; got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"head_epochs": 10**400}, r"head_epochs must be at least 1, and no larger than 2\^53"),
        ({"seed": -(10**400)}, "seed must be from 0"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0 and at most 1"),
        ({"body_lr": float("nan")}, "body_lr must be 0 or more; got nan"),
        ({"head_lr": float("inf")}, "head_lr must be 0 or more, and finite; got inf"),
        ({"smoothing": 1.0}, "smoothing must be from 0 to below 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"augmentation": {}}, "augmentation must be an Augmentation"),
        ({"augmentation": Augmentation(mixup_off_epoch=3)}, "mixup_off_epoch ends what does not begin"),
        ({"augmentation": Augmentation(mix_prob=0.5)}, "mix_prob is the chance of what does not come"),
        ({"head_epochs": 5}, "head_epochs are of a warm-up by steps, and none is made"),
        ({"gradual": 2, "unfreeze": "none"}, "gradual thaws one block after the other"),
        ({"epochs": 3, "warmup_epochs": 4.0}, "rise for 4 epochs never arrive in 3"),
        (
            {"loss": "supcon", "unfreeze": "none"},
            "loss supcon compares embeddings, which a frozen body does not change",
        ),
        ({"warmup": "probe", "head": "mlp:8"}, "cannot warm up the head mlp:8"),
        ({"from_scratch": True, "unfreeze": "last-2"}, "must learn everything"),
        ({"from_scratch": True, "warmup": "probe"}, "has no embeddings to warm a head up on"),
        ({"lora": 4, "unfreeze": "none"}, "adapters in a frozen network learn nothing"),
    ],
)
def test_settings_that_make_no_sense_say_what_would(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneError, match=message):
        Recipe(**settings)


def test_auto_chooses_the_warm_up() -> None:
    assert Recipe().warmup_kind == "probe"
    assert Recipe(head="mlp:8").warmup_kind == "sgd"
    assert Recipe(from_scratch=True).warmup_kind == "none"
    assert Recipe(warmup="sgd").warmup_kind == "sgd"


def test_whole_numbers_are_numbers() -> None:
    assert Recipe(clip_grad=1, warmup_epochs=0) == Recipe(clip_grad=1.0, warmup_epochs=0.0)


def test_every_setting_is_documented() -> None:
    text = str(Recipe.__doc__)
    names = [each.name for each in dataclasses.fields(Recipe)]
    assert [name for name in names if name not in text] == []
    assert len(names) > 30
