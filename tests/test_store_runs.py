"""Runs over real files: what is kept, what is computed again, and what survives."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit import (
    Backbone,
    BackboneError,
    ImageError,
    SpecMismatchError,
    Store,
    StoreBusyError,
    StoreExistsError,
    StoreFormatError,
    extract,
)
from embedkit.errors import FAILURE_KINDS
from embedkit.extraction import Progress
from embedkit.store import Changes, Status, verify


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return Backbone.load(tiny_backbone)


@pytest.fixture
def root(photos: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    return folder


class Run:
    """Extracts, and remembers the last progress."""

    def __init__(self, root: Path, output: Path, backbone: Backbone, **options: object) -> None:
        seen: list[Progress] = []
        self.store = extract(root, output, backbone, batch_size=4, part_size=4, progress=seen.append, **options)  # type: ignore[arg-type]
        self.changes = seen[-1].changes
        self.computed = seen[-1].total - seen[0].kept


def interrupted(root: Path, output: Path, backbone: Backbone, done: int, **options: object) -> None:
    """Extract, and stop once so many images are computed; rows of at least one part are safe then."""

    def interrupt(progress: Progress) -> None:
        if progress.done - progress.kept >= done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(root, output, backbone, batch_size=4, part_size=4, progress=interrupt, **options)  # type: ignore[arg-type]


def spoil(path: Path) -> None:
    """Replace a file's bytes and keep its size and time, so that reading it would be noticed."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_second_run_reads_nothing_and_writes_nothing(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    first = Run(root, tmp_path / "s.h5", backbone)
    for path in root.rglob("*.jpg"):
        spoil(path)
    before = (tmp_path / "s.h5").stat()
    second = Run(root, tmp_path / "s.h5", backbone)
    assert second.changes == Changes(unchanged=24) and second.computed == 0
    assert second.store.content_id == first.store.content_id
    assert (tmp_path / "s.h5").stat().st_ino == before.st_ino
    assert sorted(os.listdir(tmp_path)) == ["photos", "s.h5"]


