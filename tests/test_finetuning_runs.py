"""Runs that go on from a state on disk, which may be damaged or come from a stranger."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from embedkit.errors import FinetuneError
from embedkit.finetuning.training.checkpoints import load_state, save_state
from embedkit.finetuning.training.history import Moment
from tests.test_finetuning_training import RECIPE, Interrupted, World, interrupt


@pytest.fixture(scope="module")
def world(tiny_backbone: Path, photos: Path) -> World:
    return World(tiny_backbone, photos)


@pytest.fixture(scope="module")
def one_epoch(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_epoch")
    world.train(folder, replace(RECIPE, epochs=1))
    return folder


def interrupt_in(epoch: int) -> Callable[[Moment], None]:
    def watch(moment: Moment) -> None:
        if moment.epoch == epoch:
            raise Interrupted

    return watch


def test_a_damaged_state_is_named_with_what_to_do(world: World, tmp_path: Path) -> None:
    world.train(tmp_path, replace(RECIPE, epochs=1))
    path = tmp_path / "state" / "last.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FinetuneError, match=r"last\.safetensors cannot be read .*; remove the folder .*state"):
        world.train(tmp_path, replace(RECIPE, epochs=1))


def refuse_changed(world: World, finished: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Go on with a copy of a run, in whose state something was changed: it is refused, and the file is named."""
    shutil.copytree(finished, folder)
    path = folder / "state" / "last.safetensors"
    tensors, facts = load_state(path)
    change(facts)
    save_state(path, tensors, facts)
    with pytest.raises(FinetuneError, match=r"last\.safetensors does not fit this run .*; remove the folder"):
        world.train(folder, replace(RECIPE, epochs=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"history": {"epochs": [], "best_epoch": 3, "stopped": ""}},
        {"history": {"epochs": [{"epoch": 1}], "best_epoch": 0, "stopped": ""}},
        {"optimiser": {"pairs": []}},
        {"optimiser": {"tensor": "trainee.head.bias"}},
        {"plateau": {"factor": 1.0, "other": 2}},
        {"plateau": {"factor": [1], "best": None, "waited": 0}},
        {"at_once": "many"},
        {"best_score": [1]},
        {"at_once": math.inf},
        {"plateau": {"factor": 1.0, "best": None, "waited": math.inf}},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_a_state_that_a_stranger_changed_is_refused_by_name(
    world: World, tmp_path: Path, changes: dict[str, Any], one_epoch: Path
) -> None:
    refuse_changed(world, one_epoch, tmp_path / "run", lambda facts: facts.update(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": math.inf}, {"loss": math.inf}, {"seconds": math.nan}, {"rates": {"head": math.inf}},
        {"images": 10**400}, {"skipped": -1},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_an_epoch_that_cannot_have_been_is_refused_by_name(
    world: World, tmp_path: Path, changes: dict[str, Any], one_epoch: Path
) -> None:
    refuse_changed(world, one_epoch, tmp_path / "run", lambda facts: facts["history"]["epochs"][0].update(changes))


@pytest.mark.parametrize("change", [("scale", "x"), ("scale", math.inf), ("scale", 0.0), ("_growth_tracker", "x")])
def test_a_scale_that_is_none_is_refused_by_name(world: World, tmp_path: Path, change: tuple[str, Any]) -> None:
    recipe = replace(RECIPE, epochs=2, amp_dtype="fp16")
    with pytest.raises(Interrupted):
        world.train(tmp_path, recipe, progress=interrupt_in(2))
    path = tmp_path / "state" / "last.safetensors"
    tensors, facts = load_state(path)
    facts["scaler"] |= {"growth_factor": "x", "growth_interval": None}  # Which nobody reads.
    save_state(path, tensors, facts)
    shutil.copytree(tmp_path / "state", tmp_path / "again" / "state")
    world.train(tmp_path, recipe)
    facts["scaler"][change[0]] = change[1]
    save_state(tmp_path / "again" / "state" / path.name, tensors, facts)
    with pytest.raises(FinetuneError, match=r"last\.safetensors does not fit this run .*; remove the folder"):
        world.train(tmp_path / "again", recipe)


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw"])
def test_what_an_optimiser_cannot_go_on_from_is_named_with_the_file(world: World, tmp_path: Path, opt: str) -> None:
    recipe = replace(RECIPE, epochs=4, opt=opt, batch_size=4)  # Three updates an epoch.
    with pytest.raises(Interrupted):
        world.train(tmp_path, recipe, progress=interrupt)
    path = tmp_path / "state" / "last.safetensors"
    tensors, facts = load_state(path)
    moments = dict(facts["optimiser"]["pairs"])["state"]["pairs"][0][1]["pairs"]
    changed = dict(moments)["lookahead_slow_buff" if opt.startswith("lookahead") else "exp_avg"]["tensor"]
    save_state(path, tensors | {changed: torch.zeros(7)}, facts)
    with pytest.raises(FinetuneError, match=r"last\.safetensors does not fit this run .*; remove the folder"):
        world.train(tmp_path, recipe)


def test_a_state_that_is_a_folder_is_named(world: World, tmp_path: Path) -> None:
    (tmp_path / "state" / "last.safetensors").mkdir(parents=True)
    with pytest.raises(FinetuneError, match=r"last\.safetensors cannot be read .*; remove the folder"):
        world.train(tmp_path)


def test_the_weights_of_another_network_are_refused_by_name(world: World, tmp_path: Path, one_epoch: Path) -> None:
    shutil.copytree(one_epoch, tmp_path / "run")
    best = tmp_path / "run" / "state" / "best-1.safetensors"
    _, facts = load_state(best)
    save_state(best, {"trainee.head.weight": torch.zeros(3, 3)}, facts)
    with pytest.raises(FinetuneError, match=r"best-1\.safetensors does not fit this run"):
        world.train(tmp_path / "run", replace(RECIPE, epochs=1))
    best.unlink()
    with pytest.raises(FinetuneError, match=r"best-1\.safetensors is missing; remove the folder"):
        world.train(tmp_path / "run", replace(RECIPE, epochs=1))
