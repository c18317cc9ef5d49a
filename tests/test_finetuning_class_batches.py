"""Steps of an epoch whose images are compared with one another: which meet, and who gets which."""

from __future__ import annotations

import numpy as np
import pytest

from embedkit.finetuning.feeding.ordering import Rows, class_batches, shard_of


def test_class_batches_hold_groups_of_a_class_and_every_row_once() -> None:
    codes = np.random.default_rng(0).integers(0, 10, 400)
    batches = class_batches(codes, 32, images_a_class=4, seed=3, epoch=2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(400))
    counts = np.bincount(codes[batches[0]], minlength=10)
    assert len(batches[0]) == 32
    assert set(counts.tolist()) <= {0, 4, 8}
    assert all(len(np.unique(codes[rows])) >= 2 for rows in batches[:-1])


def test_class_batches_are_drawn_by_seed_and_epoch_alone() -> None:
    codes = np.repeat(np.arange(5), 20)
    draw = {
        key: np.concatenate(class_batches(codes, 20, seed=key[0], epoch=key[1])) for key in [(0, 1), (0, 2), (1, 1)]
    }
    assert np.array_equal(draw[0, 1], np.concatenate(class_batches(codes, 20, seed=0, epoch=1)))
    assert not np.array_equal(draw[0, 1], draw[0, 2])
    assert not np.array_equal(draw[0, 1], draw[1, 1])


def parts_of(rows: Rows, most: int) -> list[Rows]:
    return np.array_split(rows, -(-len(rows) // most))


def uneven(seed: int) -> Rows:
    """Return codes of some classes, of which a few are frequent and most are rare."""
    random = np.random.default_rng(seed)
    counts = np.maximum(2, random.integers(20, 300) / np.arange(1, random.integers(3, 12)) ** 2).astype(int)
    codes: Rows = random.permutation(np.repeat(np.arange(len(counts)), counts))
    return codes


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [8, 12, 32])
def test_every_share_of_every_step_has_two_classes_and_two_images_of_one(
    batch_size: int, processes: int, balance: bool
) -> None:
    for seed in range(6):
        codes = uneven(seed)
        steps = class_batches(codes, batch_size, balance=balance, processes=processes, seed=seed)
        assert len(steps) == len(class_batches(codes, batch_size, balance=balance, processes=processes, epoch=2))
        for rows in steps:
            for rank in range(processes):
                share = codes[shard_of(rows, rank, processes)]
                assert len(share) <= batch_size and len(np.unique(share)) >= 2 and np.bincount(share).max() >= 2


@pytest.mark.parametrize("batch_size", [8, 16, 32])
def test_parts_of_a_step_have_several_classes_too(batch_size: int) -> None:
    codes = np.repeat(np.arange(5), [40, 30, 40, 25, 37])
    for rows in class_batches(codes, batch_size, seed=1):
        for most in (4, 8, 16):
            for part in parts_of(rows, most):
                assert len(np.unique(codes[part])) >= 2 or len(part) < 4


def test_a_rare_class_is_in_every_step_of_a_frequent_one() -> None:
    codes = np.repeat([0, 1], [200, 20])
    steps = class_batches(codes, 32)
    assert set(np.concatenate(steps).tolist()) == set(range(220))
    assert [np.bincount(codes[rows]).tolist() for rows in steps] == [[28, 4]] * 2 + [[24, 4]] * 6
    assert all(len(set(rows.tolist())) == len(rows) for rows in steps)
    balanced = class_batches(codes, 32, balance=True)
    assert [np.bincount(codes[rows]).tolist() for rows in balanced] == [[16, 16]] * 7


def test_a_class_is_spread_over_the_epoch_and_has_other_company_in_the_next() -> None:
    codes = np.repeat(np.arange(20), 24)
    steps = [class_batches(codes, 32, seed=3, epoch=epoch) for epoch in (1, 2)]
    for batches in steps:
        together = np.array([np.bincount(codes[rows], minlength=20) for rows in batches])
        assert together.shape == (15, 20) and together.max() == 4 and (together.sum(1) == 32).all()
    met = [{tuple(sorted(set(codes[rows].tolist()))) for rows in batches} for batches in steps]
    assert len(met[0]) == 15 and met[0].isdisjoint(met[1])


def test_one_class_and_no_row_are_dealt_out_too() -> None:
    assert sorted(np.concatenate(class_batches(np.zeros(30, dtype=np.int64), 8)).tolist()) == list(range(30))
    assert class_batches(np.empty(0, dtype=np.int64), 8) == []
