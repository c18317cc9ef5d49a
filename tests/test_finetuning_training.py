"""The training loop, on a small network and generated pictures.

As a script, ``test_finetuning_training.py BACKBONE PHOTOS [FOLDER CHANGES]`` is what test_finetuning_processes.py
starts and kills.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embedkit.backbones import Backbone, import_timm
from embedkit.errors import FinetuneError
from embedkit.finetuning.blocks import blocks_of
from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.finetuning.feeding.feed import Feed
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.trainee import Trainee, make_trainee
from embedkit.finetuning.training.checkpoints import load_state
from embedkit.finetuning.training.distributed import join_world
from embedkit.finetuning.training.history import History, Moment
from embedkit.finetuning.training.loop import resumable, train
from embedkit.finetuning.training.losses import CrossEntropy
from embedkit.sources import ImageFile, list_images

RECIPE = Recipe(
    epochs=3, batch_size=8, head_lr=0.01, body_lr=0.001, warmup_epochs=0.5, augmentation=Augmentation(hflip=0.5)
)
IDENTITY = {"images": "a", "backbone": {"name": "tiny"}}


class World:
    """A backbone and pictures, half of each class to learn from and half to validate on."""

    def __init__(self, backbone: Path, photos: Path) -> None:
        self.backbone = Backbone.load(backbone, device="cpu")
        self.entries = list(list_images(photos).files)
        self.codes = np.array([int(entry.label == "dog") for entry in self.entries])

    def trainee(self, recipe: Recipe) -> Trainee:
        return make_trainee(self.backbone, 2, recipe)

    def feed(self, recipe: Recipe, part: int, **settings: Any) -> Feed:
        rows = range(part, len(self.entries), 2)
        entries = [self.entries[row] for row in rows]
        return Feed(entries, self.codes[list(rows)], self.backbone.preprocessing, recipe, workers=2, **settings)

    def train(
        self,
        folder: Path,
        recipe: Recipe = RECIPE,
        trainee: Trainee | None = None,
        share: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[Trainee, History]:
        trainee = trainee or self.trainee(recipe)
        settings = {"validation": self.feed(recipe, 1), "identity": IDENTITY, "criterion": CrossEntropy()} | settings
        history = train(
            trainee, self.feed(recipe, 0, **(share or {})), recipe, folder, blocks=blocks_of(trainee), **settings
        )
        return trainee, history


@pytest.fixture(scope="module")
def world(tiny_backbone: Path, photos: Path) -> World:
    return World(tiny_backbone, photos)


def same(left: nn.Module, right: nn.Module) -> bool:
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_learns_what_it_is_shown_and_tells_each_epoch(world: World, tmp_path: Path) -> None:
    moments: list[Moment] = []
    trainee, history = world.train(tmp_path, replace(RECIPE, epochs=6), progress=moments.append)
    losses = [row.loss for row in history.epochs]
    assert losses[-1] < 0.5 * losses[0]
    assert history.best is not None and history.best.metrics["top1"] == 1.0
    assert history.best_epoch == 1 + [row.metrics["top1"] for row in history.epochs].index(1.0)
    assert [row.images for row in history.epochs] == [12] * 6
    lines = (tmp_path / "epochs.csv").read_text().splitlines()
    assert len(lines) == 7 and lines[0].startswith("epoch,loss,val_top1,val_mean_class_accuracy,val_loss,images,")
    assert (moments[-1].epoch, moments[-1].images, moments[-1].total) == (6, 12, 12)
    assert not trainee.training


def test_progress_counts_what_an_epoch_shows(world: World, tmp_path: Path) -> None:
    moments: list[Moment] = []
    halves = {"batches": lambda epoch: [np.array([0, 1, 2]), np.array([6, 7, 8])]}
    world.train(tmp_path, replace(RECIPE, epochs=1), share=halves, progress=moments.append)
    assert [(moment.images, moment.total) for moment in moments] == [(3, 6), (6, 6)]


def test_the_same_run_twice_ends_in_the_same_weights(world: World, tmp_path: Path) -> None:
    one, _ = world.train(tmp_path / "one")
    other, _ = world.train(tmp_path / "other")
    another, _ = world.train(tmp_path / "another", replace(RECIPE, seed=1))
    assert same(one, other) and not same(one, another)


def test_a_table_that_a_kill_left_behind_is_written_again(world: World, tmp_path: Path) -> None:
    world.train(tmp_path)
    table = tmp_path / "epochs.csv"
    before = table.read_text()
    table.write_text("".join(before.splitlines(keepends=True)[:-1]))
    world.train(tmp_path)
    assert table.read_text() == before


class Interrupted(Exception):
    """Raised in the middle of the third epoch."""


def interrupt(moment: Moment) -> None:
    if moment.epoch == 3:
        raise Interrupted


@pytest.mark.parametrize(
    "changes",
    [
        {"model_ema": 0.9, "opt": "adamw"},
        {"opt": "sgd", "sched": "plateau", "decay_epochs": 1, "grad_accum_steps": 2},
        {"opt": "lookahead_radam", "freeze_norm": False, "gradual": 1},
        {"opt": "rmsprop", "amp_dtype": "fp16", "sched": "one-cycle"},
        {"opt": "adafactor"},
        {"opt": "muon"},
        {"opt": "lookahead_adan"},
        {"opt": "lamb"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_run_that_goes_on_ends_in_the_weights_of_an_unbroken_one(
    world: World, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert_goes_on(world, tmp_path, replace(RECIPE, **changes))


def test_a_transformer_that_drops_by_chance_goes_on_with_the_same_chances(vit_world: World, tmp_path: Path) -> None:
    assert_goes_on(vit_world, tmp_path, replace(RECIPE, drop_path=0.5, grad_checkpointing=True))


def assert_goes_on(world: World, folder: Path, recipe: Recipe) -> None:
    unbroken, history = world.train(folder / "unbroken", recipe)
    with pytest.raises(Interrupted):
        world.train(folder / "broken", recipe, progress=interrupt)
    torch.rand(7)  # What else a process draws must not matter.
    resumed, again = world.train(folder / "broken", recipe)
    assert same(unbroken, resumed)
    assert [row.loss for row in history.epochs] == [row.loss for row in again.epochs]
    left, right = (load_state(folder / name / "state" / "last.safetensors")[0] for name in ("unbroken", "broken"))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_finished_run_is_read_and_not_trained_again(world: World, tmp_path: Path) -> None:
    trained, history = world.train(tmp_path)
    moments: list[Moment] = []
    again, read = world.train(tmp_path, progress=moments.append)
    assert same(trained, again) and read == history and not moments


def test_the_folder_of_another_run_is_refused_by_what_differs(world: World, tmp_path: Path) -> None:
    assert not resumable(tmp_path, IDENTITY, RECIPE)
    world.train(tmp_path, replace(RECIPE, epochs=1))
    assert resumable(tmp_path, IDENTITY, replace(RECIPE, epochs=1))
    other = replace(RECIPE, epochs=1, body_lr=0.5, augmentation=Augmentation(hflip=0.25))
    with pytest.raises(FinetuneError) as caught:
        world.train(tmp_path, other, identity=IDENTITY | {"backbone": {"name": "large"}})
    for line in (
        "backbone.name: 'tiny' there, 'large' now", "recipe.body_lr: 0.001 there, 0.5 now",
        "recipe.augmentation.hflip: 0.5 there, 0.25 now",
    ):  # fmt: skip
        assert line in str(caught.value)
    assert "recipe.opt" not in str(caught.value)
    with pytest.raises(FinetuneError, match="images: 'a' there, 'b' now"):
        resumable(tmp_path, IDENTITY | {"images": "b"}, replace(RECIPE, epochs=1))


class Narrow(nn.Module):
    """A layer whose memory holds a few images: it raises what PyTorch's allocator raises."""

    def __init__(self, inside: nn.Module, images: int, error: RuntimeError) -> None:
        super().__init__()
        self.inside, self.images, self.error, self.largest = inside, images, error, 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.images:
            raise self.error
        self.largest = max(self.largest, len(x))
        return self.inside(x)  # type: ignore[no-any-return]


ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
          RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")]  # fmt: skip


