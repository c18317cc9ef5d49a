import numpy as np
import pytest

from embedkit.evaluation.shots import draw_shots
from embedkit.heads.folding import assign_folds, hold_out


def codes(seed=0, n=60):
    return np.random.default_rng(seed).integers(0, 4, size=n)


def test_held_out_rows_are_a_share_of_every_class():
    strata = np.repeat([0, 1, 2, 3], [50, 2, 1, 3])
    held = hold_out(56, 0.2, 0, strata=strata)
    assert np.bincount(strata[held], minlength=4).tolist() == [10, 1, 0, 1]
    assert not np.array_equal(held, hold_out(56, 0.2, 1, strata=strata))


def test_without_classes_a_share_of_all_rows_is_held_out():
    assert hold_out(100, 0.1, 0).sum() == 10
    assert hold_out(3, 0.1, 0).sum() == 1
    assert hold_out(1, 0.5, 0).sum() == 0


@pytest.mark.parametrize("seed", range(10))
def test_copies_are_on_one_side(seed):
    strata = codes(seed)
    groups = np.random.default_rng(seed + 1).integers(0, 25, size=60)
    for split in (hold_out(60, 0.3, seed, strata=strata, groups=groups), hold_out(60, 0.3, seed, groups=groups),
                  assign_folds(60, 5, seed, strata=strata, groups=groups)):  # fmt: skip
        for group in np.unique(groups):
            assert len(np.unique(split[groups == group])) == 1


@pytest.mark.parametrize("seed", range(10))
def test_a_class_never_leaves_the_fitted_part_with_the_copies_of_another(seed):
    # Every row of class 1 is the copy of a row of class 0.
    strata, groups = np.array([0] * 6 + [1] * 2), np.array([0, 1, 2, 3, 4, 5, 0, 1])
    held = hold_out(8, 0.5, seed, strata=strata, groups=groups)
    assert set(strata[~held]) == {0, 1}


def test_folds_have_equal_sizes_and_their_share_of_every_class():
    strata = codes(n=103)
    folds = assign_folds(103, 5, 0, strata=strata)
    assert sorted(np.bincount(folds).tolist()) == [20, 20, 21, 21, 21]
    for code in range(4):
        counts = np.bincount(folds[strata == code], minlength=5)
        assert counts.max() - counts.min() <= 1


def test_folds_depend_on_the_seed_alone():
    strata = codes()
    np.testing.assert_array_equal(assign_folds(60, 5, 3, strata=strata), assign_folds(60, 5, 3, strata=strata))
    assert not np.array_equal(assign_folds(60, 5, 3, strata=strata), assign_folds(60, 5, 4, strata=strata))


def test_shots_are_big_visions_rows():
    names = np.array(list("abcab" * 6))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        literal = [rng.permutation(np.where(names == name)[0])[:4] for name in "abc"]
        np.testing.assert_array_equal(draw_shots(names, 4, seed), np.sort(np.concatenate(literal)))


def test_fewer_shots_are_among_more_and_small_classes_give_what_they_have():
    names = np.array(["a"] * 9 + ["b"] * 2)
    drawn = [set(draw_shots(names, shots, 7).tolist()) for shots in (1, 2, 5)]
    assert drawn[0] < drawn[1] < drawn[2]
    assert len(drawn[2]) == 7
