"""What a search found: hits, ids and labels, data frames, the page and the strip."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit import EmbeddingSpec, MissingExtraError, Store
from embedkit.index import SearchResult, search_page
from embedkit.index.page import STRIP_HITS, STRIP_QUERIES
from embedkit.index.results import padded
from embedkit.store import StoreWriter


def make_store(
    path: Path, ids: Sequence[str], labels: Sequence[str | None] | None = None, root: Path | None = None
) -> Store:
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
    with StoreWriter(path, spec, information=None if root is None else {"root": str(root)}) as writer:
        writer.append(np.ones((len(ids), 2), dtype=np.float32), ids, labels=labels)
        writer.finalise()
    return Store.open(path)


@pytest.fixture
def found(tmp_path: Path) -> SearchResult:
    """Two queries, of which the second found one row only."""
    store = make_store(tmp_path / "s.h5", ["a.jpg", "b.jpg", "ç.jpg"], ["cat", None, "dog"], root=tmp_path)
    scores = np.array([[0.9, 0.5], [0.25, np.nan]], dtype=np.float32)
    return SearchResult(scores, np.array([[2, 1], [0, -1]]), store)


def test_rows_of_minus_one_are_no_hits(found: SearchResult) -> None:
    assert [[hit.id for hit in hits] for hits in found] == [["ç.jpg", "b.jpg"], ["a.jpg"]] and len(found) == 2
    assert found.hits(0, 1) == found.hits(0)[:1]
    only = SearchResult(found.scores[1:], found.rows[1:], found.store, single=True)
    assert len(only) == 1 and [(hit.rank, hit.score, hit.row, hit.label) for hit in only] == [(1, 0.25, 0, "cat")]
    nothing = SearchResult(found.scores[:, :0], found.rows[:, :0], found.store)
    assert [*nothing] == [[], []] and nothing.ids.shape == (2, 0)


def test_ids_and_labels_lie_as_the_rows_do(found: SearchResult) -> None:
    assert found.labels is not None and found.ids.shape == found.labels.shape == (2, 2)
    assert found.ids.tolist() == [["ç.jpg", "b.jpg"], ["a.jpg", None]]
    assert found.labels.tolist() == [["dog", None], ["cat", None]]
    assert {type(value) for value in found.ids.ravel()} == {str, type(None)}


def test_a_store_without_labels_has_none(tmp_path: Path) -> None:
    result = SearchResult(np.ones((1, 1), np.float32), np.zeros((1, 1), int), make_store(tmp_path / "s.h5", ["a"]))
    assert result.labels is None and result.hits()[0].label is None and result.hits()[0].path is None


def test_few_hits_do_not_decode_every_id(found: SearchResult) -> None:
    assert found.hits() and found.ids.size and found._repr_html_() and repr(found)
    assert "ids" not in vars(found.store)


def test_the_representation_is_one_line(found: SearchResult) -> None:
    expected = f"<SearchResult of 2 queries: 3 hits in {found.store.path}, cosine similarity>"
    assert repr(found) == expected
    one = SearchResult(found.scores[1:], found.rows[1:], found.store, metric="l2")
    assert repr(one).startswith("<SearchResult of 1 query: 1 hit in ") and repr(one).endswith(", distance>")


def test_pandas_has_a_line_for_each_hit(found: SearchResult, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert frame.columns.tolist() == ["query", "rank", "score", "row", "id", "label", "path"]
    assert frame[["query", "rank", "row"]].to_numpy().tolist() == [[0, 1, 2], [0, 2, 1], [1, 1, 0]]
    assert frame["score"].tolist() == pytest.approx([0.9, 0.5, 0.25])
    assert frame["id"].tolist() == ["ç.jpg", "b.jpg", "a.jpg"] and frame["label"].tolist() == ["dog", None, "cat"]
    assert frame["path"].tolist() == [str(tmp_path / id) for id in frame["id"]]
    empty = SearchResult(found.scores[:0], found.rows[:0], found.store).to_pandas()
    assert len(empty) == 0 and empty.columns.tolist() == frame.columns.tolist()
    assert isinstance(frame.pivot(index="query", columns="rank", values="id"), pandas.DataFrame)


def test_without_pandas_its_extra_is_named(found: SearchResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'embedkit\[pandas\]'"):
        found.to_pandas()


def test_lists_of_different_lengths_are_padded() -> None:
    scores, rows = padded([(np.float32([0.5]), np.array([3])), (np.float32([]), np.array([], int)),
                           (np.float32([0.9, 0.8]), np.array([1, 0]))])  # fmt: skip
    assert rows.tolist() == [[3, -1], [-1, -1], [1, 0]] and rows.dtype == np.int64
    np.testing.assert_array_equal(scores, np.float32([[0.5, np.nan], [np.nan, np.nan], [0.9, 0.8]]))
    assert padded([])[0].shape == padded([])[1].shape == (0, 0)


def test_the_strip_is_small_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1000), "red").save(tmp_path / "a.png")
    store = make_store(tmp_path / "s.h5", ["a.png"], root=tmp_path)
    k, q = STRIP_HITS + 5, STRIP_QUERIES + 1
    strip = SearchResult(np.ones((q, k), np.float32), np.zeros((q, k), int), store)._repr_html_()
    assert strip.count("data:image/jpeg;base64,") == STRIP_QUERIES * STRIP_HITS and len(strip) < 64 << 10
    assert strip.count("and 5 more<") == STRIP_QUERIES and "and 1 more query<" in strip and "query 0<" in strip
    single = SearchResult(np.ones((1, 1), np.float32), np.zeros((1, 1), int), store, single=True)._repr_html_()
    assert "query" not in single and "more" not in single and "1.000" in single
    nothing = SearchResult(np.ones((1, 0), np.float32), np.zeros((1, 0), int), store)._repr_html_()
    assert "nothing found" in nothing


def test_the_strip_escapes_and_stays_in_its_cell(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    store = make_store(tmp_path / "s.h5", ['"><script>.png', "line\nbreak.png"], ["<b>", "<b>"], root=root)
    strip = SearchResult(np.ones((1, 2), np.float32), np.array([[0, 1]]), store)._repr_html_()
    assert "<script" not in strip and "<b>" not in strip and "&lt;b&gt;" in strip and "\n" not in strip
    assert strip.count("the file is missing") == 2
    # A style element or a class of ours would reach the rest of the notebook.
    assert not re.search(r"<style|<link|url\(|src=\"(?!data:)|href=|\son\w+=", strip)


def test_the_page_says_how_was_searched_and_where_nothing_was_found(found: SearchResult) -> None:
    queries = [("a.jpg", True), ("b.jpg", True)]
    assert "3 images, resnet18, 2 wide, cosine similarity, exact<" in search_page(found, queries)
    assert "2 wide, &lt;HNSW32&gt;<" in search_page(found, queries, facts="<HNSW32>")
    far = SearchResult(found.scores, np.full_like(found.rows, -1), found.store, metric="l2")
    page = search_page(far, queries)
    assert page.count("nothing found") == 2 and "2 wide, distance, exact<" in page and "nan" not in page
