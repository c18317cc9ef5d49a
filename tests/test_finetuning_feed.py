"""Training batches: which images come when, and with which pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedkit import Preprocessing
from embedkit.errors import FinetuneError
from embedkit.finetuning.feeding.augmentation import PRESETS, Augmentation
from embedkit.finetuning.feeding.feed import Feed, TrainBatch
from embedkit.finetuning.feeding.ordering import count_steps, epoch_order, in_steps, shard_of
from embedkit.finetuning.recipe import Recipe
from embedkit.images import DECODERS, Region, read_crop
from embedkit.sources import Entry, ImageFile, list_images

PIXELS = Preprocessing(img_size=(32, 32), interpolation="bilinear", decoder=DECODERS["standard"])


@pytest.fixture(scope="module")
def files(photos: Path) -> list[Entry]:
    return list(list_images(photos).files)


def codes_of(files: Sequence[Entry]) -> Any:
    return np.array([int(file.label == "dog") for file in files])


def feed_of(files: Sequence[Entry], augmentation: Augmentation | None = None, **settings: Any) -> Feed:
    recipe = {name: settings.pop(name) for name in ("batch_size", "seed", "balance") if name in settings}
    settings = {"codes": codes_of(files), "workers": 2} | settings
    recipe = Recipe(**{"batch_size": 7, "augmentation": augmentation or Augmentation()} | recipe)
    return Feed(files, preprocessing=PIXELS, recipe=recipe, **settings)


def together(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of some batches in order, and their pixels."""
    batches = list(batches)
    return torch.cat([batch.rows for batch in batches]), torch.cat([batch.pixels for batch in batches])


def test_an_epoch_brings_every_image_once_in_even_batches(files: list[Entry]) -> None:
    feed = feed_of(files)
    batches = list(feed.epoch(1))
    assert len(batches) == feed.steps == 4
    assert sorted(len(batch) for batch in batches) == [6, 6, 6, 6]
    assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(24))
    for batch in batches:
        assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (6, 3, 32, 32)
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last) and batch.targets is None
        assert batch.codes.tolist() == codes_of(files)[batch.rows.numpy()].tolist()


def test_without_augmentation_the_crops_are_those_of_the_extraction(files: list[Entry]) -> None:
    feed = feed_of(files)
    plain = [read_crop(file.read(), PIXELS) for file in files]
    rows, pixels = together(feed.epoch(3))
    assert all(np.array_equal(pixels[at].permute(1, 2, 0), plain[row]) for at, row in enumerate(rows.tolist()))
    rows, pixels = together(feed.validation())
    assert rows.tolist() == list(range(24))
    assert np.array_equal(pixels.permute(0, 2, 3, 1), plain)


@pytest.mark.parametrize("preset", ["medium", "heavy"])
def test_the_same_seed_and_epoch_bring_the_same_pixels_whatever_decodes_them(files: list[Entry], preset: str) -> None:
    def batches(epoch: int, **settings: Any) -> list[TrainBatch]:
        return list(feed_of(files, PRESETS[preset], **settings).epoch(epoch))

    for one, other in zip(batches(2, workers=1), batches(2, workers=3), strict=True):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.rows, other.rows)
        assert (one.targets is None and other.targets is None) or torch.equal(one.targets, other.targets)  # type: ignore[arg-type]
    first, second, seeded = (together(batches(*which)) for which in ((1,), (2,), (1,)))
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], seeded[1])
    assert not torch.equal(first[0], together(batches(1, seed=1))[0])