def test_a_loss_that_is_no_number_stops_the_run_with_what_to_try(world: World, tmp_path: Path) -> None:
    recipe = replace(RECIPE, opt="sgd", body_lr=1e30, head_lr=1e30, clip_grad=0.0, sched="constant", warmup_epochs=0)
    with pytest.raises(FinetuneError, match=r"no finite number in epoch 1, update \d; try a tenth of --body-lr"):
        world.train(tmp_path, recipe)


def test_several_batches_an_update_are_one_batch_of_their_size(world: World, tmp_path: Path) -> None:
    recipe = replace(RECIPE, batch_size=12, augmentation=Augmentation())
    one, _ = world.train(tmp_path / "one", recipe)
    several, _ = world.train(tmp_path / "several", replace(recipe, batch_size=4, grad_accum_steps=3))
    for left, right in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("patience", "words"), [(1, "1 epoch"), (2, "2 epochs")])
def test_early_stopping_keeps_the_best_epoch(world: World, tmp_path: Path, patience: int, words: str) -> None:
    scores = iter([0.1, 0.6, 0.5, 0.6, 0.9])
    states: list[dict[str, Tensor]] = []

    def validate(trainee: Trainee) -> dict[str, float]:
        states.append({name: value.clone() for name, value in trainee.state_dict().items()})
        return {"top1": next(scores)}

    trainee, history = world.train(tmp_path, replace(RECIPE, epochs=9, patience=patience), validate=validate)
    assert (len(history.epochs), history.best_epoch) == (2 + patience, 2)
    assert history.stopped == f"no better top1 in {words}"
    assert all(torch.equal(value, states[1][name]) for name, value in trainee.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["best-2.safetensors", "last.safetensors"]


def test_the_least_loss_is_the_best_and_a_metric_that_is_none_is_named(world: World, tmp_path: Path) -> None:
    losses = iter([0.5, 0.2, math.nan])
    recipe = replace(RECIPE, metric="loss")
    _, history = world.train(tmp_path / "a", recipe, validate=lambda _: {"loss": next(losses)})
    assert history.best_epoch == 2
    with pytest.raises(FinetuneError, match="no validation metric is called 'loss'; choose one of top1"):
        world.train(tmp_path / "b", recipe, validate=lambda _: {"top1": 1.0})


def test_without_validation_the_last_epoch_is_kept(world: World, tmp_path: Path) -> None:
    _, history = world.train(tmp_path, validation=None)
    assert history.best_epoch == 3 and not history.epochs[0].metrics


@pytest.mark.parametrize(("scores", "best"), [([0.3, None, None], 1), ([None, 0.1, None], 2), ([0.3, None, 0.5], 3)])
def test_an_epoch_that_no_validation_judged_replaces_none_that_one_did(
    world: World, tmp_path: Path, scores: list[float | None], best: int
) -> None:
    left = iter(scores)

    def validate(trainee: Trainee) -> dict[str, float]:
        score = next(left)
        return {} if score is None else {"top1": score}

    _, history = world.train(tmp_path, validate=validate)
    assert (history.best_epoch, history.judged) == (best, True)


def test_an_average_of_weights_is_what_is_validated_and_kept(world: World, tmp_path: Path) -> None:
    recipe = replace(RECIPE, model_ema=0.9)
    averaged, _ = world.train(tmp_path / "averaged", recipe, validation=None)
    plain, _ = world.train(tmp_path / "plain", validation=None)
    state = load_state(tmp_path / "averaged" / "state" / "last.safetensors")[0]
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, state[f"average.{name}"])
        assert torch.equal(plain.state_dict()[name], state[f"trainee.{name}"])
    assert not same(averaged, plain)


