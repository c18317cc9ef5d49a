"""What a search is made with and what it leaves out: queries, filters, a query's own rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit import Backbone, EmbeddingShapeError, EvaluationError, ImageError, Store, StoreFormatError, extract
from embedkit.images import Region
from embedkit.index.filters import drop_own, mask_of
from embedkit.index.queries import Queries, embed_queries
from embedkit.sources import content_sha256
from embedkit.spec import EmbeddingSpec
from embedkit.store import StoreWriter


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return Backbone.load(tiny_backbone)


@pytest.fixture(scope="module")
def store(photos: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return extract(photos, tmp_path_factory.mktemp("store") / "photos.h5", backbone)


def no_backbone() -> Backbone:
    raise AssertionError("no image has to be embedded for this")


def vectors_store(path: Path, embeddings: Any, ids: Sequence[str], **columns: Any) -> Store:
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=len(embeddings[0]))
    with StoreWriter(path, spec) as writer:
        writer.append(np.array(embeddings, dtype=np.float32), ids, **columns)
        writer.finalise()
    return Store.open(path)


@pytest.fixture
def small(tmp_path: Path) -> Store:
    ids = ["2023/a.jpg", "2024/b.jpg", "2024/c.jpg", "2024/d.jpg"]
    labels = ["cat", "cat", "dog", None]
    return vectors_store(tmp_path / "small.h5", [[1, 0], [0, 1], [1, 1], [3, 4]], ids, labels=labels)


# Queries


def test_a_list_may_mix_every_form(store: Store, backbone: Backbone, photos: Path) -> None:
    path, row = photos / "cat" / "3.jpg", store.index_of("cat/3.jpg")
    pixels = np.asarray(Image.open(path))
    queries = [
        path, row, str(path), "cat/3.jpg", Image.open(path), pixels, store.embeddings[row], np.int64(row),
        path.read_bytes(), Region(path.read_bytes(), (0, 0, 96, 72)), list(map(float, store.embeddings[row])),
        np.array("cat/3.jpg"),
    ]  # fmt: skip
    found = embed_queries(queries, store, lambda: backbone)
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (len(queries), store.dim) and not found.single
    np.testing.assert_allclose(found.vectors, store.rows([row] * len(queries)), rtol=1e-4, atol=1e-5)
    for query in queries:
        alone = embed_queries(query, store, lambda: backbone)
        assert alone.single and alone.vectors.shape == (1, store.dim), query
        np.testing.assert_allclose(alone.vectors, store.rows([row]), rtol=1e-4, atol=1e-5)


def test_images_of_a_list_are_embedded_together(store: Store, photos: Path, backbone: Backbone) -> None:
    loaded = []

    def load() -> Backbone:
        loaded.append(backbone)
        return backbone

    files = [photos / "dog" / "1.jpg", 4, photos / "cat" / "2.jpg"]
    found = embed_queries(files, store, load)
    assert len(loaded) == 1
    # As one call embeds them: bit for bit.
    assert np.array_equal(found.vectors[[0, 2]], backbone.embed([files[0], files[2]]))
    assert np.array_equal(found.vectors[1], store.embeddings[4])


def test_several_images_are_queries_of_a_list(store: Store, backbone: Backbone) -> None:
    torch = pytest.importorskip("torch")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    expected = backbone.embed(list(pixels))
    for images in (pixels, list(pixels), torch.from_numpy(pixels).permute(0, 3, 1, 2)):
        found = embed_queries(images, store, lambda: backbone)
        assert not found.single and np.array_equal(found.vectors, expected)
    one = embed_queries(torch.from_numpy(pixels[0]).permute(2, 0, 1), store, lambda: backbone)
    assert one.single and np.allclose(one.vectors, expected[:1], atol=1e-5)


def test_sums_of_vectors_and_other_arrays_are_vectors(small: Store) -> None:
    torch, pandas = pytest.importorskip("torch"), pytest.importorskip("pandas")
    a, b, c = small.rows([0, 1, 2])
    for one in (a + b - c, (a + b - c).astype(np.float64), torch.tensor([0.0, 0.0], requires_grad=True), [0.0, 0]):
        found = embed_queries(one, small, no_backbone)
        assert found.single and found.vectors.tolist() == [[0, 0]] and found.vectors.dtype == np.float32
    many = np.array([[1, 2], [3, 4]], dtype=np.float16)
    for several in (many, many.tolist(), list(many), tuple(many), torch.from_numpy(many), pandas.DataFrame(many)):
        found = embed_queries(several, small, no_backbone)
        assert not found.single and found.vectors.tolist() == [[1, 2], [3, 4]]


def test_arrays_of_integers_and_strings_are_rows_and_ids(small: Store) -> None:
    for queries in ([2, 0], np.array([2, 0]), np.array([2, 0], dtype=np.uint8), range(2, -1, -2), (2, 0),
                    ["2024/c.jpg", "2023/a.jpg"], np.array(["2024/c.jpg", "2023/a.jpg"]),
                    np.array(["2024/c.jpg", "2023/a.jpg"], dtype=object)):  # fmt: skip
        found = embed_queries(queries, small, no_backbone)
        assert not found.single and found.vectors.tolist() == [[1, 1], [1, 0]] and len(found) == 2
        assert [rows.tolist() for rows in found.own] == [[2], [0]]


def test_no_query_gives_no_vector(small: Store) -> None:
    for none in ([], np.empty((0, 2)), np.array([], dtype=int), range(0)):
        found = embed_queries(none, small, no_backbone)
        assert found.vectors.shape == (0, 2) and not found.single and found.own == []


def test_ids_are_found_by_their_bytes(tmp_path: Path) -> None:
    ids = ["a", "ab", "b\udcff.jpg", "z é.jpg"]
    store = vectors_store(tmp_path / "s.h5", [[row, 1] for row in range(4)], ids)
    assert embed_queries(store.ids, store, no_backbone).origins == (0, 1, 2, 3)
    for unknown in ("", "aa", "A", "a\0", "zz", "z" * 100, "z" * 5000, "\ud800"):
        with pytest.raises(ImageError, match="missing"):
            embed_queries(unknown, store, no_backbone)


def test_a_string_is_the_file_that_exists_or_else_an_id(
    tmp_path: Path, photos: Path, store: Store, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    row = store.index_of("cat/1.jpg")
    same = embed_queries("cat/1.jpg", store, no_backbone)  # Both are one image, whose embedding is known.
    assert same.origins == (row,)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").mkdir()
    other = tmp_path / "cat" / "1.jpg"
    other.write_bytes((photos / "cat" / "1.jpg").read_bytes())
    assert embed_queries("cat/1.jpg", store, no_backbone).origins == (row,)  # A copy is the same image.
    other.write_bytes((photos / "dog" / "1.jpg").read_bytes())
    with pytest.raises(ImageError, match=rf"also an id of .*photos\.h5.*such as '\./cat/1\.jpg', or row {row}"):
        embed_queries("cat/1.jpg", store, no_backbone)
    dog = store.rows(ids=["dog/1.jpg"])
    for explicit in ("./cat/1.jpg", Path("cat/1.jpg"), str(other)):
        found = embed_queries(explicit, store, lambda: backbone)
        np.testing.assert_allclose(found.vectors, dog, rtol=1e-4, atol=1e-5)
    with pytest.raises(ImageError, match=r"cat: a folder|cat: .*folder"):
        embed_queries("cat", store, lambda: backbone)
    with pytest.raises(ImageError, match=r"missing, and .*photos\.h5 has no such id; ids look like 'cat/1\.jpg'") as no:
        embed_queries("bird/1.jpg", store, no_backbone)
    assert no.value.kind == "missing"


def test_a_file_of_the_store_that_was_changed_since_is_the_file(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    Image.new("RGB", (80, 80), "red").save("a.png")
    store = extract(tmp_path / "in", tmp_path / "s.h5", backbone)
    Image.new("RGB", (80, 80), "blue").save("a.png")
    found = embed_queries("a.png", store, lambda: backbone)
    assert found.origins == (Path("a.png"),) and found.own[0].tolist() == []
    assert np.abs(found.vectors - store.embeddings).max() > 1e-3


def test_own_rows_are_the_row_or_all_with_the_content_of_the_image(
    tmp_path: Path, photos: Path, store: Store, backbone: Backbone
) -> None:
    path, row = photos / "cat" / "5.jpg", store.index_of("cat/5.jpg")
    stranger = photos.parent / "stranger.png"
    Image.new("RGB", (70, 70)).save(stranger)
    queries = [path, str(path), path.read_bytes(), row, "cat/5.jpg", store.embeddings[row], Image.open(path), stranger]
    found = embed_queries(queries, store, lambda: backbone)
    # Whether an image of Pillow's is still what was in the file, nobody knows.
    assert [rows.tolist() for rows in found.own] == [[row]] * 5 + [[], [], []]
    assert [rows.tolist() for rows in embed_queries(store.rows([1, 2]), store, no_backbone).own] == [[], []]
    data = path.read_bytes()
    hashes = [content_sha256(data), content_sha256(b"another"), content_sha256(data)]
    copies = vectors_store(tmp_path / "c.h5", np.eye(3), ["a", "b", "c"], content_sha256=hashes)
    own = Queries(np.ones((1, 3), np.float32), True, copies, (path,)).own
    assert own[0].tolist() == [0, 2] and own[0].dtype == np.int64


def test_own_rows_of_images_in_memory(backbone: Backbone, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    store = extract(list(pixels), tmp_path / "s.h5", backbone)
    queries = [pixels[1], Image.fromarray(pixels[2]), pixels[0] // 2]
    assert [rows.tolist() for rows in embed_queries(queries, store, lambda: backbone).own] == [[1], [2], []]


def test_bad_queries_say_what_is_wrong(small: Store, backbone: Backbone, tmp_path: Path) -> None:
    errors: list[tuple[Any, type[Exception], str]] = [
        (np.ones(3), EmbeddingShapeError, r"width 2, the query has shape \(3,\)"),
        (np.ones((4, 3)), EmbeddingShapeError, r"width 2, the query has shape \(3,\)"),
        ([np.ones((1, 2))], EmbeddingShapeError, r"the query has shape \(1, 2\)"),
        (np.array([1, np.nan]), EmbeddingShapeError, "infinities or NaN"),
        (np.array([1, 1e300]), EmbeddingShapeError, "infinities or NaN"),
        (4, IndexError, r"row 4 does not exist; .*small\.h5 has 4 rows"),
        ([0, -1], IndexError, "row -1 does not exist"),
        (tmp_path / "no.jpg", ImageError, "the file is missing"),
        (True, TypeError, "a query is .*, not bool"),
        (np.array([True, False]), TypeError, r"not an array of bool of shape \(2,\)"),
        (None, TypeError, "not NoneType"),
        ([[0, 1]], TypeError, "not list"),
        ({0}, TypeError, "not set"),
        (0.5, TypeError, "not float"),
        ([np.array([1, 2, 3])], TypeError, r"not an array of int64 of shape \(3,\)"),
    ]
    for query, error, message in errors:
        with pytest.raises(error, match=message):
            embed_queries(query, small, lambda: backbone)


def test_a_row_whose_embedding_is_not_finite_is_an_error_of_the_store(tmp_path: Path) -> None:
    store = vectors_store(tmp_path / "s.h5", [[1, 2], [3, 4]], ["a", "b"])
    data = store.path.read_bytes()
    broken = tmp_path / "broken.h5"
    broken.write_bytes(data.replace(np.float32([3, 4]).tobytes(), np.float32([np.nan, 4]).tobytes()))
    with pytest.raises(StoreFormatError, match=r"broken\.h5 has embeddings that are not finite.*embedkit verify"):
        embed_queries([0, 1], Store.open(broken), no_backbone)


# Filters


def test_filters_in_every_form(small: Store) -> None:
    pandas = pytest.importorskip("pandas")
    assert mask_of(None, small) is None
    cases: list[tuple[Any, list[int]]] = [
        ("label=cat", [0, 1]),
        ("label=?[ao]*", [0, 1, 2]),
        ("id=2024/*", [1, 2, 3]),
        (["id=2024/*", "label=cat"], [1]),
        (("id=2023/*", "label=dog"), []),
        (np.array(["id=*d.jpg"]), [3]),
        (np.array(["id=*d.jpg"], dtype=object), [3]),
        ("id=2031/*", []),
        (np.array([True, False, False, True]), [0, 3]),
        ([True, False, False, True], [0, 3]),
        (pandas.Series([True, False, False, True]), [0, 3]),
        (np.zeros(4, dtype=bool), []),
        ({3, 1}, [1, 3]),
        (frozenset([0]), [0]),
        ([2, 2, 0], [0, 2]),
        (np.array([1], dtype=np.uint16), [1]),
        (range(4), [0, 1, 2, 3]),
        ({1: "of", 2: "rows"}.keys(), [1, 2]),
        ([], []),
        (set(), []),
        (np.array([], dtype=int), []),
    ]
    for where, rows in cases:
        mask = mask_of(where, small)
        assert mask is not None and mask.shape == (4,) and mask.dtype == bool
        assert np.flatnonzero(mask).tolist() == rows, where


def test_beginnings_of_ids_match_as_any_pattern_does(tmp_path: Path) -> None:
    ids = ["a", "a/b", "a/b]c.jpg", "a/é.jpg", "a/é/x", "b\udcff.jpg", "é.jpg"]
    store = vectors_store(tmp_path / "s.h5", [[row, 1] for row in range(len(ids))], ids)
    for beginning in ("", "a", "a/", "a/b]", "a/é", "a/e", "b\udcff", "é", "a/é.jpg", "a" * 99, "a\0"):
        expected = [id.startswith(beginning) for id in store.ids]
        mask, general = mask_of(f"id={beginning}*", store), mask_of(f"id={beginning}**", store)
        assert mask is not None and general is not None and mask.tolist() == general.tolist() == expected, beginning


def test_bad_filters_say_what_is_wrong(small: Store, tmp_path: Path) -> None:
    plain = vectors_store(tmp_path / "plain.h5", [[1, 0]], ["a"])
    errors: list[tuple[Store, Any, type[Exception], str]] = [
        (small, "label=dgo", EvaluationError, r"no class of .*small\.h5 matches 'dgo'; did you mean 'dog'\?"),
        (small, "label=CAT", EvaluationError, "did you mean 'cat'"),
        (small, ["id=*", "label=zebra*"], EvaluationError, "matches 'zebra.*'; it has 'cat', 'dog'$"),
        (plain, "label=cat", EvaluationError, r"plain\.h5 has no labels"),
        (small, "cat", EvaluationError, "'cat' is not of the form label=PATTERN or id=PATTERN"),
        (small, ["label=cat", "colour=red"], EvaluationError, "'colour=red' is not of the form"),
        (small, np.ones(5, dtype=bool), IndexError, r"mask has shape \(5,\), but .*small\.h5 has 4 rows"),
        (small, np.ones((4, 1), dtype=bool), IndexError, r"mask has shape \(4, 1\)"),
        (small, {4}, IndexError, r"row 4 does not exist; .*small\.h5 has 4 rows"),
        (small, [0, -1], IndexError, "row -1 does not exist"),
        (small, [0.5], TypeError, "not list of float64"),
        (small, 3, TypeError, "not int of int64"),
        (small, [None], TypeError, "not list of object"),
        (small, lambda store: None, TypeError, "not function of object"),
    ]
    for store, where, error, message in errors:
        with pytest.raises(error, match=message):
            mask_of(where, store)


def test_dropping_own_rows_equals_doing_it_by_hand() -> None:
    random = np.random.default_rng(0)
    for n, q, m, k in ((50, 40, 12, 5), (12, 30, 12, 12), (5, 1, 5, 3), (9, 7, 9, 100)):
        rows = np.stack([random.permutation(n)[:m] for _ in range(q)])
        scores = -np.sort(-random.random((q, m), dtype=np.float32), axis=1)
        rows[random.random((q, m)) < 0.1] = -1
        own = [random.choice(n, size=random.integers(0, 4), replace=False) for _ in range(q)]
        left = [
            [(score, row) for score, row in zip(*pair, strict=True) if row >= 0 and row not in mine][:k]
            for pair, mine in zip(zip(scores.tolist(), rows.tolist(), strict=True), own, strict=True)
        ]
        found_scores, found_rows = drop_own(scores, rows, own, k)
        assert found_rows.shape == found_scores.shape == (q, max(map(len, left)))
        assert found_scores.dtype == np.float32 and found_rows.dtype == np.int64
        for query, hits in enumerate(left):
            assert found_rows[query, : len(hits)].tolist() == [row for _, row in hits]
            assert found_scores[query, : len(hits)].tolist() == [score for score, _ in hits]
            assert (found_rows[query, len(hits) :] == -1).all() and np.isnan(found_scores[query, len(hits) :]).all()


def test_nothing_own_leaves_what_was_found() -> None:
    scores, rows = np.float32([[0.9, 0.8, -np.inf], [0.7, -np.inf, -np.inf]]), np.array([[5, 2, -1], [1, -1, -1]])
    nobodys = np.empty(0, dtype=np.int64)
    for own in ([], [nobodys, nobodys]):
        assert drop_own(scores, rows, own)[1].tolist() == [[5, 2], [1, -1]]
        np.testing.assert_array_equal(drop_own(scores, rows, own)[0], np.float32([[0.9, 0.8], [0.7, np.nan]]))
        assert drop_own(scores, rows, own, 1)[1].tolist() == [[5], [1]]
    assert drop_own(scores[:0], rows[:0], [], 3)[1].shape == (0, 0)
