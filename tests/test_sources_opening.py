"""Every kind of source, by what it looks like."""

from __future__ import annotations

import csv
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import embedkit as ek
from embedkit import Backbone, ImageError, list_images
from embedkit.index import image_path
from embedkit.sources import Listing


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return Backbone.load(tiny_backbone)


def ids(listing: Listing) -> list[str]:
    return [file.id for file in listing.files]


def make_tar(root: Path, target: Path, mode: str = "w") -> Path:
    with tarfile.open(target, mode) as archive:  # type: ignore[call-overload]
        for path in sorted(root.rglob("*.*"), reverse=True):
            archive.add(path, path.relative_to(root).as_posix())
    return target


def make_zip(root: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(root.rglob("*.*"), reverse=True):
            archive.write(path, path.relative_to(root).as_posix())
    return target


def make_table(root: Path, target: Path) -> Path:
    shutil.copytree(root, target.parent, dirs_exist_ok=True)
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for path in sorted(root.rglob("*.*"), reverse=True):
            name = path.relative_to(root).as_posix()
            writer.writerow([name, name.partition("/")[0]])
    return target


SOURCES: dict[str, Callable[[Path, Path], Path]] = {
    "tar": lambda root, folder: make_tar(root, folder / "x.tar"),
    "tgz": lambda root, folder: make_tar(root, folder / "x.tgz", "w:gz"),
    "zip": lambda root, folder: make_zip(root, folder / "x.zip"),
    "table": lambda root, folder: make_table(root, folder / "x.csv"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_store_does_not_depend_on_the_kind_of_source(
    photos: Path, backbone: Backbone, tmp_path: Path, kind: str
) -> None:
    source = SOURCES[kind](photos, tmp_path)
    expected = ek.extract(photos, tmp_path / "a.h5", backbone)
    found = ek.extract(source, tmp_path / "b.h5", backbone)
    assert found.content_id == expected.content_id and found.ids == expected.ids and found.failures == []
    changes: list[object] = []
    ek.extract(source, tmp_path / "b.h5", backbone, progress=lambda progress: changes.append(progress.changes))
    assert changes[-1] == ek.store.Changes(unchanged=24)


def test_shards_are_sources_of_their_own(photos: Path, tmp_path: Path) -> None:
    for number, label in enumerate(("cat", "dog")):
        make_tar(photos / label, tmp_path / f"part-{number:03}.tar")
    listing = list_images(tmp_path / "part-{000..001}.tar")
    assert ids(listing) == [
        f"part-{number:03}/{file.name}"
        for number, label in enumerate(("cat", "dog"))
        for file in sorted((photos / label).iterdir())
    ]
    assert listing.sources == {f"part-00{number}": tmp_path / f"part-00{number}.tar" for number in range(2)}
    one = list_images(tmp_path / "part-{000..000}.tar")
    assert set(ids(one)) < set(ids(listing))  # Another shard may come, and changes no id.


def test_a_list_of_files_stands_alone(photos: Path, tmp_path: Path) -> None:
    names = sorted(photos.glob("cat/*"))
    (tmp_path / "list").write_text("".join(f"{name}\n" for name in names))
    assert ids(list_images(files_from=tmp_path / "list")) == [name.name for name in names]
    with pytest.raises(ImageError, match="not both"):
        list_images(photos, files_from=tmp_path / "list")
    with pytest.raises(ImageError, match="none is named; name a folder, an archive, a table or a URL"):
        list_images()
    (tmp_path / "list").write_text(f"{names[0]}\n")
    assert ids(list_images(files_from=tmp_path / "list", root=photos)) == [f"cat/{names[0].name}"]
    assert ids(list_images(names[0], root=photos)) == [f"cat/{names[0].name}"]


def test_boxes_of_a_table_are_embedded_each(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    name = next(path.name for path in sorted(photos.glob("cat/*.jpg")))
    with Image.open(photos / "cat" / name) as image:
        pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    boxes = [(0, 0, width // 2, height), (width // 2, 0, width, height)]
    rows = "".join(f'{name},"[{box[0]}, {box[1]}, {box[2]}, {box[3]}]"\n' for box in boxes)
    (tmp_path / "boxes.csv").write_text(f"path,box\n{rows}")
    store = ek.extract(list_images(tmp_path / "boxes.csv", root=photos / "cat"), tmp_path / "s.h5", backbone)
    assert store.ids == sorted(f"{name}#xywh={box[0]},{box[1]},{box[2] - box[0]},{box[3] - box[1]}" for box in boxes)
    for box in boxes:
        id = f"{name}#xywh={box[0]},{box[1]},{box[2] - box[0]},{box[3] - box[1]}"
        part = np.ascontiguousarray(pixels[box[1] : box[3], box[0] : box[2]])
        np.testing.assert_allclose(store.embeddings[store.index_of(id)], backbone.embed(part), atol=1e-5)
    assert len(np.unique(store.content_sha256, axis=0)) == 2  # Two boxes of one file are no copies.


def test_python_has_images_too(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    arrays = [np.full((70, 80, 3), shade, dtype=np.uint8) for shade in range(0, 250, 25)]
    store = ek.extract(arrays, tmp_path / "a.h5", backbone)
    assert store.ids == [f"{number:08}" for number in range(10)] and store.root is not None
    np.testing.assert_allclose(store.embeddings[3], backbone.embed(arrays[3]), atol=1e-5)
    named = ek.extract({"x/1": arrays[0], "x/2": arrays[5]}, tmp_path / "b.h5", backbone)
    assert named.ids == ["x/1", "x/2"]
    again = ek.extract(iter(arrays), tmp_path / "a.h5", backbone)
    assert again.content_id == store.content_id


def test_a_decoder_that_takes_too_long_costs_one_image(photos: Path, backbone: Backbone, tmp_path: Path) -> None:
    with backbone.isolated(seconds=60) as careful:
        assert careful.time_limit == 60 and backbone.time_limit is None
        found = ek.extract(photos, tmp_path / "a.h5", careful)
    assert found.content_id == ek.extract(photos, tmp_path / "b.h5", backbone).content_id
    with backbone.isolated(seconds=1e-9) as hasty, pytest.raises(ImageError, match="none of its 24 images") as caught:
        ek.extract(photos, tmp_path / "c.h5", hasty)
    assert caught.value.kind == "timeout"


def test_a_video_needs_a_rate_and_a_folder_leaves_videos_out(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(ImageError, match="--fps 1") as caught:
        list_images(tmp_path / "clip.mp4")
    assert caught.value.kind == "unsupported"
    shutil.copytree(photos, tmp_path / "p")
    (tmp_path / "p" / "cat" / "clip.mp4").write_bytes(b"no video")
    assert list_images(tmp_path / "p").failures == []
    pytest.importorskip("av")
    assert [failure.id for failure in list_images(tmp_path / "p", fps=1).failures] == ["cat/clip.mp4"]


@pytest.mark.parametrize("fps", ["abc", 0, "1e999999999"])
def test_a_rate_that_is_none_is_refused_before_anything_is_looked_at(photos: Path, fps: str | int) -> None:
    for sources in ([photos], [photos, f"x={photos}"]):
        with pytest.raises(ImageError, match=f"--fps {fps}: fps is a number above 0"):
            list_images(*sources, fps=fps)


def test_a_folder_says_what_else_is_in_it(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="embedkit")
    folder = tmp_path / "p"
    folder.mkdir()
    for names, hint in [
        (["a.mp4"], "it holds 1 video: --fps 1 takes frames"),
        (["b.MOV"], "it holds 2 videos: --fps 1 takes frames"),
        (["b.tar", "a.zip"], f"it holds 2 archives: name them, such as '{folder}/a.zip'"),
        (["a.csv"], f"it holds 1 table: name it, such as '{folder}/a.csv'"),
    ]:
        for name in names:
            (folder / name).touch()
        with pytest.raises(ImageError, match=r"no images in it \(\d other files\); .*images are called") as caught:
            list_images(folder)
        assert f"; {hint};" in caught.value.reason
    assert caplog.messages == []
    (folder / "a.jpg").touch()
    assert ids(list_images(folder)) == ["a.jpg"]
    assert caplog.messages == [f"{folder}: 2 videos are left out; --fps 1 takes frames"]


def test_failures_among_videos_are_told_too(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    folder = shutil.copytree(photos, tmp_path / "p")
    (folder / "cat" / "broken.mp4").symlink_to("nowhere")
    (folder / "cat" / "broken.jpg").symlink_to("nowhere")
    (folder / "cat" / "out.mp4").symlink_to("/etc/passwd")
    (folder / "cat" / "text.mp4").write_text("no video")
    assert [failure.id for failure in list_images(folder).failures] == ["cat/broken.jpg"]
    listing = list_images(folder, fps=1)
    assert [(failure.id, failure.kind) for failure in listing.failures] == [
        ("cat/broken.jpg", "missing"), ("cat/broken.mp4", "missing"), ("cat/out.mp4", "refused"),
        ("cat/text.mp4", "not-an-image"),
    ]  # fmt: skip
    assert len(listing.files) == 24 and listing.classes == ["cat", "dog"]
    for path in folder.rglob("*.jpg"):
        path.unlink()
    assert [failure.id for failure in list_images(folder, fps=1).failures] == [
        "cat/broken.mp4", "cat/out.mp4", "cat/text.mp4"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "use"),
    [
        ({"columns": {"path": "x"}}, "--columns applies to tables"),
        ({"box_format": "xyxy"}, "--box-format applies to tables"),
        ({"split": "train"}, "--split applies to tables and datasets"),
        ({"root": "."}, "--root applies to tables and lists of files"),
    ],
)
def test_what_applies_to_no_source_is_refused(photos: Path, tmp_path: Path, option: dict[str, Any], use: str) -> None:
    archive = make_tar(photos, tmp_path / "x.tar")
    with pytest.raises(ImageError, match=f"{photos}: {use}, and this is a folder") as caught:
        list_images(photos, **option)
    assert caught.value.kind == "refused"
    with pytest.raises(ImageError, match=f"the sources: {use}, and none of the sources is one"):
        list_images(photos, archive, **option)
    with pytest.raises(
        ImageError, match=r"x\.tar: --fps applies to videos and folders of them, and this is an archive"
    ):
        list_images(archive, fps=1)
    (tmp_path / "list").write_text("/d/1.jpg\n")
    if "root" not in option:
        for arguments in ({"files_from": tmp_path / "list"}, {"sources": [photos / "cat" / "1.jpg"]}):
            with pytest.raises(ImageError, match=f"{use}, and this is a list of image files"):
                list_images(*arguments.pop("sources", []), **arguments, **option)
    table = make_table(photos, tmp_path / "t" / "x.csv")
    with pytest.raises(ImageError, match="--fps applies"):
        list_images(table, fps=1)
    if "root" in option:  # It is for one of them.
        assert len(list_images(table, archive, root=photos).files) == 48


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such file or folder"),
        ("missing.jpg", "no such file or folder"),
        ("missing.md", "no such file or folder"),
        ("missing.tar", "no such file"),
        ("missing.csv", "no such file"),
        ("missing.mp4", "no such file"),
        ("x.tar/missing", "no such file or folder"),
        ("a\0b", "no such file or folder"),
        ("notes.txt", "is a file, but no archive, table, video or image by its name, such as .tar"),
        ("a.h5", "is a file, but no archive, table, video or image by its name, such as .tar"),
        ("x.tar", "no tar or zip archive"),
    ],
)
def test_a_source_that_is_none_is_named(tmp_path: Path, name: str, reason: str) -> None:
    for file in ("notes.txt", "a.h5", "x.tar"):
        (tmp_path / file).write_text("no images")
    source = f"{tmp_path}/{name}"
    with pytest.raises(ImageError) as caught:
        list_images(source)
    assert caught.value.id == source and caught.value.reason.startswith(reason)
    assert (caught.value.reason == "no such file") == (reason == "no such file")


def test_a_missing_shard_is_named_with_its_pattern_before_any_is_read(photos: Path, tmp_path: Path) -> None:
    make_tar(photos, tmp_path / "part-000.tar")
    (tmp_path / "part-001.tar").write_text("no archive")
    for prefix in ("", "x="):
        with pytest.raises(ImageError) as caught:
            list_images(f"{prefix}{tmp_path}/part-{{000..003}}.tar")
        assert caught.value.id == f"{tmp_path}/part-002.tar"
        assert caught.value.reason == (
            f"no such file; it is one of the 4 names that '{tmp_path}/part-{{000..003}}.tar' stands for; "
            "narrow that to those that are there"
        )


def test_images_named_by_a_pattern_are_a_list(photos: Path) -> None:
    assert ids(list_images(photos / "cat" / "{1,2}.jpg")) == ["1.jpg", "2.jpg"]


def test_another_photograph_is_never_shown_for_the_one_that_was_embedded(
    photos: Path, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "swap.csv").write_text("path,id\ncat/1.jpg,dog/1.jpg\n")
    listing = list_images(tmp_path / "swap.csv", root=photos)
    store = ek.extract(listing, tmp_path / "s.h5", backbone)
    assert store.ids == ["dog/1.jpg"] and image_path(store, "dog/1.jpg") is None
    (tmp_path / "plain.csv").write_text("path\ncat/1.jpg\n")
    both = list_images(f"a={tmp_path / 'swap.csv'}", f"b={photos}", root=photos)
    joined = ek.extract(both, tmp_path / "t.h5", backbone)
    assert image_path(joined, "a/dog/1.jpg") is None
    assert image_path(joined, "b/dog/1.jpg") == photos / "dog" / "1.jpg"
    plain = ek.extract(list_images(tmp_path / "plain.csv", root=photos), tmp_path / "u.h5", backbone)
    assert image_path(plain, "cat/1.jpg") == photos / "cat" / "1.jpg"