def test_an_update_equals_a_fresh_extraction_and_a_merge(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    Run(root, tmp_path / "s.h5", backbone)
    shutil.copy(root / "dog" / "1.jpg", root / "cat" / "3.jpg")  # changed
    (root / "cat" / "4.jpg").rename(root / "cat" / "44.jpg")  # moved
    shutil.copy(root / "dog" / "2.jpg", root / "dog" / "22.jpg")  # copied
    os.utime(root / "dog" / "5.jpg", ns=(1, 1))  # touched
    (root / "dog" / "6.jpg").unlink()  # deleted
    shutil.copy(root / "cat" / "7.jpg", root / "cat" / "new.jpg")
    with (root / "cat" / "new.jpg").open("ab") as file:
        file.write(b"\0")  # new: never seen bytes
    updated = Run(root, tmp_path / "s.h5", backbone)
    fresh = Run(root, tmp_path / "fresh.h5", backbone)
    assert updated.store.content_id == fresh.store.content_id and verify(updated.store.path) == []
    assert np.array_equal(updated.store.images.mtimes_ns, fresh.store.images.mtimes_ns)
    # 3.jpg now holds what is known as dog/1.jpg, so it is kept by content like the moved and the copied one.
    assert updated.changes == Changes(unchanged=21, moved=3, new=1, deleted=1) and updated.computed == 1
    parts = []
    for name in ("cat", "dog"):
        shutil.copytree(root / name, tmp_path / name / name)
        for path in (tmp_path / name / name).iterdir():
            shutil.copystat(root / name / path.name, path)
        parts.append(Run(tmp_path / name, tmp_path / f"{name}.h5", backbone).store)
    merged = Store.merge(parts, tmp_path / "merged.h5")
    assert merged.content_id == fresh.store.content_id


def test_changed_images_are_computed_and_embedded_as_they_are_now(
    root: Path, backbone: Backbone, tmp_path: Path
) -> None:
    Run(root, tmp_path / "s.h5", backbone)
    with (root / "cat" / "1.jpg").open("ab") as file:
        file.write(b"x")
    run = Run(root, tmp_path / "s.h5", backbone)
    assert run.changes == Changes(unchanged=23, changed=1) and run.computed == 1
    digest = hashlib.sha256((root / "cat" / "1.jpg").read_bytes()).digest()
    assert run.store.content_sha256[run.store.index_of("cat/1.jpg")].tobytes() == digest


def test_checksum_finds_changes_that_size_and_time_hide(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    Run(root, tmp_path / "s.h5", backbone)
    target, other = root / "cat" / "1.jpg", (root / "dog" / "1.jpg").read_bytes()
    status = target.stat()
    target.write_bytes(other[: status.st_size].ljust(status.st_size, b"\0"))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Run(root, tmp_path / "s.h5", backbone).computed == 0
    run = Run(root, tmp_path / "s.h5", backbone, checksum=True)
    assert run.changes == Changes(unchanged=23, changed=1) and run.computed == 1
    np.testing.assert_allclose(run.store.rows(ids=["cat/1.jpg"])[0], backbone.embed(target), atol=1e-5)


def test_failures_are_remembered_until_a_retry_or_a_change(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    bad = root / "cat" / "bad.jpg"
    bad.write_bytes(b"no image")
    first = Run(root, tmp_path / "s.h5", backbone).store.failures
    assert first[0].id == "cat/bad.jpg" and first[0].kind in FAILURE_KINDS
    kept = Run(root, tmp_path / "s.h5", backbone)
    assert kept.computed == 0 and kept.store.failures == first
    again = Run(root, tmp_path / "s.h5", backbone, retry_failed=True)
    assert again.changes == Changes(unchanged=24, retried=1) and len(again.store.failures) == 1
    shutil.copy(root / "cat" / "1.jpg", bad)
    mended = Run(root, tmp_path / "s.h5", backbone)
    assert mended.store.failures == [] and len(mended.store) == 25


def test_labels_follow_the_folders_without_computing(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    Run(root, tmp_path / "s.h5", backbone)
    (root / "dog").rename(root / "wolf")
    run = Run(root, tmp_path / "s.h5", backbone)
    assert run.store.classes == ["cat", "wolf"] and run.changes == Changes(unchanged=12, moved=12)
    assert run.store.content_id == Run(root, tmp_path / "fresh.h5", backbone).store.content_id


def test_an_interrupted_run_goes_on_and_ends_the_same(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 8)
    assert not (tmp_path / "s.h5").exists()
    status = Store.status(tmp_path / "s.h5")
    assert (status.state, status.planned, status.rows) == ("unfinished", 24, None) and 8 <= status.committed < 24
    for id in ids_in_parts(tmp_path / "s.h5.parts"):
        spoil(root / id)  # Whoever reads these again gets a failure.
    run = Run(root, tmp_path / "s.h5", backbone)
    assert run.changes.resumed == status.committed and run.computed == 24 - status.committed
    assert run.store.failures == [] and len(run.store) == 24


def ids_in_parts(folder: Path) -> list[str]:
    """Return the ids in the parts, read with h5py alone."""
    import h5py

    found: list[str] = []
    for path in folder.glob("part-*.h5"):
        with h5py.File(path) as file:
            found += file["ids"].asstr()[:].tolist()
    return found


def test_a_run_that_finds_other_images_than_planned_keeps_what_is_computed(
    root: Path, backbone: Backbone, tmp_path: Path
) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 12)
    (root / "cat" / "1.jpg").unlink()
    with (root / "dog" / "9.jpg").open("ab") as file:
        file.write(b"x")
    with (root / "cat" / "2.jpg").open("ab") as file:
        file.write(b"x")
    run = Run(root, tmp_path / "s.h5", backbone)
    assert run.changes == Changes(resumed=10, changed=1, new=12)  # cat/2.jpg was computed, dog/9.jpg was not
    assert run.store.content_id == Run(root, tmp_path / "fresh.h5", backbone).store.content_id


def test_damaged_parts_are_set_aside_and_computed_again(
    root: Path, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Run(root, tmp_path / "whole.h5", backbone)

    interrupted(root, tmp_path / "s.h5", backbone, 12)
    part = min((tmp_path / "s.h5.parts").glob("part-*"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    run = Run(root, tmp_path / "s.h5", backbone)
    assert "is set aside" in caplog.text and part.name in caplog.text
    assert run.store.content_id == whole.store.content_id


@pytest.mark.parametrize("lost", ["run.json", "ids-"])
def test_parts_survive_the_loss_of_the_plan(root: Path, backbone: Backbone, tmp_path: Path, lost: str) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 12)
    for path in (tmp_path / "s.h5.parts").glob(f"{lost}*"):
        path.write_bytes(b"garbage")
    run = Run(root, tmp_path / "s.h5", backbone)
    assert run.changes == Changes(resumed=12, new=12)
    assert run.store.content_id == Run(root, tmp_path / "fresh.h5", backbone).store.content_id


def test_repair_computes_the_damaged_rows_only(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    good = Run(root, tmp_path / "s.h5", backbone).store
    content_id, offset = good.content_id, good.matrices[""].offset
    data = bytearray((tmp_path / "s.h5").read_bytes())
    data[offset + 100] ^= 4
    (tmp_path / "s.h5").write_bytes(data)
    problems = verify(tmp_path / "s.h5")
    assert [(problem.where, problem.rows) for problem in problems] == [("embeddings", (0, 24))]
    (root / "cat" / "new.jpg").write_bytes((root / "cat" / "1.jpg").read_bytes() + b"x")
    with pytest.raises(StoreFormatError, match=r"embeddings rows 0:24.*--repair"):
        Run(root, tmp_path / "s.h5", backbone)
    (root / "cat" / "new.jpg").unlink()
    repaired = Run(root, tmp_path / "s.h5", backbone, repair=True)
    assert repaired.changes.repaired == 24 and repaired.store.content_id == content_id
    assert verify(tmp_path / "s.h5") == []


def test_another_backbone_is_refused_by_name_and_leaves_the_store(
    root: Path, backbone: Backbone, tiny_backbone: Path, tmp_path: Path
) -> None:
    first = Run(root, tmp_path / "s.h5", backbone).store
    other = Backbone.load(tiny_backbone, pool="max")
    with pytest.raises(SpecMismatchError, match=r"--overwrite.*\n  pool: 'default' != 'max'") as caught:
        extract(root, tmp_path / "s.h5", other)
    assert caught.value.differences == {"pool": ("default", "max")}
    assert Store.open(tmp_path / "s.h5").run_id == first.run_id
    with pytest.raises(SpecMismatchError, match="layers"):
        extract(root, tmp_path / "s.h5", backbone, layers=["avg"])


def test_another_backbone_does_not_finish_an_unfinished_run(
    root: Path, backbone: Backbone, tiny_backbone: Path, tmp_path: Path
) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 4)
    other = Backbone.load(tiny_backbone, pool="max")
    with pytest.raises(SpecMismatchError, match="unfinished run"):
        extract(root, tmp_path / "s.h5", other)
    assert Run(root, tmp_path / "s.h5", other, overwrite=True).changes == Changes(new=24)


def test_another_folder_is_refused(root: Path, photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    Run(root, tmp_path / "s.h5", backbone)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "x.jpg").write_bytes((photos / "cat" / "1.jpg").read_bytes() + b"x")
    with pytest.raises(StoreExistsError, match=r"24 images of .*photos, and none of them.*--overwrite"):
        extract(stranger, tmp_path / "s.h5", backbone)
    assert len(Store.open(tmp_path / "s.h5")) == 24


def test_a_second_writer_is_told_who_the_first_is(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom embedkit.store.locking import Lock\n"
        "with Lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s.h5.parts")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            with pytest.raises(StoreBusyError, match=f"process {process.pid} on ") as caught:
                extract(root, tmp_path / "s.h5", backbone)
            assert caught.value.pid == process.pid
            status = Store.status(tmp_path / "s.h5")
            assert (status.state, status.pid) == ("busy", process.pid)
        finally:
            process.kill()
    assert not (tmp_path / "s.h5").exists()
    assert len(extract(root, tmp_path / "s.h5", backbone)) == 24  # A killed holder holds nothing.


def test_a_published_run_that_was_not_tidied_up_is_tidied_up(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    saved = tmp_path / "saved"

    def save(progress: Progress) -> None:
        if progress.committed == progress.total:
            shutil.copytree(tmp_path / "s.h5.parts", saved)

    extract(root, tmp_path / "s.h5", backbone, batch_size=4, progress=save)
    saved.rename(tmp_path / "s.h5.parts")
    note = json.loads((tmp_path / "s.h5.parts" / "run.json").read_bytes())
    assert note["run_id"] == Store.open(tmp_path / "s.h5").run_id
    assert Run(root, tmp_path / "s.h5", backbone).changes == Changes(unchanged=24)
    assert not (tmp_path / "s.h5.parts").exists()


def test_layers_come_from_the_same_pass_and_are_stores_of_their_own(
    root: Path, backbone: Backbone, tiny_backbone: Path, tmp_path: Path
) -> None:
    run = Run(root, tmp_path / "s.h5", backbone, layers=["max", "layer2:avg"])
    plain = Run(root, tmp_path / "plain.h5", backbone).store
    assert np.array_equal(run.store.embeddings, plain.embeddings) and run.store.spec == plain.spec
    assert run.store.content_id != plain.content_id and list(run.store.layers) == ["layer2:avg", "max"]
    for name in run.store.layers:
        layer = Store.open(tmp_path / "s.h5", layer=name)
        alone = Backbone.load(tiny_backbone, pool=name)
        assert layer.spec == alone.spec and layer.ids == plain.ids
        expected = extract(root, tmp_path / f"{name}.h5", alone)
        assert np.array_equal(layer.load(), expected.load()) and layer.digest == expected.digest
        assert Backbone.reload(layer.spec, layer.recipe).spec == layer.spec
    with pytest.raises(StoreFormatError, match="no layer 'min'; it has layer2:avg, max"):
        Store.open(tmp_path / "s.h5", layer="min")
    (root / "cat" / "1.jpg").unlink()
    assert verify(Run(root, tmp_path / "s.h5", backbone, layers=["layer2:avg", "max"]).store.path) == []


def test_one_image_alone_has_the_same_bits_as_among_others(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    store = Run(root, tmp_path / "s.h5", backbone).store
    for row in (0, 7, 23):
        assert np.array_equal(backbone.embed(root / store.ids[row]), store.embeddings[row])


def test_every_token_is_kept_without_pooling(root: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_backbone, pool="none")
    store = extract(root, tmp_path / "s.h5", backbone, layers=["avg", "layer2:none", "-1"])
    average = Store.open(store.path, layer="avg")
    assert store.tokens.shape == (24, 4, average.dim) and store.dim == 4 * average.dim
    np.testing.assert_allclose(store.tokens.mean(1), average.load(), atol=1e-5)
    assert average.tokens.shape == (24, 1, average.dim) and average.spec.tokens == 0
    assert list(store.layers) == ["avg", "layer2:none", "layer4:avg"]
    assert Store.open(store.path, layer="layer2:none").tokens.shape[:2] == (24, 64)
    with pytest.raises(BackboneError, match="has 5 feature levels, and none is number 9"):
        extract(root, tmp_path / "t.h5", backbone, layers=["9"])


def test_a_moved_folder_and_moved_weights_are_followed(
    root: Path, backbone: Backbone, tiny_backbone: Path, tmp_path: Path
) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 12)
    note = json.loads((tmp_path / "s.h5.parts" / "run.json").read_bytes())
    moved = root.rename(tmp_path / "pictures")
    resumed = Run(moved, tmp_path / "s.h5", backbone)
    assert resumed.changes.resumed >= 8 and resumed.store.root == moved
    assert (resumed.store.run_id, resumed.store.information["created"]) == (note["run_id"], note["created"])
    moved = moved.rename(tmp_path / "pictures, again")
    updated = Run(moved, tmp_path / "s.h5", backbone)
    assert updated.changes == Changes(unchanged=24) and updated.computed == 0
    assert updated.store.root == moved and updated.store.content_id == resumed.store.content_id
    shutil.copytree(tiny_backbone.parent, tmp_path / "weights")
    elsewhere = Backbone.load(tmp_path / "weights" / tiny_backbone.name)
    assert Run(moved, tmp_path / "s.h5", elsewhere).store.recipe == elsewhere.recipe != updated.store.recipe


def test_checksum_compares_what_an_unfinished_run_computed_too(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 12)
    ids = ids_in_parts(tmp_path / "s.h5.parts")
    target, other = root / ids[0], (root / "dog" / "9.jpg").read_bytes()
    status = target.stat()
    target.write_bytes(other[: status.st_size].ljust(status.st_size, b"\0"))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    run = Run(root, tmp_path / "s.h5", backbone, checksum=True)
    assert run.changes == Changes(resumed=len(ids) - 1, changed=1, new=24 - len(ids))
    assert run.store.content_id == Run(root, tmp_path / "fresh.h5", backbone).store.content_id


def stranger(photos: Path, folder: Path) -> Path:
    """Make a folder of one picture that is in no other."""
    folder.mkdir()
    (folder / "x.jpg").write_bytes((photos / "cat" / "1.jpg").read_bytes() + b"x")
    return folder


def test_another_folder_does_not_throw_an_unfinished_run_away(
    root: Path, photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 12)
    parts = sorted((tmp_path / "s.h5.parts").glob("part-*"))
    other = stranger(photos, tmp_path / "stranger")
    with pytest.raises(
        StoreExistsError, match=r"s\.h5\.parts holds \d+ rows of .*photos, and none.*remove that folder"
    ):
        extract(other, tmp_path / "s.h5", backbone)
    (other / "cat").mkdir()
    (other / "x.jpg").unlink()
    (other / "cat" / "1.jpg").write_bytes(b"no image")  # Known by its id, and so no stranger.
    with pytest.raises(ImageError, match="none of its 1 image could be read"):
        extract(other, tmp_path / "s.h5", backbone)
    assert sorted((tmp_path / "s.h5.parts").glob("part-*")) == parts
    run = Run(root, tmp_path / "s.h5", backbone)
    assert run.changes.resumed >= 8 and run.store.failures == []
    assert run.store.content_id == Run(root, tmp_path / "fresh.h5", backbone).store.content_id


def test_new_images_that_are_gone_again_do_not_stop_an_update(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    Run(root, tmp_path / "s.h5", backbone)
    new = [root / "cat" / f"new {number}.jpg" for number in range(8)]
    for number, path in enumerate(new):
        path.write_bytes((root / "cat" / "1.jpg").read_bytes() + bytes([number]))
    interrupted(root, tmp_path / "s.h5", backbone, 8)
    assert ids_in_parts(tmp_path / "s.h5.parts")
    for path in new:
        path.unlink()
    assert Run(root, tmp_path / "s.h5", backbone).changes == Changes(unchanged=24)
    assert not (tmp_path / "s.h5.parts").exists()


def test_an_update_in_which_every_image_changed_can_be_resumed(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    for path in list(root.rglob("*.jpg"))[1:]:
        path.unlink()
    Run(root, tmp_path / "s.h5", backbone)
    with next(root.rglob("*.jpg")).open("ab") as file:
        file.write(b"x")

    def interrupt(progress: Progress) -> None:
        if progress.committed == progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(root, tmp_path / "s.h5", backbone, progress=interrupt)
    assert Run(root, tmp_path / "s.h5", backbone).changes == Changes(resumed=1)


def test_an_unfinished_run_can_be_dropped_and_the_store_kept(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    Run(root, tmp_path / "s.h5", backbone)
    interrupted(root, tmp_path / "s.h5", backbone, 8, layers=("avg",), overwrite=True)
    with pytest.raises(
        SpecMismatchError, match=r"remove that folder, which drops the unfinished run and keeps .*s\.h5"
    ):
        extract(root, tmp_path / "s.h5", backbone)
    shutil.rmtree(tmp_path / "s.h5.parts")
    assert Run(root, tmp_path / "s.h5", backbone).changes == Changes(unchanged=24)


def byte_of_label(store: Store) -> int:
    return store._datasets["labels"].offset + 2  # Now the code names no class.


def byte_of_checksums(store: Store) -> int:
    return store._datasets["checksums/embeddings"].offset


def byte_of_gap(store: Store) -> int:
    return store._datasets["label_names"].offset + store._datasets["label_names"].nbytes


def byte_of_kind(store: Store) -> int:
    return store._datasets["failures/kinds"].offset


@pytest.mark.parametrize(
    ("byte_of", "computed"), [(byte_of_label, 0), (byte_of_checksums, 24), (byte_of_gap, 0), (byte_of_kind, 1)]
)
def test_repair_mends_what_is_no_embedding(
    root: Path, backbone: Backbone, tmp_path: Path, byte_of: Callable[[Store], int], computed: int
) -> None:
    (root / "cat" / "bad.jpg").touch()
    good = Run(root, tmp_path / "s.h5", backbone).store
    assert len(good.failures) == 1
    data = bytearray((tmp_path / "s.h5").read_bytes())
    data[byte_of(good)] ^= 0x40
    (tmp_path / "s.h5").write_bytes(data)
    assert verify(tmp_path / "s.h5")
    repaired = Run(root, tmp_path / "s.h5", backbone, repair=True)
    assert repaired.computed == computed and repaired.store.content_id == good.content_id
    assert verify(tmp_path / "s.h5") == [] and repaired.store.failures == good.failures


def test_what_is_not_ours_in_the_folder_of_parts_stays(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 8)
    foreign = tmp_path / "s.h5.parts" / "@eaDir"
    foreign.mkdir()
    (foreign / "part-000001.jpg").touch()
    (foreign.parent / ".DS_Store").touch()
    assert len(Run(root, tmp_path / "s.h5", backbone).store) == 24
    assert sorted(os.listdir(foreign.parent)) == [".DS_Store", "@eaDir", "lock"]
    assert Store.status(tmp_path / "s.h5") == Status("finished", 24)
    assert Run(root, tmp_path / "s.h5", backbone).changes == Changes(unchanged=24)


def test_overwrite_counts_after_a_kill_between_publishing_and_tidying_up(
    root: Path, photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 8)
    shutil.copytree(tmp_path / "s.h5.parts", tmp_path / "saved")
    Run(root, tmp_path / "s.h5", backbone)
    (tmp_path / "saved").rename(tmp_path / "s.h5.parts")
    assert Store.status(tmp_path / "s.h5") == Status("finished", 24)
    other = stranger(photos, tmp_path / "stranger")
    assert Run(other, tmp_path / "s.h5", backbone, overwrite=True).store.ids == ["x.jpg"]


def test_status_counts_what_is_done_and_what_is_left(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 16)
    (root / "cat" / "new.jpg").write_bytes((root / "cat" / "1.jpg").read_bytes() + b"x")
    interrupted(root, tmp_path / "s.h5", backbone, 4)  # It made another plan, for fewer images.
    status = Store.status(tmp_path / "s.h5")
    assert status.committed >= 12 and status.planned == 25 and status.state == "unfinished"
    (tmp_path / "s.h5.parts" / "run.json").write_bytes(b"\xff\0")
    lost = Store.status(tmp_path / "s.h5")
    assert (lost.state, lost.committed, lost.planned) == ("unfinished", status.committed, status.committed)
    with pytest.raises(StoreFormatError, match="is a folder, and a store is one file"):
        Store.status(root)


@pytest.mark.parametrize(
    "values",
    [
        {"information": None}, {"layers": []}, {"identity": "x"}, {"run_id": 7}, {"plan": []},
        {"plan": {"part_size": 0}}, {"plan": {"part_size": "4"}}, {"plan": {"batch_size": 0}}, {"plan": {"first": -5}},
        {"plan": {"first": True}}, {"plan": {"count": None}}, {"plan": {"ids": 3}}, {"plan": {"ids_sha256": None}},
    ],
)  # fmt: skip
def test_a_note_of_other_types_is_made_again(
    root: Path, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture, values: dict[str, Any]
) -> None:
    interrupted(root, tmp_path / "s.h5", backbone, 8)
    path = tmp_path / "s.h5.parts" / "run.json"
    note = json.loads(path.read_bytes())
    plan = values.get("plan")
    path.write_text(json.dumps(note | values | ({"plan": note["plan"] | plan} if isinstance(plan, dict) else {})))
    committed = Store.status(tmp_path / "s.h5").committed
    caplog.clear()
    assert Run(root, tmp_path / "s.h5", backbone).changes == Changes(resumed=committed, new=24 - committed)
    assert "run.json cannot be read and is made again" in caplog.text