def test_an_images_variant_depends_on_no_other_image(files: list[Entry]) -> None:
    rows, pixels = together(feed_of(files, PRESETS["medium"]).epoch(1))
    few_rows, few = together(feed_of(files[:10], PRESETS["medium"], batch_size=3).epoch(1))
    whole = dict(zip(rows.tolist(), pixels, strict=True))
    assert all(torch.equal(whole[row], one) for row, one in zip(few_rows.tolist(), few, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_steps_of_one(files: list[Entry], world: int) -> None:
    files = files[:23]
    alone = [batch.rows for batch in feed_of(files, PRESETS["light"], batch_size=3 * world).epoch(1)]
    feeds = [feed_of(files, PRESETS["light"], batch_size=3, rank=rank, world=world) for rank in range(world)]
    epochs = [list(feed.epoch(1)) for feed in feeds]
    assert {len(epoch) for epoch in epochs} == {feeds[0].steps} == {len(alone)}
    for step, rows in enumerate(alone):
        assert torch.equal(rows, torch.cat([epoch[step].rows for epoch in epochs]))
        assert all(1 <= len(epoch[step]) <= 3 for epoch in epochs)
    rows = torch.cat([together(feed.validation())[0] for feed in feeds])
    assert rows.tolist() == list(range(23))


def test_what_cannot_be_read_is_named_and_nothing_takes_its_place(files: list[Entry], tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(files[0].read()[:700])
    bad = [ImageFile("b/cut.jpg", str(tmp_path / "cut.jpg")), ImageFile("a/gone.jpg", str(tmp_path / "gone.jpg"))]
    feed = feed_of([*files[:4], *bad], PRESETS["light"], codes=np.zeros(6, dtype=np.int64), batch_size=2)
    for epoch in (1, 2):
        batches = list(feed.epoch(epoch))
        assert len(batches) == 3 and sorted(together(batches)[0].tolist()) == [0, 1, 2, 3]
    assert [failure.id for failure in feed.failures] == ["a/gone.jpg", "b/cut.jpg"]
    assert [failure.kind for failure in feed.failures] == ["missing", "truncated"]
    nothing = list(feed_of(bad, Augmentation(mixup=1.0), codes=np.zeros(2, dtype=np.int64)).epoch(1))
    assert [batch.pixels.shape for batch in nothing] == [(0, 3, 32, 32)] and len(nothing[0]) == 0


def test_balance_brings_classes_alike_and_varies_an_image_each_time_it_comes(files: list[Entry]) -> None:
    few = [*files[:10], files[-1], files[-2]]
    feed = feed_of(few, Augmentation(rotation=20.0), balance=True, batch_size=4)
    rows, pixels = together(feed.epoch(1))
    assert np.bincount(codes_of(few)[rows.numpy()]).tolist() == [6, 6]
    rare = [pixels[at].numpy().tobytes() for at, row in enumerate(rows.tolist()) if row == 10]
    assert len(rare) == 3 == len(set(rare))


def test_an_order_is_a_permutation_and_a_balanced_one_is_fair() -> None:
    codes = np.repeat([0, 3, 7], [50, 9, 1])
    assert sorted(epoch_order(codes, np.random.default_rng(0)).tolist()) == list(range(60))
    order = epoch_order(codes, np.random.default_rng(0), balance=True)
    assert np.bincount(codes[order]).tolist() == [20, 0, 0, 20, 0, 0, 0, 20]
    counts = np.bincount(order, minlength=60)
    assert set(counts[:50]) == {0, 1} and set(counts[50:59]) == {2, 3} and counts[59] == 20
    assert not np.array_equal(order, np.sort(order))


@pytest.mark.parametrize(("count", "batch_size", "world"), [(100, 32, 1), (33, 32, 1), (5, 8, 2), (97, 4, 3)])
def test_steps_differ_by_one_image_at_most(count: int, batch_size: int, world: int) -> None:
    steps = list(in_steps(np.arange(count), batch_size, world))
    sizes = [len(step) for step in steps]
    assert len(steps) == count_steps(count, batch_size, world) and max(sizes) - min(sizes) <= 1
    assert np.array_equal(np.concatenate(steps), np.arange(count)) and max(sizes) <= batch_size * world
    for step in steps:
        shards = [shard_of(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(shards), step) and max(map(len, shards)) <= batch_size


def test_mixed_batches_have_targets_until_the_epoch_that_ends_it(files: list[Entry]) -> None:
    feed = feed_of(files, Augmentation(mixup=1.0, cutmix=1.0, mixup_off_epoch=3), classes=4)
    for epoch in (1, 2):
        for batch in feed.epoch(epoch):
            assert batch.targets is not None and batch.targets.shape == (6, 4)
            torch.testing.assert_close(batch.targets.sum(1), torch.ones(6))
    assert all(batch.targets is None for batch in feed.epoch(3))
    assert all(batch.targets is None for batch in feed.validation())


def test_targets_boxes_and_batches_can_be_given(files: list[Entry]) -> None:
    def targets(rows: Any, epoch: int) -> Any:
        return np.stack([rows, rows * epoch], axis=1).astype(np.float32)

    chosen = [np.array([5, 1, 5]), np.array([9, 2])]
    feed = feed_of(
        files, Augmentation(mixup=1.0), codes=None, targets=targets, batches=lambda epoch: chosen,
        boxes=lambda row, epoch: (0, 0, 48, 36) if row == 1 else None,
    )  # fmt: skip
    one, two = feed.epoch(2)
    assert feed.steps == 2 and one.rows.tolist() == [5, 1, 5] and two.rows.tolist() == [9, 2]
    assert one.codes.tolist() == [-1, -1, -1]
    assert one.targets is not None and one.targets.tolist() == [[5, 10], [1, 2], [5, 10]]
    assert np.array_equal(one.pixels[1].permute(1, 2, 0), read_crop(Region(files[1].read(), (0, 0, 48, 36)), PIXELS))


def test_a_feed_that_cannot_work_says_why(files: list[Entry]) -> None:
    with pytest.raises(FinetuneError, match="no images"):
        feed_of([], codes=None)
    with pytest.raises(FinetuneError, match="24 images cannot have 3 classes"):
        feed_of(files, codes=np.zeros(3, dtype=np.int64))
    with pytest.raises(FinetuneError, match="no process 2 among 2"):
        feed_of(files, rank=2, world=2)
    with pytest.raises(FinetuneError, match="timm does not understand"):
        feed_of(files, Augmentation(aa="rand-q7"))


def test_whoever_stops_in_the_middle_leaves_no_threads_behind(files: list[Entry]) -> None:
    import threading

    before = set(threading.enumerate())
    epoch = feed_of(files, batch_size=2).epoch(1)
    next(epoch)
    assert len(set(threading.enumerate()) - before) > 0
    epoch.close()
    assert set(threading.enumerate()) <= before
