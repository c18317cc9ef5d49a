from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from embedkit import Backbone, ImageError, extract
from embedkit.backbones import import_timm
from embedkit.extraction import Measured, Progress
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
    with pytest.raises(ImageError, match=r"none of its 1 images could be read; the first: a\.jpg: not an image"):
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
