"""Heads that are fitted to stored embeddings, and answer as layers what they answer as estimators."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedkit.backbones import Backbone
from embedkit.errors import FinetuneError
from embedkit.finetuning.layers import as_estimator, load_estimator, make_layers
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.trainee import make_trainee
from embedkit.finetuning.warmup import warm_up
from embedkit.heads import MLPHead, fit_logistic, load_head, logistic_regression, save_head
from embedkit.spec import EmbeddingSpec

Rows = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]


def clouds(classes: int, rows: int = 60, width: int = 96, shares: tuple[int, ...] = ()) -> tuple[Rows, Codes]:
    """Return overlapping clouds far from the origin, each column on its own scale."""
    random = np.random.default_rng(0)
    codes = np.repeat(np.arange(classes), shares or (rows,) * classes)
    centres = random.normal(size=(classes, width))
    x = (centres[codes] + 1.5 * random.normal(size=(len(codes), width))) * np.geomspace(0.01, 100, width) + 7
    return x.astype(np.float32), codes


def answers(head: torch.nn.Module, x: Rows) -> npt.NDArray[np.float64]:
    with torch.inference_mode():
        return torch.softmax(head(torch.as_tensor(x)).double(), 1).numpy()


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_layer_gives_the_probes_likelihoods(classes: int) -> None:
    x, codes = clouds(classes)
    probe, _ = fit_logistic(x, codes)
    head = make_layers("linear", x.shape[1], classes)
    load_estimator(head, probe)
    assert np.abs(answers(head, x) - probe.predict_proba(x)).max() < 1e-4


def test_a_probe_without_a_scaler_and_a_bare_regression_are_taken_too() -> None:
    x, codes = clouds(3)
    x /= 100
    for estimator in (logistic_regression(1.0, standardise=False), logistic_regression(1.0)["regression"]):
        estimator.fit(x, codes)
        head = make_layers("linear", x.shape[1], 3)
        load_estimator(head, estimator)
        assert np.abs(answers(head, x) - estimator.predict_proba(x)).max() < 1e-5


def test_the_layers_give_the_perceptrons_likelihoods() -> None:
    x, codes = clouds(3)
    perceptron = MLPHead(hidden=16).fit(x, codes)
    head = make_layers("mlp:16", x.shape[1], 3)
    load_estimator(head, perceptron)
    assert np.abs(answers(head, x) - perceptron.predict_proba(x)).max() < 1e-4


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("kind", ["linear", "mlp:8"])
def test_layers_are_saved_as_an_estimator(tmp_path: Path, kind: str, classes: int) -> None:
    x, _ = clouds(classes)
    head = make_layers(kind, x.shape[1], classes, seed=3)
    spec = EmbeddingSpec(backbone="test_resnet", weights_sha256="ab" * 32, dim=x.shape[1])
    save_head(tmp_path / "head", as_estimator(head), classes=[f"class {n}" for n in range(classes)], spec=spec)
    found = load_head(tmp_path / "head").estimator
    assert np.abs(found.predict_proba(x) - answers(head, x)).max() < 1e-5
    assert found.predict(x).tolist() == answers(head, x).argmax(1).tolist()
    again = make_layers(kind, x.shape[1], classes, seed=4)
    load_estimator(again, found)
    assert np.abs(answers(again, x) - answers(head, x)).max() < 1e-5


@pytest.fixture
def backbone(tiny_backbone: Path) -> Backbone:
    return Backbone.load(tiny_backbone, device="cpu")


def test_the_head_on_the_embedding_is_the_probe_on_the_store(backbone: Backbone) -> None:
    random = np.random.default_rng(0)
    codes = np.arange(40) % 2
    crops = random.integers(0, 120, (40, *backbone.preprocessing.img_size, 3), dtype=np.uint8)
    crops[codes == 1, :, :, 2] += np.uint8(60)
    stored = backbone.embed_pixels(list(crops))
    trainee = make_trainee(backbone, 2, Recipe())
    found = warm_up(trainee, stored, codes, Recipe())
    probe, choice = fit_logistic(stored, codes, held_out=None)
    assert found.kind == "probe" and found.rows == 40 and found.top1 == np.mean(probe.predict(stored) == codes)
    with torch.inference_mode():
        said = torch.softmax(trainee(torch.as_tensor(crops).permute(0, 3, 1, 2)), 1).numpy()
    assert found.choice["C"] == choice["C"]
    assert np.abs(said - probe.predict_proba(stored)).max() < 1e-3


def test_the_body_stays_as_it_is(backbone: Backbone) -> None:
    x, codes = clouds(3)
    for recipe in (Recipe(), Recipe(head="mlp:8")):
        trainee = make_trainee(backbone, 3, recipe)
        before = {name: value.clone() for name, value in trainee.state_dict().items()}
        warm_up(trainee, x, codes, recipe)
        moved = {name for name, value in trainee.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {name for name in before if name.startswith("head.")}


@pytest.mark.parametrize("head", ["linear", "mlp:32"])
def test_steps_learn_what_a_probe_learns(backbone: Backbone, head: str) -> None:
    x, codes = clouds(3)
    recipe = Recipe(head=head, warmup="sgd")
    trainee = make_trainee(backbone, 3, recipe)
    lines: list[str] = []
    found = warm_up(trainee, x, codes, recipe, progress=lines.append)
    assert found.kind == "sgd" and found.top1 > 0.95
    assert found.choice["losses"][-1] < 0.5 * found.choice["losses"][0]
    assert found.choice["epochs"] == 200 and lines[-1].startswith("head, epoch 200 of 200: loss ")
    again = make_trainee(backbone, 3, recipe)
    warm_up(again, x, codes, recipe)
    for left, right in zip(trainee.head.parameters(), again.head.parameters(), strict=True):
        assert torch.equal(left, right)


def test_no_warm_up_changes_nothing(backbone: Backbone) -> None:
    x, codes = clouds(3)
    trainee = make_trainee(backbone, 3, Recipe(warmup="none"))
    before = trainee.head.weight.clone()
    found = warm_up(trainee, x, codes, Recipe(warmup="none"))
    assert (found.kind, found.rows) == ("none", 0) and math.isnan(found.top1)
    assert torch.equal(before, trainee.head.weight)


def test_balance_gives_the_rare_class_its_due(backbone: Backbone) -> None:
    x, codes = clouds(2, shares=(190, 10))
    random = np.random.default_rng(1)
    x[codes == 1] = x[codes == 0][:10] + random.normal(size=(10, x.shape[1])) * x.std(axis=0) * 0.2
    found = {}
    for balance in (False, True):
        recipe = Recipe(balance=balance)
        trainee = make_trainee(backbone, 2, recipe)
        warm_up(trainee, x, codes, recipe)
        bias = trainee.head.bias.tolist()
        found[balance] = bias[1] - bias[0], (answers(trainee.head, x).argmax(1) == 1).sum()
    assert found[True][0] - found[False][0] == pytest.approx(math.log(19), abs=1e-3)
    assert found[True][1] > found[False][1]


def test_copies_of_a_picture_are_held_out_together(backbone: Backbone) -> None:
    x, codes = clouds(2, rows=20)
    x, codes = np.repeat(x, 3, axis=0), np.repeat(codes, 3)
    random = np.random.default_rng(0)
    codes = random.integers(0, 2, len(x) // 3).repeat(3)  # Nothing to learn: copies would give themselves away.
    alone = warm_up(make_trainee(backbone, 2, Recipe()), x, codes, Recipe())
    groups = np.arange(len(x)) // 3
    together = warm_up(make_trainee(backbone, 2, Recipe()), x, codes, Recipe(), groups=groups)
    assert together.choice["C"] < alone.choice["C"]
    assert together.choice["held_out_rows"] % 3 == 0


def test_embeddings_of_another_backbone_are_refused(backbone: Backbone) -> None:
    x, codes = clouds(3, width=5)
    trainee = make_trainee(backbone, 3, Recipe())
    with pytest.raises(FinetuneError, match=r"the head takes 96 numbers a row, and got rows of shape \(180, 5\)"):
        warm_up(trainee, x, codes, Recipe())


@pytest.mark.parametrize("codes", [[0, 1, 1, 0], [0, 1, 2, 3], [-1, 0, 1, 2]])
def test_every_class_needs_a_row(backbone: Backbone, codes: list[int]) -> None:
    trainee = make_trainee(backbone, 3, Recipe())
    with pytest.raises(FinetuneError, match="the head tells 3 classes apart"):
        warm_up(trainee, np.zeros((4, 96), dtype=np.float32), np.array(codes), Recipe())


def test_damaged_embeddings_are_refused(backbone: Backbone) -> None:
    x, codes = clouds(3)
    x[5, 7] = np.nan
    with pytest.raises(FinetuneError, match="infinite or NaN"):
        warm_up(make_trainee(backbone, 3, Recipe()), x, codes, Recipe())
