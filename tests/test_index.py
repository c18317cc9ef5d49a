from __future__ import annotations

import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit import Backbone, EmbeddingShapeError, EmbeddingSpec, ImageError, Index, SpecMismatchError, Store, extract
from embedkit.images import Region
from embedkit.index import image_path, read_picture, search_page
from embedkit.store import StoreWriter


@pytest.fixture(scope="module")
def store(photos: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return extract(photos, tmp_path_factory.mktemp("store") / "photos.h5", Backbone.load(tiny_backbone))


def vectors_store(path: Path, embeddings: np.ndarray, ids: list[str] | None = None, root: str | None = None) -> Store:
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=embeddings.shape[1])
    with StoreWriter(path, spec, information={"root": root} if root else None) as writer:
        writer.append(embeddings, ids or [f"{row:05}.jpg" for row in range(len(embeddings))])
        writer.finalise()
    return Store.open(path)


def test_flat_search_equals_numpy(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    gallery = random.standard_normal((10_000, 24), dtype=np.float32)
    queries = random.standard_normal((50, 24), dtype=np.float32)
    result = Index.build(vectors_store(tmp_path / "s.h5", gallery)).search(queries, k=10)
    similarity = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        gallery / np.linalg.norm(gallery, axis=1)[:, None]
    ).T
    expected = np.argsort(-similarity, axis=1)[:, :10]
    np.testing.assert_allclose(result.scores, np.take_along_axis(similarity, expected, 1), atol=1e-6)
    # By score, so that two rows within rounding of one another may change places.
    np.testing.assert_allclose(np.take_along_axis(similarity, result.rows, 1), result.scores, atol=1e-6)
    assert (result.rows == expected).mean() > 0.99


def test_every_form_of_a_query_finds_the_same(store: Store, photos: Path) -> None:
    index = Index.build(store)
    path = photos / "cat" / "3.jpg"
    row = store.index_of("cat/3.jpg")
    forms = [path, str(path), Image.open(path), np.asarray(Image.open(path)), store.embeddings[row], row, np.int64(row)]
    for form in forms:
        hits = index.search(form, k=5).hits()
        assert hits[0].id == "cat/3.jpg" and hits[0].rank == 1, form
        assert hits[0].score == pytest.approx(1, abs=1e-5)
    together = index.search(forms, k=5)
    assert together.rows.shape == (len(forms), 5) and len(together) == len(forms)
    assert [hits[0].id for hits in together] == ["cat/3.jpg"] * len(forms)
    assert index.search(forms[:2], k=5).rows.shape == (2, 5)
    assert index.search(store.rows([row, row]), k=3).rows.shape == (2, 3)


def test_a_hit_knows_its_class_and_file(store: Store, photos: Path) -> None:
    result = Index.build(store).search(photos / "dog" / "1.jpg", k=3)
    assert len(result) == 3 and [hit.rank for hit in result] == [1, 2, 3]
    for hit in result:
        assert hit.label == "dog" and hit.path == photos / hit.id and store.ids[hit.row] == hit.id


def test_k_beyond_the_store_gives_every_row_once(store: Store) -> None:
    result = Index.build(store).search(0, k=1000)
    assert sorted(result.rows[0]) == list(range(24)) and (np.diff(result.scores[0]) <= 0).all()


def test_a_zero_vector_is_similar_to_nothing(tmp_path: Path) -> None:
    index = Index.build(vectors_store(tmp_path / "s.h5", np.array([[0, 0], [1, 0], [0, 1]], dtype=np.float32)))
    assert index.search(np.array([1.0, 0.1]), k=3).rows[0].tolist() == [1, 2, 0]
    assert index.search(np.zeros(2), k=3).scores.tolist() == [[0, 0, 0]]


def test_a_query_from_another_backbone_crop_or_checkpoint_is_refused(
    store: Store, tiny_backbone: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_backbone.with_suffix(".safetensors"))
    save_file({name: tensor * 1.001 for name, tensor in state.items()}, tmp_path / "tiny.safetensors")
    (tmp_path / "tiny.json").write_text(tiny_backbone.read_text())
    for other, field in (
        (Backbone.load(tiny_backbone, crop_pct=1.0), "preprocessing.crop_pct"),
        (Backbone.load(tmp_path / "tiny.json"), "weights_sha256"),
        (Backbone.load(tiny_backbone, pool="max"), "pool"),
    ):
        with pytest.raises(SpecMismatchError) as caught:
            Index.build(store, backbone=other)
        assert list(caught.value.differences) == [field]


