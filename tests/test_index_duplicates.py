from __future__ import annotations

import csv
import inspect
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from embedkit import Backbone, EmbeddingSpec, SpecMismatchError, Store, StoreFormatError, extract
from embedkit.cli import main
from embedkit.index.duplicates.grouping import Forest
from embedkit.index.duplicates.groups import Duplicates, find_duplicates
from embedkit.index.duplicates.leaks import find_leaks
from embedkit.index.duplicates.page import duplicates_page
from embedkit.index.duplicates.removal import removable
from embedkit.index.duplicates.sketches import Sketch, plan, principal_axes, tiles
from embedkit.index.duplicates.thresholds import choose_threshold
from embedkit.index.exact import Gallery
from embedkit.store import StoreWriter


def make(path: Path, embeddings: Any, ids: Sequence[str] | None = None, backbone: str = "a", **columns: Any) -> Store:
    vectors = np.asarray(embeddings, dtype=np.float32)
    root = columns.pop("root", None)
    spec = EmbeddingSpec(backbone=backbone, weights_sha256="ab" * 32, dim=vectors.shape[1])
    with StoreWriter(path, spec, information={"root": str(root)} if root else None) as writer:
        writer.append(vectors, ids or [f"{row:06}.jpg" for row in range(len(vectors))], **columns)
        writer.finalise()
    return Store.open(path)