def test_a_frozen_body_keeps_every_parameter_and_every_statistic(world: World, tmp_path: Path) -> None:
    recipe = replace(RECIPE, unfreeze="none", freeze_norm=False)
    before, (after, _) = world.trainee(recipe), world.train(tmp_path, recipe, validation=None)
    assert same(before.network, after.network) and not same(before.head, after.head)
    moved, _ = world.train(tmp_path / "all", replace(recipe, unfreeze="all"), validation=None)
    assert "running_mean" in " ".join(
        name for name, value in moved.state_dict().items() if not torch.equal(value, before.state_dict()[name])
    )


def test_gradual_unfreezing_moves_one_block_more_each_epoch(world: World, tmp_path: Path) -> None:
    recipe = replace(RECIPE, gradual=1, weight_decay=0.0)
    states: list[dict[str, Tensor]] = [world.trainee(recipe).state_dict()]
    blocks = blocks_of(world.trainee(recipe))

    def validate(trainee: Trainee) -> dict[str, float]:
        states.append({name: value.clone() for name, value in trainee.state_dict().items()})
        return {"top1": 0.0}

    world.train(tmp_path, recipe, validate=validate)
    for before, after, thawed in zip(states[:-1], states[1:], (1, 2, 3), strict=True):
        moved = [any(not torch.equal(before[name], after[name]) for name in block.parameters) for block in blocks]
        assert moved == [False] * (len(blocks) - thawed) + [True] * thawed


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_learns_too_and_keeps_float32_weights(world: World, tmp_path: Path, dtype: str) -> None:
    trainee, history = world.train(tmp_path, replace(RECIPE, amp_dtype=dtype, epochs=6))
    assert history.epochs[-1].loss < 0.6 * history.epochs[0].loss
    assert {value.dtype for value in trainee.parameters()} == {torch.float32}


