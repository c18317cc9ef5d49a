"""Validation: the head's answers for plain crops, however they are computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embedkit.backbones import Backbone
from embedkit.finetuning.feeding.feed import Feed
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.trainee import Trainee, make_trainee
from embedkit.finetuning.training.validation import outputs_of, validate_classes
from embedkit.sources import ImageFile, list_images

RECIPE = Recipe(batch_size=5)


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return Backbone.load(tiny_backbone, device="cpu")


@pytest.fixture(scope="module")
def feed(backbone: Backbone, photos: Path) -> Feed:
    entries = list(list_images(photos).files)[:17]  # 12 cats and 5 dogs.
    codes = np.array([0] * 9 + [2] * 8)  # Whatever a head says, it is right about some.
    return Feed(entries, codes, backbone.preprocessing, RECIPE, workers=2)


@pytest.fixture
def trainee(backbone: Backbone) -> Trainee:
    trainee = make_trainee(backbone, 3, RECIPE)
    nn.init.normal_(trainee.head.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trainee.head.bias[1] = -1e6  # Nobody shows a class 1.
    return trainee


def test_the_metrics_are_those_of_the_answers(trainee: Trainee, feed: Feed) -> None:
    with torch.no_grad():
        logits = torch.cat([trainee(batch.pixels) for batch in feed.validation()]).double()
    codes = torch.from_numpy(feed.codes)
    right = logits.argmax(1) == codes
    found = validate_classes(trainee, feed)
    assert 0 < found["top1"] < 1
    assert found["top1"] == pytest.approx(float(right.double().mean()))
    by_class = [float(right[codes == code].double().mean()) for code in (0, 2)]
    assert found["mean_class_accuracy"] == pytest.approx(np.mean(by_class))
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, codes)), rel=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_answers_keep_the_order_of_their_images(trainee: Trainee, feed: Feed, threads: int) -> None:
    batch = next(feed.validation())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = outputs_of(trainee, batch)
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        torch.testing.assert_close(found, trainee(batch.pixels), rtol=1e-4, atol=1e-4)
    assert not found.requires_grad and torch.get_num_threads() == before


def test_out_of_memory_takes_fewer_images_at_once(trainee: Trainee, feed: Feed) -> None:
    class Narrow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    expected = validate_classes(trainee, feed)
    head = Narrow(*trainee.head.weight.shape[::-1])
    head.load_state_dict(trainee.head.state_dict())
    trainee.head = head
    assert validate_classes(trainee, feed) == pytest.approx(expected, rel=1e-4)


def test_the_shares_of_several_processes_are_all_of_the_images(
    trainee: Trainee, feed: Feed, backbone: Backbone
) -> None:
    rows = [
        batch.rows
        for rank in range(3)
        for batch in Feed(
            feed.entries, feed.codes, backbone.preprocessing, RECIPE, workers=1, rank=rank, world=3
        ).validation()
    ]
    assert sorted(torch.cat(rows).tolist()) == list(range(17))


def test_without_an_image_that_can_be_read_there_is_no_metric(
    trainee: Trainee, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    entry = ImageFile("bad.jpg", str(tmp_path / "bad.jpg"))
    feed = Feed([entry], np.array([0]), backbone.preprocessing, RECIPE, workers=1)
    assert validate_classes(trainee, feed) == {} and len(feed.failures) == 1
