"""Targets: what several teachers say, in one geometry."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from embedkit.errors import FinetuneError
from embedkit.finetuning.distillation.targets import build_targets, fit_target_map
from embedkit.finetuning.distillation.teachers import common_ids
from embedkit.spec import EmbeddingSpec
from embedkit.store import Store, StoreWriter


def write_store(path: Path, x: np.ndarray, names: list[str] | None = None, weights: str = "ab") -> Store:
    spec = EmbeddingSpec(backbone="test_resnet", weights_sha256=weights * 32, dim=x.shape[1])
    with StoreWriter(path, spec) as writer:
        writer.append(x, names or [f"{row:04}.jpg" for row in range(len(x))])
        writer.finalise()
    return Store.open(path)


@pytest.fixture
def stretched(tmp_path: Path) -> Store:
    """2,000 embeddings whose four directions have standard deviations of 8, 4, 2 and 1, turned at random."""
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.standard_normal((4, 4)))[0]
    return write_store(tmp_path / "a.h5", random.standard_normal((2000, 4)) * [8, 4, 2, 1] @ turn + 5)


def covariance(store: Store, width: int, whitening: float) -> np.ndarray:
    return np.cov(fit_target_map(store, width, whitening).apply(store.load()).T)


def test_without_whitening_distances_keep_their_ratios(stretched: Store) -> None:
    found = covariance(stretched, 4, 0.0)
    assert np.diag(found) == pytest.approx(np.array([64, 16, 4, 1]) / 21.25, rel=0.1)
    mapped, x = fit_target_map(stretched, 4, 0.0).apply(stretched.load()), stretched.load()
    before, after = (np.linalg.norm(values[1:] - values[0], axis=1) for values in (x, mapped))
    assert after / before == pytest.approx(np.full(1999, after[0] / before[0]), rel=1e-3)


def test_whitening_makes_directions_equally_loud_by_degrees(stretched: Store) -> None:
    assert covariance(stretched, 4, 1.0) == pytest.approx(np.eye(4), abs=0.02)
    half = np.diag(covariance(stretched, 4, 0.5))
    assert half / half[-1] == pytest.approx([8, 4, 2, 1], rel=0.1)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_targets_have_a_mean_variance_of_one_at_any_width(stretched: Store, whitening: float) -> None:
    for width in (1, 2, 4, 100):
        found = np.atleast_2d(covariance(stretched, width, whitening))
        assert len(found) == min(width, 4)
        assert np.diag(found).mean() == pytest.approx(1, abs=0.01)


def test_embeddings_that_are_all_alike_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="alike"):
        fit_target_map(write_store(tmp_path / "a.h5", np.ones((5, 3))), 2, 0.0)


def test_targets_stand_beside_one_another_in_the_order_of_the_ids(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((50, 6)).astype(np.float32)
    names = [f"{row:04}.jpg" for row in range(50)]
    one = write_store(tmp_path / "a.h5", x, names)
    other = write_store(tmp_path / "b.h5", x[3:, :2], names[3:], "cd")  # It could not read the first three.
    ids = common_ids([one, other])
    assert ids.tolist() == [name.encode() for name in names[3:]]
    targets = build_targets([one, other], ids[::-1], tmp_path / "state" / "t.npy", width=4)
    assert targets.widths == (4, 2)
    found = targets.rows(np.array([0, 46]))
    for map_, store, columns in (
        (fit_target_map(one, 4, 0.0), one, slice(0, 4)),
        (fit_target_map(other, 4, 0.0), other, slice(4, 6)),
    ):
        expected = map_.apply(store.rows(ids=[names[49], names[3]]))
        assert found[:, columns] == pytest.approx(expected, abs=5e-3)


def test_targets_are_made_once_and_again_when_they_are_of_something_else(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.h5", np.random.default_rng(2).standard_normal((40, 3)))
    path = tmp_path / "t.npy"
    first = build_targets([store], common_ids([store]), path, width=2)
    made = path.stat().st_mtime_ns
    again = build_targets([store], common_ids([store]), path, width=2)
    assert path.stat().st_mtime_ns == made
    assert np.array_equal(first.values, again.values)
    assert build_targets([store], common_ids([store]), path, width=3).widths == (3,)
    path.write_bytes(path.read_bytes()[:200])  # Half of a file.
    assert build_targets([store], common_ids([store]), path, width=3).values.shape == (40, 3)


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="a file is made durable by another call there")
def test_the_disk_has_the_targets_before_a_note_says_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable: list[int] = []
    fsync = os.fsync

    def noting(handle: int) -> None:
        durable.append(os.fstat(handle).st_ino)
        fsync(handle)

    store = write_store(tmp_path / "a.h5", np.random.default_rng(2).standard_normal((40, 3)))
    path = tmp_path / "state" / "t.npy"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", noting)
        build_targets([store], common_ids([store]), path, width=2)
    folder, file, note = (each.stat().st_ino for each in (path.parent, path, path.with_name("t.npy.json")))
    assert durable[durable.index(file) :] == [file, folder, folder, note, folder]
    assert sorted(each.name for each in path.parent.iterdir()) == ["t.npy", "t.npy.json"]
