from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from embedkit import Backbone, ImageError, Store, extract
from embedkit.backbones import import_timm
from embedkit.errors import FAILURE_KINDS
from embedkit.extraction import Measured, Progress
from embedkit.index import image_path
from embedkit.sources import Listing, list_images
from embedkit.store import Changes


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return Backbone.load(tiny_backbone)


def test_every_row_is_the_embedding_of_its_own_image(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    store = extract(photos, tmp_path / "s.h5", backbone, batch_size=7)
    assert store.ids == sorted(store.ids, key=os.fsencode) and len(store) == 24
    assert store.classes == ["cat", "dog"] and store.labels is not None
    for row, id in enumerate(store.ids):
        np.testing.assert_allclose(store.embeddings[row], backbone.embed(photos / id), atol=1e-5)
        assert id.startswith(store.classes[store.labels[row]])
        assert store.content_sha256[row].tobytes() == hashlib.sha256((photos / id).read_bytes()).digest()
    assert store.spec == backbone.spec and store.root == photos and store.failures == []


def test_worker_count_and_batch_size_leave_the_store_as_it_is(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    one = extract(photos, tmp_path / "1.h5", backbone, batch_size=1, workers=1)
    many = extract(photos, tmp_path / "2.h5", backbone, batch_size=32, workers=4)
    assert one.ids == many.ids
    np.testing.assert_allclose(one.load(), many.load(), atol=1e-5)


def test_the_same_run_twice_gives_the_same_content(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    runs = [extract(photos, tmp_path / f"{run}.h5", backbone) for run in range(2)]
    assert runs[0].content_id == runs[1].content_id


@pytest.fixture
def hostile(photos: Path, tmp_path: Path) -> Path:
    root = tmp_path / "hostile"
    shutil.copytree(photos / "cat", root)
    good = (photos / "dog" / "1.jpg").read_bytes()
    for name in ("with space.jpg", "😀.jpg", "line\nbreak.jpg"):
        (root / name).write_bytes(good)
    with open(os.path.join(os.fsencode(root), b"not-utf8-\xff.jpg"), "wb") as file:
        file.write(good)
    (root / "truncated.jpg").write_bytes(good[: len(good) // 2])
    (root / "text.jpg").write_text("I am a text file")
    (root / "empty.jpg").write_bytes(b"")
    (root / "empty.png").write_bytes(b"")
    (root / "folder.jpg").mkdir()
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    (root / "notes.txt").write_text("not an image by name")
    return root


def test_bad_images_are_named_and_cost_no_other_image(hostile: Path, backbone: Backbone, tmp_path: Path) -> None:
    store = extract(hostile, tmp_path / "s.h5", backbone, batch_size=3)
    reasons = {failure.id: failure.error for failure in store.failures}
    assert reasons.keys() == {
        "truncated.jpg", "text.jpg", "empty.jpg", "empty.png", "folder.jpg", "broken.jpg",
    }  # fmt: skip
    kinds = {failure.id: failure.kind for failure in store.failures}
    assert set(kinds.values()) <= set(FAILURE_KINDS)
    assert kinds["broken.jpg"] == "missing" and kinds["folder.jpg"] == "not-an-image"
    assert "truncated" in reasons["truncated.jpg"] and "empty" in reasons["empty.jpg"]
    assert "empty" in reasons["empty.png"] and "not an image" in reasons["text.jpg"]
    assert "folder" in reasons["folder.jpg"] and "link" in reasons["broken.jpg"]
    assert len(store) == 12 + 4 and "not-utf8-\udcff.jpg" in store.ids and "line\nbreak.jpg" in store.ids
    assert np.isfinite(store.embeddings).all() and (np.linalg.norm(store.embeddings, axis=1) > 0).all()
    expected = backbone.embed(hostile / "😀.jpg")
    for id in ("with space.jpg", "😀.jpg", "line\nbreak.jpg", "not-utf8-\udcff.jpg"):
        np.testing.assert_allclose(store.embeddings[store.index_of(id)], expected, atol=1e-5)


def test_progress_ends_at_the_total_and_counts_failures(hostile: Path, backbone: Backbone, tmp_path: Path) -> None:
    seen: list[Progress] = []
    extract(hostile, tmp_path / "s.h5", backbone, batch_size=4, progress=seen.append)
    last = dataclasses.replace(seen[-1], measured=Measured())
    assert last == Progress(done=22, total=22, failed=6, kept=2, committed=22, changes=Changes(new=20))
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen) and len(seen) > 1
    assert all(progress.committed <= progress.done for progress in seen)
    measured = seen[-1].measured
    shares = (measured.read, measured.decode, measured.forward, measured.wait)
    assert all(0 < share < 1 for share in shares) and sum(shares) == pytest.approx(1)
    assert measured.images_per_second == pytest.approx(20 / measured.seconds)


def test_nothing_is_written_when_no_image_can_be_read(backbone: Backbone, tmp_path: Path) -> None:
    root = tmp_path / "bad"
    root.mkdir()
    (root / "a.jpg").write_text("no")
    with pytest.raises(ImageError, match=r"none of its 1 image could be read; the first: a\.jpg: not an image"):
        extract(root, tmp_path / "s.h5", backbone)
    (root / "a.jpg").unlink()
    with pytest.raises(ImageError, match="no images"):
        extract(root, tmp_path / "s.h5", backbone)
    with pytest.raises(ImageError, match="missing"):
        extract(tmp_path / "missing", tmp_path / "s.h5", backbone)
    assert sorted(os.listdir(tmp_path)) == ["bad"]


def test_overwrite_makes_a_store_anew(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    first = extract(photos, tmp_path / "s.h5", backbone)
    second = extract(photos, tmp_path / "s.h5", backbone, overwrite=True)
    assert second.run_id != first.run_id and second.content_id == first.content_id


def test_the_classifier_on_stored_embeddings_gives_the_models_logits(
    photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    timm = import_timm()
    model = timm.create_model("test_resnet", num_classes=10).eval()
    model.load_state_dict(load_file(tiny_backbone.with_suffix(".safetensors")))
    config = json.loads(tiny_backbone.read_text())["pretrained_cfg"]
    backbone = Backbone.load(tiny_backbone, decode="exact")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config), is_training=False)
    store = extract(photos, tmp_path / "s.h5", backbone)
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(photos / id).convert("RGB")) for id in store.ids]))
        ours = model.get_classifier()(torch.from_numpy(store.load()))
    np.testing.assert_allclose(ours.numpy(), logits.numpy(), atol=1e-5)


