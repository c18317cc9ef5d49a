"""The writer and its lock: whatever goes wrong, no row is shifted and nothing stays locked."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit import EmbeddingSpec, Store, StoreBusyError
from embedkit.store import StoreWriter, verify
from embedkit.store.locking import Lock, holder

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sizes": [1, 2, 3]}, "sizes has 3 values for 2 rows"),
        ({"mtimes_ns": []}, "mtimes_ns has 0 values"),
        ({"labels": ["x", "y", "z"]}, "labels has 3"),
        ({"content_sha256": [bytes(32)]}, "content_sha256 has 1"),
        ({"content_sha256": [bytes(31)] * 2}, "not 32 bytes"),
    ],
)
def test_columns_of_another_length_are_refused_and_nothing_of_them_stays(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with StoreWriter(tmp_path / "s.h5", SPEC) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(np.eye(2), ["a", "b"], **columns)
        writer.append([[5, 6]], ["c"], sizes=[9], labels=["q"])
        writer.finalise()
    store = Store.open(tmp_path / "s.h5")
    assert (store.ids, store.images.sizes.tolist(), store.classes) == (["c"], [9], ["q"])
    assert store.rows([0]).tolist() == [[5, 6]]


def test_columns_may_be_arrays(tmp_path: Path) -> None:
    hashes = np.arange(64, dtype=np.uint8).reshape(2, 32)
    with StoreWriter(tmp_path / "s.h5", SPEC) as writer:
        writer.append(
            np.eye(2), np.array(["b", "a"]).tolist(), sizes=np.array([1, 0]), mtimes_ns=np.array([3, 4]),
            content_sha256=hashes, labels=np.array(["x", "y"]),
        )  # fmt: skip
        writer.finalise()
    store = Store.open(tmp_path / "s.h5")
    assert (store.images.sizes.tolist(), store.images.mtimes_ns.tolist()) == ([0, 1], [4, 3])
    assert np.array_equal(store.content_sha256, hashes[::-1]) and store.classes == ["x", "y"]


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e300])
def test_rows_that_are_not_finite_are_refused(tmp_path: Path, number: float) -> None:
    with StoreWriter(tmp_path / "s.h5", SPEC) as writer:
        with pytest.raises(ValueError, match="'b' has numbers that are not finite"):
            writer.append(np.array([[1, 2], [3, number]]), ["a", "b"])
        writer.append(np.eye(2), ["a", "b"])
        writer.finalise()
    assert np.array_equal(Store.open(tmp_path / "s.h5").load(), np.eye(2))


@pytest.mark.parametrize("id", ["", "/a", "../a", "a/..", "a\0"])
def test_ids_that_lead_out_of_the_folder_are_refused(tmp_path: Path, id: str) -> None:
    with StoreWriter(tmp_path / "s.h5", SPEC) as writer:
        with pytest.raises(ValueError, match="cannot be the id of an image; expected a relative path"):
            writer.append(np.eye(2), ["a..b", id])
        with pytest.raises(ValueError, match="cannot be the id of an image"):
            writer.fail(id, "truncated")


@pytest.mark.parametrize("failed", [["a"], ["z", "y", "z"]])
def test_an_image_has_one_row_or_one_failure(tmp_path: Path, failed: list[str]) -> None:
    with StoreWriter(tmp_path / "s.h5", SPEC) as writer:
        writer.append(np.eye(2), ["b", "a"])
        for id in failed:
            writer.fail(id, "truncated")
        with pytest.raises(ValueError, match=f"'{failed[0]}' failed and has a row, or failed twice"):
            writer.finalise()
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_in_the_middle_of_a_block_shifts_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    calls = 0

    def full(handle: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(handle, data[:12])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with StoreWriter(tmp_path / "s.h5", SPEC) as writer:
        writer.append([[1, 1], [2, 2]], ["a", "b"])
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, "write", full)
            writer.append([[3, 3], [4, 4]], ["c", "d"])
        writer.append([[5, 5], [6, 6]], ["e", "f"])
        writer.finalise()
    store = Store.open(tmp_path / "s.h5")
    assert store.ids == ["a", "b", "e", "f"] and store.load()[:, 0].tolist() == [1, 2, 5, 6]
    assert verify(store.path) == []


def no_space(real: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a call of the system that fails for files of some name."""

    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        if name in os.path.basename(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return real(path, *arguments, **options)

    return call


def test_a_writer_that_cannot_begin_holds_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path / "s.h5", SPEC)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "open", no_space(os.open, ".tmp-"))
        writer.__enter__()
    assert os.listdir(tmp_path) == []
    with StoreWriter(tmp_path / "s.h5", SPEC) as second:
        second.append(np.eye(2), ["a", "b"])
        second.finalise()


def test_a_lock_that_cannot_tidy_up_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "s.h5.parts"
    folder.mkdir()
    (folder / ".tmp-killed").touch()
    for name in (".tmp-", "lock"):  # What a killed holder left, and what the lock itself leaves.
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, "unlink", no_space(os.unlink, name))
            with Lock(folder):
                pass
        assert holder(folder) is None
    with Lock(folder):
        assert holder(folder) is not None
        with pytest.raises(StoreBusyError), Lock(folder):
            pass
    assert not folder.exists()


def test_a_lock_leaves_alone_what_is_not_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "s.h5.parts"
    (folder / "@eaDir").mkdir(parents=True)
    (folder / ".tmp-folder").mkdir()
    (folder / ".tmp-killed").touch()
    with Lock(folder):
        assert sorted(os.listdir(folder)) == [".tmp-folder", "@eaDir", "lock"]
    assert (folder / "@eaDir").is_dir() and holder(folder) is None