def test_the_parameters_of_a_loss_learn_and_are_kept(world: World, tmp_path: Path) -> None:
    class Scaled(CrossEntropy):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs: Tensor, embeddings: Tensor, batch: Any) -> Tensor:
            return super().forward(outputs * self.scale, embeddings, batch)

    criterion = Scaled()
    _, history = world.train(tmp_path, criterion=criterion)
    assert criterion.scale != 1 and history.epochs[0].rates["criterion"] == history.epochs[0].rates["head"]
    assert torch.equal(load_state(tmp_path / "state" / "last.safetensors")[0]["criterion.scale"], criterion.scale)


def test_pictures_that_cannot_be_read_are_counted_and_the_others_learned_from(world: World, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    entries = [*world.entries[:3], ImageFile("bad.jpg", str(bad)), *world.entries[12:15]]
    feed = Feed(entries, np.array([0, 0, 0, 0, 1, 1, 1]), world.backbone.preprocessing, RECIPE, workers=2)
    trainee = world.trainee(RECIPE)
    settings: dict[str, Any] = {"blocks": blocks_of(trainee), "criterion": CrossEntropy(), "identity": {}}
    history = train(trainee, feed, RECIPE, tmp_path / "run", **settings)
    assert [(row.images, row.failed) for row in history.epochs] == [(6, 1)] * 3
    feed = Feed(entries[3:4], np.array([0]), world.backbone.preprocessing, RECIPE, workers=2)
    with pytest.raises(FinetuneError, match=r"none of the 1 training images can be read: bad\.jpg"):
        train(trainee, feed, RECIPE, tmp_path / "none", **settings)


@pytest.fixture(scope="module")
def vit_world(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> World:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.json"
    model = import_timm().create_model("test_vit", num_classes=10, img_size=64)
    save_file(model.state_dict(), path.with_suffix(".safetensors"))
    facts = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 10}
    path.write_text(json.dumps({"timm_architecture": "test_vit", "pretrained_cfg": facts}))
    return World(path, photos)


def train_once(world: World, folder: Path, changes: dict[str, Any]) -> None:
    """Train in as many processes as torchrun started, and say each update."""
    if "WORLD_SIZE" not in os.environ:
        torch.set_num_threads(2)  # A share for each: their sum must be the same each time.
    narrow = changes.pop("narrow", None)
    recipe = replace(RECIPE, **changes)
    trainee = world.trainee(recipe)
    with join_world() as processes:
        if narrow is not None:
            trainee.head = Narrow(trainee.head, 1 if processes.rank == narrow else 100, ERRORS[0])
        share = {"rank": processes.rank, "world": processes.size}
        _, history = world.train(
            folder, recipe, trainee, share, world=processes, validation=world.feed(recipe, 1, **share),
            progress=lambda moment: print(moment.epoch, moment.images, flush=True),
        )  # fmt: skip
        end = {name: value.contiguous() for name, value in trainee.state_dict().items()}
        save_file(end, folder / f"end-{processes.rank}.safetensors")
        (folder / f"history-{processes.rank}.json").write_text(json.dumps(history.to_dict()))


def main(backbone: str, photos: str, *once: str) -> None:
    """Train once, or for every line of standard input in a child of its own, whose id is said first."""
    torch.set_num_threads(1)  # No thread may be running when this process forks.
    world = World(Path(backbone), Path(photos))
    if once:
        train_once(world, Path(once[0]), json.loads(once[1]))
    for line in sys.stdin if not once else ():
        folder, changes = json.loads(line)
        if not (child := os.fork()):
            print(os.getpid(), flush=True)
            train_once(world, Path(folder), changes)
            os._exit(0)
        print("end", os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
