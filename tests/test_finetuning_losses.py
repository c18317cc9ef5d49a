"""Losses: what is made small."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embedkit.errors import FinetuneError
from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.training.losses import METRIC_LOSSES, balanced_weights, make_criterion


def batch_of(codes: list[int], targets: torch.Tensor | None = None) -> SimpleNamespace:
    return SimpleNamespace(codes=torch.tensor(codes), targets=targets)


def test_cross_entropy_is_the_mean_of_minus_the_log_of_the_true_class() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    loss = make_criterion(Recipe(), 2, 4)(logits, torch.zeros(2, 4), batch_of([0, 0]))
    expected = -np.mean([np.log(np.exp(2) / (np.exp(2) + 1)), np.log(1 / (1 + np.e))])
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_targets_of_one_class_are_its_code_and_mixed_ones_lie_between() -> None:
    criterion = make_criterion(Recipe(smoothing=0.1), 3, 4)
    logits, nothing = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 4)
    first, second = (criterion(logits, nothing, batch_of([code])) for code in (0, 2))
    same = criterion(logits, nothing, batch_of([0], torch.tensor([[1.0, 0.0, 0.0]])))
    mixed = criterion(logits, nothing, batch_of([0], torch.tensor([[0.7, 0.0, 0.3]])))
    assert torch.allclose(same, first)
    assert torch.allclose(mixed, 0.7 * first + 0.3 * second)


def test_parts_of_a_batch_add_up_to_the_whole_with_class_weights() -> None:
    codes = [0, 0, 0, 0, 1, 0]
    criterion = make_criterion(Recipe(), 2, 4, class_weights=balanced_weights(np.array(codes), 2))
    logits, nothing = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(6, 4)
    whole = criterion(logits, nothing, batch_of(codes))
    parts = [criterion(logits[span], nothing[span], batch_of(codes[span])) for span in (slice(0, 4), slice(4, 6))]
    assert torch.allclose(whole, parts[0] * 4 / 6 + parts[1] * 2 / 6)


def test_balanced_weights_make_classes_count_alike() -> None:
    codes = np.array([0] * 30 + [1] * 10 + [3] * 5)
    weights = balanced_weights(codes, 4)
    sums = [weights[codes][codes == code].sum() for code in (0, 1, 3)]
    assert sums == pytest.approx([15, 15, 15])
    assert weights[2] == 0
    assert weights[codes].mean() == pytest.approx(1)


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_a_metric_loss_pulls_classes_apart(name: str) -> None:
    pytest.importorskip("pytorch_metric_learning")
    random = torch.Generator().manual_seed(0)
    codes = torch.arange(3).repeat_interleave(6)
    embeddings = torch.randn(18, 8, generator=random).requires_grad_()
    criterion = make_criterion(Recipe(loss=name), 3, 8)
    optimiser = torch.optim.Adam([embeddings, *criterion.parameters()], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        loss = criterion(torch.zeros(18, 3), embeddings, SimpleNamespace(codes=codes, targets=None))
        loss.backward()
        optimiser.step()
    unit = torch.nn.functional.normalize(embeddings.detach(), dim=1)
    cosines = unit @ unit.T
    same = codes[:, None] == codes
    assert cosines[same].mean() > cosines[~same].mean() + 0.5


def test_arcface_prototypes_are_drawn_by_the_seed_and_learn() -> None:
    pytest.importorskip("pytorch_metric_learning")
    recipe = Recipe(loss="arcface")
    one, same, other = (
        next(make_criterion(each, 3, 8).parameters()) for each in (recipe, recipe, replace(recipe, seed=1))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (8, 3) and one.requires_grad


def test_triplets_without_a_partner_cost_nothing_and_can_be_learned_from() -> None:
    pytest.importorskip("pytorch_metric_learning")
    embeddings = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = make_criterion(Recipe(loss="triplet"), 2, 8)(torch.zeros(2, 2), embeddings, batch_of([0, 1]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert embeddings.grad is not None


@pytest.mark.parametrize(
    "recipe, words",
    [
        (Recipe(loss="supcon", smoothing=0.1), "labels to smooth"),
        (Recipe(loss="triplet", augmentation=Augmentation(mixup=0.2)), "leave --mixup"),
        (Recipe(loss="supcon", warmup="probe"), "trains no head that could be warmed up"),
        (Recipe(loss="arcface", warmup="sgd"), "leave --warmup at auto"),
        (Recipe(loss="triplet", batch_size=6), r"6 are too few; choose a --batch-size of 8 or more"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(recipe: Recipe, words: str) -> None:
    with pytest.raises(FinetuneError, match=words):
        make_criterion(recipe, 2, 8)


def test_parts_of_a_batch_add_up_for_arcface_alone_of_the_metric_losses() -> None:
    pytest.importorskip("pytorch_metric_learning")
    embeddings, codes = torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), [0, 1] * 5
    for name in METRIC_LOSSES:
        criterion = make_criterion(Recipe(loss=name, batch_size=8), 2, 8)
        whole = criterion(embeddings, embeddings, batch_of(codes))
        parts = [criterion(embeddings[at], embeddings[at], batch_of(codes[at])) for at in (slice(0, 4), slice(4, 10))]
        assert torch.allclose(whole, 0.4 * parts[0] + 0.6 * parts[1]) is criterion.adds_up is (name == "arcface")