def test_bad_queries_say_what_is_wrong(store: Store, tmp_path: Path) -> None:
    index = Index.build(store)
    with pytest.raises(EmbeddingShapeError, match=f"width {store.dim}"):
        index.search(np.ones(3))
    with pytest.raises(EmbeddingShapeError, match="NaN"):
        index.search(np.full(store.dim, np.nan))
    with pytest.raises(IndexError, match="row 24 does not exist"):
        index.search(24)
    with pytest.raises(ImageError, match="missing"):
        index.search(tmp_path / "missing.jpg")
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.search(0, k=0)


def test_the_page_is_self_contained_and_escapes_what_it_shows(photos: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (300, 200), "red").save(root / "<script>.png")
    ids = ["!!/secret.png", "<script>.png", "gone.png"]
    path = vectors_store(tmp_path / "s.h5", np.eye(3, dtype=np.float32) + 0.1, ids, root=str(root)).path
    path.write_bytes(path.read_bytes().replace(b"!!/secret.png", b"../secret.png"))  # No writer writes such an id.
    store = Store.open(path)
    result = Index.build(store).search([0, 1], k=3)
    page = search_page(result, [("first <b>", True), (str(photos / "cat" / "1.jpg"), False)])
    assert page.count("data:image/jpeg;base64,") == 2 + 1  # <script>.png twice and one query: not the secret
    assert "<script" not in page and "&lt;script&gt;.png" in page and "first &lt;b&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "@import" not in page and "url(" not in page
    assert page.count('class="missing"') == 1 + 2 * 2


def test_pictures_are_found_again_in_archives_folders_and_boxes(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(photos / "cat" / "1.jpg", "cat/1.jpg")
    data, eye = (photos / "cat" / "1.jpg").read_bytes(), np.eye(1, 4, dtype=np.float32)
    packed = vectors_store(tmp_path / "a.h5", eye, ["cat/1.jpg"], root=str(tmp_path / "x.tar"))
    assert read_picture(packed, "cat/1.jpg") == data and image_path(packed, "cat/1.jpg") is None
    with pytest.raises(ImageError, match=r"cat/2\.jpg: no such image in .*x\.tar"):
        read_picture(packed, "cat/2.jpg")
    boxed = vectors_store(tmp_path / "b.h5", eye, ["cat/1.jpg#xywh=1,2,30,40"], root=str(photos))
    assert read_picture(boxed, boxed.ids[0]) == Region(data, (1, 2, 31, 42))
    assert image_path(boxed, boxed.ids[0]) == photos / "cat" / "1.jpg"
    assert search_page(Index.build(boxed).search([0], k=1), [(boxed.ids[0], True)]).count("data:image/jpeg") == 2
    for id in ("cat/1.jpg#xywh=1,2,3", "cat/99.jpg#xywh=1,2,3,4", "../x#xywh=1,2,3,4", "/etc/passwd"):
        with pytest.raises(ImageError):
            read_picture(boxed, id)
    named = tmp_path / "c.h5"
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=4)
    sources = {"a": str(photos), "b": str(tmp_path / "x.tar"), "c": 3}
    with StoreWriter(named, spec, information={"root": "/", "sources": sources}) as writer:
        writer.append(np.ones((3, 4), dtype=np.float32), ["a/cat/1.jpg", "b/cat/1.jpg", "c/cat/1.jpg"])
        writer.finalise()
    store = Store.open(named)
    assert read_picture(store, "a/cat/1.jpg") == read_picture(store, "b/cat/1.jpg") == data
    assert image_path(store, "a/cat/1.jpg") == photos / "cat" / "1.jpg" and image_path(store, "b/cat/1.jpg") is None
    with pytest.raises(ImageError, match="no file is known"):
        read_picture(store, "c/cat/1.jpg")