def test_the_report_says_what_was_chosen_and_where_the_time_went(
    photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    extract(photos, tmp_path / "s.h5", backbone, engine="graph", workers=2, report=tmp_path / "run.json")
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["images"] == {"total": 24, "failed": 0, "kept": 0, "computed": 24}
    assert report["engine"] == "graph" and report["batch_size"] == 8 and report["workers"] == 2
    assert [trial["engine"] for trial in report["trials"]] == ["eager", "graph"]
    assert all(trial["min_cosine"] >= 0.99999 and trial["seconds"] > 0 for trial in report["trials"])
    assert report["measured"]["images_per_second"] > 0 and report["measured"]["cpu_seconds"] > 0
    assert report["hint"].split("-bound")[0] in ("read", "decode", "forward") or "waited" in report["hint"]
    assert report["peak_memory_bytes"] is None or report["peak_memory_bytes"] > 50e6
    extract(photos, tmp_path / "s.h5", backbone, report=tmp_path / "run.json")
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["images"]["kept"] == 24 and "engine" not in report


def test_an_update_keeps_the_engine_of_before(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(photos, root)
    extract(root, tmp_path / "s.h5", backbone, engine="graph")
    image = sorted(root.glob("*/*"))[0]
    Image.open(image).rotate(90).save(image.with_name("turned.png"))
    updated = extract(root, tmp_path / "s.h5", backbone, report=tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["engine"] == "graph"
    assert updated.information["engine"] == "graph" and len(updated) == 25
    fresh = extract(root, tmp_path / "fresh.h5", backbone, engine="graph")
    assert fresh.content_id == updated.content_id


def test_files_can_be_named_one_by_one(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    folder = extract(photos, tmp_path / "folder.h5", backbone)
    files = [photos / id for id in folder.ids]
    named = extract(reversed(files), tmp_path / "named.h5", backbone)
    assert named.ids == folder.ids and np.array_equal(named.embeddings, folder.embeddings)
    assert named.root == folder.root and named.labels is None
    with pytest.raises(ImageError, match="is in the list twice"):
        extract([files[0], files[0]], tmp_path / "twice.h5", backbone)
    with pytest.raises(ImageError, match="it is empty"):
        extract([], tmp_path / "none.h5", backbone)
    some = extract([*files[:2], photos / "missing.jpg"], tmp_path / "some.h5", backbone)
    assert len(some) == 2 and [failure.error for failure in some.failures] == ["the file is missing"]


def test_what_progress_raises_ends_the_run_and_keeps_what_is_computed(
    photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    class Enough(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.committed >= 8:
            raise Enough

    with pytest.raises(Enough):
        extract(photos, tmp_path / "s.h5", backbone, batch_size=4, part_size=4, progress=stop)
    assert not (tmp_path / "s.h5").exists()
    seen: list[Progress] = []
    store = extract(photos, tmp_path / "s.h5", backbone, batch_size=4, part_size=4, progress=seen.append)
    assert seen[0].changes.resumed >= 8 and len(store) == 24
    assert store.content_id == extract(photos, tmp_path / "t.h5", backbone).content_id


def test_the_numbers_do_not_depend_on_workers_or_passes(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    ways = [(1, 8, "eager"), (3, 5, "eager"), (2, 24, "eager"), (1, 8, "graph"), (4, 8, "graph")]
    found = [
        extract(photos, tmp_path / f"{number}.h5", backbone, workers=workers, batch_size=size, engine=engine)
        for number, (workers, size, engine) in enumerate(ways)
    ]
    assert len({store.content_id for store in found[:3]}) == 1 and found[3].content_id == found[4].content_id
    np.testing.assert_allclose(found[0].embeddings, found[3].embeddings, atol=1e-5)


def test_a_store_says_how_its_images_were_decoded_and_computed(
    photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    options = {"decode": "fast", "precision": "bf16", "views": ("flip",)}
    store = extract(photos, tmp_path / "s.h5", Backbone.load(tiny_backbone, **options))  # type: ignore[arg-type]
    assert store.spec.precision == "bfloat16" and store.spec.views == ("flip",)
    assert store.spec.preprocessing.decoder == "libjpeg-turbo scaled, torch resize"
    again = Backbone.reload(store.spec, store.recipe)
    assert again.spec == store.spec
    # The spec is believed, not the recipe.
    assert Backbone.reload(store.spec, {"model": str(tiny_backbone)}).spec == store.spec
    plain = Backbone.load(tiny_backbone)
    assert set(plain.spec.differences(store.spec)) == {"precision", "preprocessing.decoder", "views"}
    assert "views" not in plain.spec.to_dict()


def damaged(photos: Path, root: Path, bad: int) -> Path:
    """Copy the photographs, with files before them that are none."""
    shutil.copytree(photos / "cat", root)
    for number in range(bad):
        (root / f"0{number:03}.jpg").write_text("no")
    return root


def test_an_engine_is_found_where_the_first_images_are_unreadable(
    photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    root = damaged(photos, tmp_path / "mixed", 50)
    store = extract(root, tmp_path / "s.h5", backbone, engine="graph")
    assert store.information["engine"] == "graph" and (len(store), len(store.failures)) == (12, 50)
    for image in sorted(root.glob("*"))[50:]:
        image.unlink()
    with pytest.raises(ImageError, match="none of its 50 images could be read"):
        extract(root, tmp_path / "none.h5", backbone, engine="graph")


def test_the_engine_outlives_deletions_kills_and_other_options(
    photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    shutil.copytree(photos, root)
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if progress.committed >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(root, tmp_path / "s.h5", backbone, engine="graph", batch_size=4, part_size=4, progress=stop)
    note = json.loads((tmp_path / "s.h5.parts" / "run.json").read_bytes())
    assert note["information"]["engine"] == "graph"
    extract(root, tmp_path / "s.h5", backbone)
    fresh = extract(root, tmp_path / "fresh.h5", backbone, engine="graph")
    assert Store.open(tmp_path / "s.h5").content_id == fresh.content_id
    image = root / "cat" / "1.jpg"
    data = image.read_bytes()
    image.unlink()
    assert extract(root, tmp_path / "s.h5", backbone).information["engine"] == "graph"
    image.write_bytes(data)
    assert extract(root, tmp_path / "s.h5", backbone).content_id == fresh.content_id


def test_a_report_that_cannot_be_written_is_an_error_before_anything_is_computed(
    photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        extract(photos, tmp_path / "s.h5", backbone, report=tmp_path / "missing" / "run.json")
    assert os.listdir(tmp_path) == []


def test_a_listing_of_several_folders_is_extracted_and_shown(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    other = tmp_path / "more"
    shutil.copytree(photos, other)
    listing = list_images(photos, f"again={other}", exclude=["*.gif"])
    store = extract(listing, tmp_path / "s.h5", backbone)
    assert store.ids == [file.id for file in listing.files]
    assert {id.partition("/")[0] for id in store.ids} == {photos.name, "again"}
    assert store.information["sources"] == {photos.name: str(photos), "again": str(other)}
    path = image_path(store, next(id for id in store.ids if id.startswith("again/")))
    assert path is not None and path.is_file() and path.is_relative_to(other)


@pytest.mark.parametrize("allowed", [0, 2, 0.01])
def test_too_many_failures_end_a_run_and_keep_what_is_computed(
    photos: Path, backbone: Backbone, tmp_path: Path, allowed: float
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(photos, mixed)
    for number in range(3):
        (mixed / f"zz{number}.jpg").write_bytes(b"not an image")  # Read last.
    with pytest.raises(
        ImageError, match=r"zz\d\.jpg: .*; with it [123] of \d+ images have failed, and \d may"
    ) as caught:
        extract(mixed, tmp_path / "s.h5", backbone, max_failures=allowed, batch_size=1, part_size=1)
    assert caught.value.kind == "not-an-image" and Store.status(tmp_path / "s.h5").state == "unfinished"
    progress: list[Progress] = []
    store = extract(mixed, tmp_path / "s.h5", backbone, max_failures=3, progress=progress.append)
    assert len(store.failures) == 3 and progress[-1].changes.resumed > 0
    with pytest.raises(ImageError, match="3 of"):  # A finished store is judged again.
        extract(mixed, tmp_path / "s.h5", backbone, max_failures=2)


class Odd(NamedTuple):
    """An image that fails in ways in which none should."""

    id: str
    error: Exception | None = None
    data: bytes = b""
    label: str | None = None

    def status(self) -> tuple[int, int]:
        return len(self.data), 1

    def read(self) -> bytes:
        if self.error is not None:
            raise self.error
        return self.data


def test_whatever_a_source_raises_costs_one_image_and_is_tried_again(
    photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    data = (photos / "cat" / "1.jpg").read_bytes()
    errors = [ValueError("embedded \udc80 null byte \ud800"), RecursionError(), KeyError("x"), MemoryError()]
    odd = [Odd(f"{number}.jpg", error, data) for number, error in enumerate(errors)]
    listing = Listing("odd", [*odd, Odd("good.jpg", None, data)], [], [], 0)
    store = extract(listing, tmp_path / "s.h5", backbone)
    assert store.ids == ["good.jpg"] and {failure.kind for failure in store.failures} == {"unreadable"}
    assert "ValueError while it was read: embedded" in store.failures[0].error and store.verify() == []
    passing = [ImageError("x", "the network is down", "unreadable"), ImageError("x", "no", "damaged")]
    some = [Odd(f"{number}.jpg", error, data) for number, error in enumerate(passing)]
    first = extract(Listing("net", [*some, Odd("9.jpg", None, data)], [], [], 0), tmp_path / "t.h5", backbone)
    assert [failure.kind for failure in first.failures] == ["unreadable", "damaged"]
    mended = [one._replace(error=None) for one in some]
    second = extract(Listing("net", [*mended, Odd("9.jpg", None, data)], [], [], 0), tmp_path / "t.h5", backbone)
    # What says nothing about the image is tried again unasked, and what does is not.
    assert second.ids == ["0.jpg", "9.jpg"] and [failure.id for failure in second.failures] == ["1.jpg"]


def test_ids_that_a_store_cannot_hold_are_failures_before_anything_is_computed(
    photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    data = (photos / "cat" / "1.jpg").read_bytes()
    names = ["../up.jpg", "a.jpg", "x" * 2000, "y\0.jpg"]
    bad = ["../x.jpg", "/etc/x.jpg", "a.jpg", "a.jpg", "", "n\0", "z" * 5000, "lone\ud800", "..", "%2E%2E"]
    listing = Listing(
        "odd", [Odd(name, None, data) for name in names], [], [ImageError(id, "no", "refused") for id in bad], 0
    )
    store = extract(listing, tmp_path / "s.h5", backbone)
    assert store.ids == ["a.jpg"] and store.verify() == []
    found = [failure.id for failure in store.failures]
    assert len(found) == len(set(found)) == len(bad) + 3 and "a.jpg" not in found
    assert {"%2E%2E/up.jpg", "%2E%2E/x.jpg", "%2Fetc/x.jpg", "a.jpg#2", "a.jpg#3", "n%00", "%2E%2E#2"} <= set(found)
    again = extract(listing, tmp_path / "s.h5", backbone)
    assert again.content_id == store.content_id and [failure.id for failure in again.failures] == found
    for files in ([Odd("b", None, data), Odd("a", None, data)], [Odd("a", None, data), Odd("a", None, data)]):
        with pytest.raises(ImageError, match=r"not sorted|two images"):
            extract(Listing("odd", files, [], [], 0), tmp_path / "t.h5", backbone)


def test_dropping_most_of_a_store_is_said_aloud(
    photos: Path, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extract(photos, tmp_path / "s.h5", backbone)
    extract(list_images(photos, limit=20), tmp_path / "s.h5", backbone)
    assert "are dropped" not in caplog.text
    extract(list_images(photos, limit=5), tmp_path / "s.h5", backbone)
    assert "15 of the store's 20 rows are dropped" in caplog.text


def test_a_store_names_its_parent_and_keeps_it_through_an_update(
    photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    parent = extract(tmp_path / "photos", tmp_path / "parent.h5", backbone)
    child = extract(tmp_path / "photos", tmp_path / "child.h5", backbone, parent=parent)
    assert child.information["parent"] == {
        "path": str(parent.path), "content_id": parent.content_id, "digest": parent.digest,
    }  # fmt: skip
    assert "parent" not in parent.information and child.content_id == parent.content_id
    (tmp_path / "photos" / "cat" / "1.jpg").unlink()
    updated = extract(tmp_path / "photos", tmp_path / "child.h5", backbone)
    assert len(updated) == len(child) - 1 and updated.information["parent"] == child.information["parent"]