def clustered(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Vectors of many lengths along few directions, every tenth close to the one before it, and a few zeros."""
    random = np.random.default_rng(seed)
    spectrum = 0.9 ** np.arange(d)
    vectors = (random.standard_normal((n, d)) + 2 * random.standard_normal((8, d))[random.integers(0, 8, n)]) * spectrum
    copies = np.arange(10, n, 10)
    vectors[copies] = vectors[copies - 1] + 0.1 * random.standard_normal((len(copies), d)) * spectrum
    vectors *= random.uniform(0.01, 100, n)[:, None]
    vectors[[3, n // 2]] = 0
    return vectors.astype(np.float32)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    one, other = (np.asarray(vectors, dtype=np.float64) for vectors in (left, right))
    lengths = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)
    return np.divide(one @ other.T, lengths, out=np.zeros((len(one), len(other))), where=lengths > 0)


def groups_of(pairs: np.ndarray, n: int) -> list[list[int]]:
    """Groups that pairs connect, by the plain algorithm."""
    parents = list(range(n))

    def root(row: int) -> int:
        while parents[row] != row:
            row = parents[row]
        return row

    for left, right in pairs.tolist():
        parents[root(left)] = root(right)
    found: dict[int, list[int]] = {}
    for row in range(n):
        found.setdefault(root(row), []).append(row)
    return sorted(group for group in found.values() if len(group) > 1)


def rows_of(found: Duplicates) -> list[list[int]]:
    return sorted(sorted(group.rows.tolist()) for group in found)


@pytest.mark.parametrize("width", [8, 32, 96, None])
def test_no_pair_is_lost_by_its_bound(tmp_path: Path, width: int | None) -> None:
    vectors = clustered(3000, 96)
    gallery = Gallery(make(tmp_path / "s.h5", vectors))
    rows = np.arange(3000)
    axes = None if width is None else principal_axes(gallery, rows)[:, :width]
    wanted = {tuple(pair) for pair in np.argwhere(np.triu(cosines(vectors, vectors), 1) >= 0.95).tolist()}
    found, compared, survivors = set(), 0, 0
    for tile in tiles(Sketch(gallery, rows, axes), None, 0.95):
        assert (tile.left < tile.right).all()
        found |= set(zip(tile.left.tolist(), tile.right.tolist(), strict=True))
        compared, survivors = compared + tile.pairs, survivors + len(tile.left)
    assert len(wanted) > 200 and wanted <= found and len(found) == survivors
    assert survivors < compared / 10


def test_groups_are_those_of_brute_force(tmp_path: Path) -> None:
    vectors = clustered(5000, 80)
    store = make(tmp_path / "s.h5", vectors)
    gallery, rows = Gallery(store), np.arange(5000)
    assert plan(gallery, rows, gallery, rows, 0.96).seconds_per_pair > 0  # Not the short way of small stores.
    similar = np.triu(cosines(vectors, vectors), 1)
    value = 0.96
    while (np.abs(similar - value) < 1e-6).any():  # Where rounding decides nothing.
        value += 1e-5
    seen: list[tuple[int, int]] = []
    found = find_duplicates(store, threshold=value, progress=lambda done, total: seen.append((done, total)))
    assert rows_of(found) == groups_of(np.argwhere(similar >= value), 5000)
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)
    sizes = [len(group) for group in found]
    assert sizes == sorted(sizes, reverse=True)
    for group in found:
        np.testing.assert_allclose(group.similarities, cosines(vectors[group.rows], vectors[group.rows[:1]])[:, 0],
                                   atol=2e-6)  # fmt: skip


def test_a_forest_joins_as_the_plain_algorithm() -> None:
    random = np.random.default_rng(0)
    forest, everything = Forest(500), []
    for _ in range(6):
        pairs = random.integers(0, 500, (60, 2))
        forest.join(pairs[:, 0], pairs[:, 1])
        everything.append(pairs)
        roots = forest.roots(np.arange(500))
        groups = groups_of(np.concatenate(everything), 500)
        assert sorted(np.flatnonzero(roots == root).tolist() for root in np.unique(roots)
                      if (roots == root).sum() > 1) == groups  # fmt: skip
        assert all(roots[group[0]] == group[0] for group in groups)


def test_one_picture_many_times_is_one_group(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    one = random.standard_normal(16)
    same = make(tmp_path / "same.h5", np.tile(one, (20_000, 1)))
    (group,) = find_duplicates(same, threshold=0.97)
    assert len(group) == 20_000 and not group.exact[1:].any()
    rounded = make(tmp_path / "rounded.h5", one + 1e-6 * random.standard_normal((6000, 16)))
    (group,) = find_duplicates(rounded, threshold=0.97)
    assert len(group) == 6000
    leaks = find_leaks(same, rounded, threshold=0.97, most=2)
    assert len(leaks) == 40_000 and len(leaks.leaked) == 20_000


def test_only_known_hashes_make_exact_duplicates(tmp_path: Path) -> None:
    hashes = [bytes(32), bytes(32), b"\1" * 32, b"\1" * 32, b"\1" * 31 + b"\0"]
    store = make(tmp_path / "s.h5", np.eye(5), content_sha256=hashes)
    (group,) = find_duplicates(store, threshold=0.97)
    assert group.rows.tolist() == [2, 3] and group.exact.all() and group.similarities.tolist() == [1, 0]
    assert find_duplicates(store, threshold=0.97).superfluous.tolist() == [3]
    assert len(find_duplicates(make(tmp_path / "zeros.h5", np.zeros((4, 3))), threshold=0.5)) == 0


def test_the_largest_file_is_kept_then_the_oldest_then_the_first(tmp_path: Path) -> None:
    store = make(
        tmp_path / "s.h5", np.repeat(np.eye(3), 3, axis=0),
        sizes=[1, 3, 2, 5, 5, 5, 7, 7, 7], mtimes_ns=[1, 2, 3, 9, 8, 9, 4, 4, 4],
    )  # fmt: skip
    assert [group.rows.tolist() for group in find_duplicates(store)] == [[1, 2, 0], [4, 3, 5], [6, 7, 8]]


def test_labels_that_disagree_are_told(tmp_path: Path) -> None:
    vectors = [[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]
    store = make(tmp_path / "s.h5", vectors, labels=["rose", "tulip", "rose", "rose", None])
    assert [group.labels for group in find_duplicates(store)] == [["rose"], ["rose", "tulip"]]
    assert [member.label for member in find_duplicates(store)[0]] == ["rose", "rose", None]
    with pytest.raises(IndexError, match="group 2 of 2"):
        find_duplicates(store)[2]


@pytest.mark.parametrize("n", [0, 1])
def test_stores_with_next_to_nothing(tmp_path: Path, n: int) -> None:
    few, more = make(tmp_path / "few.h5", np.ones((n, 3))), make(tmp_path / "more.h5", np.ones((2, 3)))
    assert len(find_duplicates(few)) == 0 and len(find_duplicates(few).superfluous) == 0
    assert find_leaks(few, more).right_rows.tolist() == [0, 1] * n
    assert find_leaks(more, few).left_rows.tolist() == [0, 1] * n


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_what_is_no_similarity_is_refused(tmp_path: Path, threshold: float) -> None:
    store = make(tmp_path / "s.h5", np.eye(2))
    for find in (lambda: find_duplicates(store, threshold=threshold),
                 lambda: find_leaks(store, store, threshold=threshold)):  # fmt: skip
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            find()


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    store = make(tmp_path / "s.h5", np.full((4, 3), np.finfo(np.float32).max))
    with pytest.raises(StoreFormatError, match="not finite"):
        find_duplicates(store)


@pytest.mark.parametrize("dimension", [4, 16])
def test_the_threshold_lies_between_copies_and_neighbours(tmp_path: Path, dimension: int) -> None:
    random = np.random.default_rng(0)
    points = np.c_[random.standard_normal((4000, dimension)), np.ones(4000)]
    points /= np.linalg.norm(points, axis=1)[:, None]
    clean = choose_threshold(Gallery(make(tmp_path / "clean.h5", points)))
    assert clean.chosen and clean.above <= 5 and clean.dimension == pytest.approx(dimension, rel=0.25)
    copies = points[:400] + 1e-3 * random.standard_normal((400, dimension + 1))
    store = make(tmp_path / "copied.h5", np.concatenate([points, copies]))
    copied = choose_threshold(Gallery(store))
    assert copied.value == pytest.approx(clean.value, abs=0.25 * (1 - clean.value))  # Copies hardly move it.
    found = find_duplicates(store)
    roots = {row: number for number, group in enumerate(found) for row in group.rows.tolist()}
    together = [row in roots and roots.get(row) == roots.get(4000 + row) for row in range(400)]
    assert np.mean(together) > 0.97 and len(found.rows) < 2 * 400 + 40
    assert str(found.threshold).startswith(f"threshold {found.threshold.value:.4f}, chosen from 1,000 rows: ")


def test_too_little_to_choose_from_gives_the_default(tmp_path: Path) -> None:
    few = choose_threshold(Gallery(make(tmp_path / "few.h5", np.random.default_rng(0).standard_normal((150, 8)))))
    alike = choose_threshold(Gallery(make(tmp_path / "alike.h5", np.ones((500, 8)))))
    assert (few.value, few.chosen, alike.value, alike.chosen) == (0.97, False, 0.97, False)
    assert "150 rows: too few" in str(few)


def test_leaks_are_those_of_brute_force(tmp_path: Path) -> None:
    left, right = clustered(4500, 64, seed=1), clustered(4000, 64, seed=2)
    right[100:200] = left[300:400] * 3 + np.float32(0.001)
    right[200:230] = left[7]
    left[[5, 6]] = left[7]
    similar = cosines(left, right)
    one, other = make(tmp_path / "left.h5", left), make(tmp_path / "right.h5", right)
    leaks = find_leaks(one, other, threshold=0.95, most=4000)
    pairs = set(zip(leaks.left_rows.tolist(), leaks.right_rows.tolist(), strict=True))
    assert {tuple(pair) for pair in np.argwhere(similar >= 0.95 + 1e-6).tolist()} <= pairs
    assert pairs <= {tuple(pair) for pair in np.argwhere(similar >= 0.95 - 1e-6).tolist()}
    np.testing.assert_allclose(leaks.scores, similar[leaks.left_rows, leaks.right_rows], atol=2e-6)
    few = find_leaks(one, other, threshold=0.95, most=3)
    assert few.leaked.tolist() == leaks.leaked.tolist() and np.bincount(few.left_rows).max() == 3
    for row in (5, 7, 300):
        best = np.sort(similar[row])[::-1][: (few.left_rows == row).sum()]
        np.testing.assert_allclose(few.scores[few.left_rows == row], best, atol=2e-6)


def test_leaks_by_content_come_first_and_stores_must_agree(tmp_path: Path) -> None:
    hashes = [bytes([number]) * 32 for number in range(6)]
    left = make(tmp_path / "l.h5", [[1, 0], [0, 1], [1, 1]], content_sha256=[hashes[1], hashes[2], hashes[0]])
    right = make(tmp_path / "r.h5", [[1, 0], [-1, 0], [1, 1]], content_sha256=[hashes[3], hashes[1], hashes[0]])
    leaks = find_leaks(left, right, threshold=0.99)
    assert leaks.left_rows.tolist() == [0, 0, 2] and leaks.right_rows.tolist() == [1, 0, 2]
    assert leaks.exact.tolist() == [True, False, False] and leaks.scores[:2].tolist() == [-1, 1]
    assert find_leaks(left, right, threshold=0.99, most=1).right_rows.tolist() == [1, 2]
    with pytest.raises(SpecMismatchError, match="must not be compared"):
        find_leaks(left, make(tmp_path / "o.h5", np.eye(2), backbone="b"))
    with pytest.raises(ValueError, match="most"):
        find_leaks(left, right, most=0)


@pytest.fixture
def world(photos: Path, tmp_path: Path) -> Path:
    """Photos with a copy, a larger copy of another one, and a copy under another class."""
    folder = tmp_path / "world"
    shutil.copytree(photos, folder)
    shutil.copyfile(folder / "cat" / "1.jpg", folder / "cat" / "copy.jpg")
    shutil.copyfile(folder / "dog" / "2.jpg", folder / "cat" / "dog.jpg")
    os.utime(folder / "cat" / "copy.jpg", (2**31, 2**31))
    Image.open(folder / "dog" / "5.jpg").save(folder / "dog" / "large.jpg", quality=99, subsampling=0)
    return folder


@pytest.fixture
def store(world: Path, tiny_backbone: Path, tmp_path: Path) -> Store:
    return extract(world, tmp_path / "world.h5", Backbone.load(tiny_backbone))


def test_boxes_of_one_image_are_not_one_another(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    table = tmp_path / "boxes.csv"
    boxes = ["cat/1.jpg,0,0,40,40", "cat/1.jpg,50,30,90,70", "cat/1.jpg,0,0,90,70", "copy.jpg,0,0,40,40"]
    table.write_text("path,x1,y1,x2,y2\n" + "\n".join(boxes) + "\n")
    shutil.copytree(photos / "cat", tmp_path / "cat")
    shutil.copyfile(photos / "cat" / "1.jpg", tmp_path / "copy.jpg")
    found = find_duplicates(extract(table, tmp_path / "s.h5", Backbone.load(tiny_backbone)), threshold=1.0)
    (group,) = found
    assert [member.id for member in group] == ["cat/1.jpg#xywh=0,0,40,40", "copy.jpg#xywh=0,0,40,40"]
    assert group.exact.all() and [member.path for member in group] == [
        tmp_path / "cat" / "1.jpg",
        tmp_path / "copy.jpg",
    ]
    assert removable(found).paths == [] and removable(found).parts == 1  # A file has more than its box.


def test_only_files_that_are_what_the_store_knows_can_go(world: Path, store: Store) -> None:
    found = find_duplicates(store, threshold=1.0)
    by_id = {store.ids[row] for row in found.superfluous}
    assert {"cat/copy.jpg"} <= by_id and "cat/1.jpg" not in by_id
    assert world / "cat" / "copy.jpg" in removable(found).paths
    (world / "cat" / "copy.jpg").write_bytes(b"something else")
    assert world / "cat" / "copy.jpg" not in removable(found).paths and removable(found).changed == 1
    (world / "cat" / "copy.jpg").unlink()
    assert removable(found).parts == 1 and (world / "cat" / "1.jpg").exists()


def test_the_file_to_keep_never_goes_by_another_name(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.jpg").symlink_to(root / "b.jpg")
    (root / "b.jpg").write_bytes(b"pixels")
    (root / "c\nd.jpg").write_bytes(b"pixels")
    (root / "e.jpg").write_bytes(b"pixels")
    ids = ["a.jpg", "b.jpg", "c\nd.jpg", "e.jpg"]
    times = [(root / id).stat().st_mtime_ns for id in ids]
    store = make(tmp_path / "s.h5", np.ones((4, 2)), ids, sizes=[6] * 4, mtimes_ns=times, root=root)
    removal = removable(find_duplicates(store, threshold=0.97))
    kept = find_duplicates(store, threshold=0.97)[0][0].id
    assert kept == "a.jpg" and removal.paths == [root / "e.jpg"]
    assert (removal.kept, removal.unprintable, removal.parts, removal.changed) == (1, 1, 0, 0)
    removal = removable(find_leaks(store, store, threshold=0.97))
    assert (removal.paths, removal.kept) == ([], 4)


def test_what_is_like_a_duplicate_only_stays(tmp_path: Path) -> None:
    angles = np.radians([0, 10, 20])
    store = make(tmp_path / "s.h5", np.c_[np.cos(angles), np.sin(angles)], sizes=[3, 2, 1])
    found = find_duplicates(store, threshold=float(np.cos(np.radians(11))))
    assert found[0].rows.tolist() == [0, 1, 2] and found.superfluous.tolist() == [1]


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(part) for part in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_dedupe_prints_groups_in_every_form(world: Path, store: Store, tmp_path: Path) -> None:
    arguments = ["dedupe", store.path, "--threshold", "1.0"]
    table = run(*arguments)
    assert "labels disagree: cat, dog" in table.stdout and "keep" in table.stdout and "exact" in table.stdout
    assert "threshold 1.0000" in table.stderr and "2 groups of 4 images, 2 of which can go" in table.stderr
    groups = [json.loads(line) for line in run(*arguments, "--json").stdout.splitlines()]
    assert [(group["keep"], group["labels_disagree"]) for group in groups] == [
        ("cat/1.jpg", False), (groups[1]["keep"], True),
    ]  # fmt: skip
    assert groups[0]["members"][1] == {
        "id": "cat/copy.jpg", "label": "cat", "similarity": 1.0, "exact": True,
        "bytes": (world / "cat" / "copy.jpg").stat().st_size, "path": str(world / "cat" / "copy.jpg"),
    }  # fmt: skip
    lines = list(csv.DictReader(io.StringIO(run(*arguments, "--csv").stdout)))
    assert list(lines[0]) == ["id", "group", "keep", "similarity", "exact", "path", "bytes"]
    assert [(line["id"], line["group"], line["keep"]) for line in lines[:2]] == [
        ("cat/1.jpg", "0", "true"), ("cat/copy.jpg", "0", "false"),
    ]  # fmt: skip
    before = sorted(world.rglob("*"))
    paths = run(*arguments, "--plain").stdout.splitlines()
    assert str(world / "cat" / "copy.jpg") in paths and len(paths) == 2 and sorted(world.rglob("*")) == before
    run(*arguments, "--json", "--csv", code=2)
    (option,) = (option for option in main.commands["dedupe"].params if option.name == "threshold")
    assert option.default == inspect.signature(find_duplicates).parameters["threshold"].default
    assert "neither auto nor a similarity" in run("dedupe", store.path, "--threshold", "97", code=2).output


def test_dedupe_against_another_store(world: Path, store: Store, tiny_backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copyfile(world / "cat" / "3.jpg", tmp_path / "other" / "three.jpg")
    other = extract(tmp_path / "other", tmp_path / "other.h5", Backbone.load(tiny_backbone))
    arguments = ["dedupe", store.path, "--against", other.path, "--threshold", "1.0"]
    found = run(*arguments)
    assert found.stdout.split() == ["cat/3.jpg", "exact", "three.jpg"]
    assert (
        "1 of the 27 images of world.h5 have duplicates or near ones in other.h5, 1 of them exact ones" in found.stderr
    )
    (line,) = (json.loads(line) for line in run(*arguments, "--json").stdout.splitlines())
    assert line["id"] == "cat/3.jpg" and line["other"]["id"] == "three.jpg" and line["other"]["exact"]
    (row,) = csv.DictReader(io.StringIO(run(*arguments, "--csv").stdout))
    assert (row["id"], row["other"], row["exact"]) == ("cat/3.jpg", "three.jpg", "true")
    assert run(*arguments, "--plain").stdout.splitlines() == [str(world / "cat" / "3.jpg")]
    page = tmp_path / "page.html"
    run(*arguments, "--html", page)
    assert (
        page.read_text().count("<img ") == 2
        and "1 image of world.h5 has duplicates or near ones in other.h5" in page.read_text()
    )


def test_the_page_is_bounded_and_holds_everything(store: Store, tmp_path: Path) -> None:
    page = duplicates_page(find_duplicates(store, threshold=1.0))
    assert page.count("<section>") == 2 and page.count('src="data:image/jpeg;base64,') == 4
    assert page.count('class="keep"') == 2 and "labels disagree: cat, dog" in page
    assert "http" not in page and "<script" not in page
    assert "1 more, which this page leaves out" in duplicates_page(find_duplicates(store, threshold=1.0), groups=1)
    names = ["<script>.jpg", "\x1b[2J.jpg", "z.jpg"]
    hostile = duplicates_page(find_duplicates(make(tmp_path / "h.h5", np.ones((3, 2)), names)), members=2)
    assert "<script" not in hostile and "\x1b" not in hostile and "and 1 more" in hostile
    assert hostile.count("no file is known") == 2


def test_altered_photographs_are_found_again(flowers: Path, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flowers"
    chosen = sorted(flowers.glob("*/*.jpg"))[::15]
    for number, path in enumerate(chosen):
        target = folder / path.relative_to(flowers)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        if number % 5 == 0:
            image = Image.open(path)
            small = image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.LANCZOS)
            small.save(target.with_name(f"{target.stem}_again.jpg"), quality=85)
    store = extract(folder, tmp_path / "s.h5", Backbone.load(weights / "regnetx_002.pycls_in1k.json"))
    found = find_duplicates(store)
    assert found.threshold.chosen
    together = {member.id for group in found for member in group}
    again = [id for id in store.ids if "_again" in id]
    assert sum(id in together for id in again) >= 0.85 * len(again) > 40
    assert len(found.rows) <= 2 * len(again) + 10


def test_what_was_found_says_in_a_line_what_it_is_and_compares_as_an_object(tmp_path: Path) -> None:
    store = make(tmp_path / "s.h5", [[1, 0], [0, 2], [1, 0.1]], ["a.jpg", "b.jpg", "c.jpg"])
    found = find_duplicates(store, threshold=0.97)
    assert repr(found) == f"<Duplicates in {store.path}: 1 group of 2 images, threshold 0.9700>"
    assert repr(found[0]) == f"<Group of 2 images of {store.path}, to keep: 'a.jpg'>"
    assert found[0] != found[0] and hash(found)  # Arrays have no one truth, and no hash.
    leaks = find_leaks(store, store, threshold=0.97)
    assert repr(leaks) == f"<Leaks of {store.path} in {store.path}: 3 images in 5 pairs, threshold 0.9700>"


def test_a_threshold_that_cannot_be_chosen_says_why(tmp_path: Path) -> None:
    few = find_duplicates(make(tmp_path / "few.h5", [[1, 0]]))
    assert str(few.threshold) == "threshold 0.9700 (1 row: too few, or too much alike, to choose it from)"
    alike = find_duplicates(make(tmp_path / "alike.h5", np.ones((300, 2))))
    assert str(alike.threshold) == "threshold 0.9700 (300 rows: too few, or too much alike, to choose it from)"
