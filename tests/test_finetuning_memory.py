"""Training where memory holds fewer images than a batch has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embedkit.errors import FinetuneError
from tests.test_finetuning_training import ERRORS, RECIPE, Narrow, World


@pytest.fixture(scope="module")
def world(tiny_backbone: Path, photos: Path) -> World:
    return World(tiny_backbone, photos)


@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "system"])
def test_out_of_memory_halves_the_batch_and_ends_as_the_whole_one_would(
    world: World, tmp_path: Path, error: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    wide, _ = world.train(tmp_path / "wide")
    trainee = world.trainee(RECIPE)
    trainee.head = Narrow(trainee.head, 2, error)
    narrow, history = world.train(tmp_path / "narrow", trainee=trainee)
    assert trainee.head.largest == 2
    sizes = {row.batch_size for row in history.epochs}
    assert sizes <= {2, 3}  # Two threads have two shares of three: none sees more than two of them.
    assert f"out of memory: {max(sizes)} images at once" in caplog.text
    for left, right in zip(wide.parameters(), narrow.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


def test_memory_for_a_single_image_is_enough_where_statistics_are_learned(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = replace(RECIPE, freeze_norm=False, epochs=1)
    trainee = world.trainee(recipe)
    trainee.head = Narrow(trainee.head, 1, ERRORS[0])
    _, history = world.train(tmp_path, recipe, trainee)
    assert history.epochs[0].batch_size == 1
    assert (
        "1 images at once from now on, and their gradients are added up; batch normalisation learns no" in caplog.text
    )


def test_memory_for_no_image_at_all_is_an_error_that_says_what_to_try(world: World, tmp_path: Path) -> None:
    trainee = world.trainee(RECIPE)
    trainee.head = Narrow(trainee.head, 0, ERRORS[0])
    with pytest.raises(FinetuneError, match="one image's gradients; try --grad-checkpointing"):
        world.train(tmp_path, trainee=trainee)


def test_a_loss_that_compares_says_that_it_compares_fewer_and_ends_where_they_are_too_few(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Spread(nn.Module):
        """Compares images: the mean of a batch is not that of its parts."""

        def forward(self, outputs: Tensor, embeddings: Tensor, batch: Any) -> Tensor:
            return -outputs.std(0).mean()

    recipe = replace(RECIPE, batch_size=12, epochs=1, loss="supcon")
    trainee = world.trainee(recipe)
    trainee.head = Narrow(trainee.head, 7, ERRORS[0])
    _, history = world.train(tmp_path / "fewer", recipe, trainee, criterion=Spread())
    assert trainee.head.largest == 6 and history.epochs[0].batch_size == 8
    assert "8 images at once from now on, and the loss supcon compares no more than these" in caplog.text
    assert "added up" not in caplog.text
    trainee = world.trainee(recipe)
    trainee.head = Narrow(trainee.head, 5, ERRORS[0])
    with pytest.raises(
        FinetuneError, match=r"gradients of 6 images, and the loss supcon compares no fewer than 8; try"
    ):
        world.train(tmp_path / "none", recipe, trainee, criterion=Spread())


def test_other_errors_of_the_network_are_not_taken_for_a_lack_of_memory(world: World, tmp_path: Path) -> None:
    trainee = world.trainee(RECIPE)
    trainee.head = Narrow(trainee.head, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        world.train(tmp_path, trainee=trainee)
