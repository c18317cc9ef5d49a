"""Predicting: a head sees what it was fitted to or nothing, every image gets a line, and nothing is lost."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.linear_model import Ridge
from sklearn.multioutput import MultiOutputClassifier
from sklearn.svm import LinearSVC

from embedkit import Backbone, EvaluationError, SpecMismatchError, Store, extract
from embedkit.cli import main
from embedkit.evaluation.fitted import FittedHead
from embedkit.evaluation.predicting import predict
from embedkit.heads import WeightedKNN, logistic_regression
from embedkit.sources import Listing


@pytest.fixture(scope="module")
def store(photos: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    backbone = Backbone.load(tiny_backbone, device="cpu")
    return extract(photos, tmp_path_factory.mktemp("store") / "photos.h5", backbone, layers=["max"])


def names_of(store: Store) -> Any:
    assert store.labels is not None
    return np.array(store.classes)[store.labels]


def fitted(store: Store, estimator: Any = None, y: Any = None, task: str = "class") -> FittedHead:
    names = names_of(store) if y is None else y
    estimator = (estimator or logistic_regression(0.01)).fit(store.load(), names)
    classes = [] if task == "regression" else store.classes
    return FittedHead(estimator, classes, store.spec, task, {"recipe": store.recipe})


@pytest.fixture
def pictures(photos: Path, tmp_path: Path) -> Path:
    """The photos with two files among them that are no pictures, and one with an odd name."""
    folder = tmp_path / "pictures"
    shutil.copytree(photos, folder)
    (folder / "cat" / "10x.jpg").write_bytes(b"no picture")
    (folder / "dog" / "99.jpg").touch()
    shutil.copy(folder / "dog" / "1.jpg", os.fsencode(folder / "dog") + b"/odd \xff,\n.jpg")
    return folder


def test_predictions_of_images_are_those_of_their_embeddings(store: Store, photos: Path) -> None:
    head = fitted(store)
    found = predict(head, photos, device="cpu", top=2)
    predictions = list(found)
    assert [one.id for one in predictions] == store.ids
    expected = head.estimator.predict_proba(store.load())
    scores = [dict(zip(one.labels, one.scores, strict=True)) for one in predictions]
    np.testing.assert_allclose([[one["cat"], one["dog"]] for one in scores], expected, atol=1e-5)
    assert [one.labels[0] for one in predictions] == head.predict(store.load()).tolist()
    assert all(one.scores[0] >= one.scores[1] for one in predictions)
    assert (found.score, found.classes, len(found), found.failures) == ("probability", ["cat", "dog"], 24, [])


def test_images_that_cannot_be_read_stand_in_their_place_with_a_reason(store: Store, pictures: Path) -> None:
    found = predict(fitted(store), pictures, device="cpu")
    for _ in range(2):  # Every iteration is a new one.
        predictions = list(found)
        assert [one.id for one in predictions] == sorted((one.id for one in predictions), key=os.fsencode)
        failed = {one.id: one.error.kind for one in predictions if one.error is not None}
        assert failed == {"cat/10x.jpg": "not-an-image", "dog/99.jpg": "empty"}
        assert {one.id for one in found.failures} == failed.keys()
        assert len(predictions) == len(found) == 27


def test_no_option_is_advised_that_predict_lacks(store: Store, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes((photos / "cat" / "1.jpg").read_bytes()[:400])
    (one,) = predict(fitted(store), tmp_path, device="cpu")
    assert one.error is not None and one.error.kind == "truncated"
    assert one.error.reason.startswith("its end is missing (") and "--truncated" not in one.error.reason


def test_a_store_gives_what_its_images_give_and_its_failures_too(store: Store, pictures: Path, tmp_path: Path) -> None:
    head, backbone = fitted(store), Backbone.reload(store.spec, store.recipe, device="cpu")
    made = extract(pictures, tmp_path / "pictures.h5", backbone)
    of_store, of_images = (list(predict(head, source, backbone=backbone)) for source in (made.path, pictures))
    assert [(one.id, one.labels) for one in of_store] == [(one.id, one.labels) for one in of_images]
    assert [one.error is None for one in of_store] == [one.error is None for one in of_images]


def test_a_layer_of_a_store_is_found_by_its_spec(store: Store) -> None:
    layer = Store.open(store.path, layer="max")
    head = fitted(layer)
    predicted = [one.labels[0] for one in predict(head, store)]
    assert predicted == head.predict(layer.load()).tolist()


def test_other_preprocessing_and_other_weights_are_refused_by_their_fields(
    store: Store, photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    head = fitted(store)
    other = Backbone.load(tiny_backbone, crop_pct=1.0, device="cpu")
    with pytest.raises(SpecMismatchError, match="cannot predict") as caught:
        predict(head, photos, backbone=other)
    assert caught.value.differences == {"preprocessing.crop_pct": (0.9, 1.0)}
    made = extract(photos, tmp_path / "other.h5", other)
    with pytest.raises(SpecMismatchError, match=r"preprocessing\.crop_pct: 0\.9 != 1\.0"):
        predict(head, made.path)
    weights = {
        name: tensor + 0.1 * torch.ones_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(tiny_backbone.with_suffix(".safetensors")).items()
    }
    save_file(weights, tmp_path / "tiny.safetensors")
    shutil.copy(tiny_backbone, tmp_path / "tiny.json")
    with pytest.raises(SpecMismatchError, match=r"not the backbone that the head was fitted to.*\n  weights_sha256"):
        predict(head, photos, model=tmp_path / "tiny.json", device="cpu")


def test_memory_is_bounded_images_are_read_as_they_are_asked_for(store: Store, photos: Path) -> None:
    data = (photos / "cat" / "1.jpg").read_bytes()

    class Counted:
        reads = 0

        def __init__(self, number: int) -> None:
            self.id, self.label = f"{number:05}.jpg", None

        def status(self) -> tuple[int, int]:
            return len(data), 0

        def read(self) -> bytes:
            Counted.reads += 1
            return data

    listing = Listing("memory", [Counted(number) for number in range(3000)], [], [], 0)
    predictions: Iterator[Any] = iter(predict(fitted(store), listing, device="cpu"))
    assert [one.id for one in itertools.islice(predictions, 2)] == ["00000.jpg", "00001.jpg"]
    predictions.close()  # type: ignore[attr-defined]
    assert Counted.reads < 1500


def test_top_is_at_most_the_number_of_classes_and_at_least_one(store: Store) -> None:
    assert predict(fitted(store), store, top=7).top == 2
    with pytest.raises(ValueError, match="top must be at least 1"):
        predict(fitted(store), store, top=0)


def test_a_head_without_probabilities_gives_scores(store: Store) -> None:
    found = predict(fitted(store, LinearSVC()), store)
    assert found.score == "score"
    assert [one.labels[0] for one in found] == names_of(store).tolist()
    assert all(one.scores[0] > 0 for one in found)


def test_classes_may_be_codes(store: Store) -> None:
    assert [one.labels[0] for one in predict(fitted(store, y=store.labels), store)] == names_of(store).tolist()


def test_several_labels_and_numbers(store: Store, tmp_path: Path) -> None:
    both = np.stack([names_of(store) == "cat", names_of(store) == "dog"], axis=1).astype(int)
    several = fitted(store, MultiOutputClassifier(WeightedKNN(k=3)), both, "multi-label")
    assert [one.labels[0] for one in predict(several, store)] == names_of(store).tolist()
    numbers = fitted(store, Ridge(), 10.0 * both, "regression")
    found = predict(numbers, store, top=5)
    assert (found.score, found.top, found.classes) == ("value", 2, [])
    assert next(iter(found)).scores == pytest.approx((10, 0), abs=0.5)
    found.to_csv(tmp_path / "values.csv")
    assert (tmp_path / "values.csv").read_text().startswith("path,value,value2,error\ncat/1.jpg,")


def test_a_head_that_does_not_fit_its_spec_is_refused(store: Store) -> None:
    head = fitted(store)
    with pytest.raises(EvaluationError, match="they do not belong together"):
        predict(replace(head, spec=replace(store.spec, dim=7)), store)
    with pytest.raises(EvaluationError, match="gives 2 scores for 3 classes"):
        predict(replace(head, classes=["a", "b", "c"], task="multi-label"), store)
    with pytest.raises(EvaluationError, match="Ridge, which gives neither"):
        predict(replace(head, estimator=Ridge().fit(store.load(), store.labels)), store)


@pytest.mark.parametrize(("parameter", "value"), [("k", 0), ("k", "three"), ("temperature", None)])
def test_a_head_that_cannot_be_used_is_refused_before_anything_is_embedded(
    store: Store, photos: Path, parameter: str, value: Any
) -> None:
    head = fitted(store, WeightedKNN(k=3))
    head.estimator.set_params(**{parameter: value})
    with pytest.raises(EvaluationError, match="the head cannot be used"):
        predict(head, photos, backbone=None)


def test_csv_has_every_image_and_every_byte_of_its_name(store: Store, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    seen: list[tuple[int, int]] = []
    found = predict(fitted(store), pictures, device="cpu", top=2)
    found.to_csv(out, progress=lambda *done: seen.append(done))
    assert seen == [(done, 27) for done in range(1, 28)]
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "label", "probability", "label2", "probability2", "error"]
    assert len(rows) == 27 and os.fsdecode(b"dog/odd \xff,\n.jpg") in [row[0] for row in rows]
    by_id = {row[0]: row for row in rows}
    assert by_id["cat/10x.jpg"][1:5] == [""] * 4 and by_id["cat/10x.jpg"][5]
    assert by_id["cat/1.jpg"][1] == "cat" and 0.5 < float(by_id["cat/1.jpg"][2]) <= 1 and not by_id["cat/1.jpg"][5]
    assert os.listdir(tmp_path).count("out.csv") == 1 and len(os.listdir(tmp_path)) == 2  # Nothing was left aside.


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


@pytest.fixture
def head_folder(store: Store, tmp_path: Path) -> Path:
    fitted(store).save(tmp_path / "pets.head")
    return tmp_path / "pets.head"


def test_command_prints_a_line_an_image_and_exits_3_when_some_failed(head_folder: Path, pictures: Path) -> None:
    done = run(head_folder, pictures, "--device", "cpu", "--json")
    assert done.exit_code == 3, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 27 and {line["label"] for line in lines if "label" in line} == {"cat", "dog"}
    assert [line["kind"] for line in lines if "error" in line] == ["not-an-image", "empty"]
    assert "2 failed: 1 not-an-image, 1 empty" in done.stderr


def test_command_chooses_images_like_extract(head_folder: Path, photos: Path) -> None:
    done = run(head_folder, photos, "--device", "cpu", "--include", "dog/1*", "--limit", "2", "-q")
    assert done.exit_code == 0, done.output
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [["dog", "dog/1.jpg"], ["dog", "dog/10.jpg"]]
    assert done.stderr == ""
    top = run(head_folder, photos / "dog" / "1.jpg", "--device", "cpu", "--top", "2", "-q").stdout.splitlines()
    assert top[0] == "1.jpg" and [line.split()[0] for line in top[1:]] == ["1", "2"]


def answers(done: Any) -> dict[str, tuple[str, float]]:
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["path"] for line in lines] == sorted((line["path"] for line in lines), key=os.fsencode)
    return {line["path"]: (line["label"], round(line["probability"], 4)) for line in lines if "label" in line}


def test_command_reads_archives(head_folder: Path, photos: Path, tmp_path: Path) -> None:
    for name, mode in (("pets.tar", "w"), ("pets.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            for path in sorted(photos.rglob("*.jpg"), reverse=True):
                archive.add(path, path.relative_to(photos))
            broken = tarfile.TarInfo("cat/broken.jpg")
            broken.size = 7
            archive.addfile(broken, io.BytesIO(b"no jpeg"))
    expected = answers(run(head_folder, photos, "--device", "cpu", "--json", "-q"))
    for name in ("pets.tar", "pets.tar.gz"):
        done = run(head_folder, tmp_path / name, "--device", "cpu", "--json", "-q")
        assert done.exit_code == 3 and len(expected) == 24, done.output
        assert answers(done) == expected
        failed = [json.loads(line) for line in done.stdout.splitlines() if '"error"' in line]
        assert [(line["path"], line["kind"]) for line in failed] == [("cat/broken.jpg", "not-an-image")]


def test_command_reads_several_sources_at_once(head_folder: Path, photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "cats.tar", "w") as archive:
        archive.add(photos / "cat", "cat")
    with zipfile.ZipFile(tmp_path / "dogs.zip", "w") as zipped:
        for path in sorted((photos / "dog").iterdir())[:5]:
            zipped.write(path, f"dog/{path.name}")
    shutil.copy(photos / "dog" / "1.jpg", tmp_path / "alone.jpg")
    sources = [tmp_path / "cats.tar", photos / "dog", tmp_path / "dogs.zip", tmp_path / "alone.jpg"]
    done = run(head_folder, *sources, "--device", "cpu", "--json", "-q")
    assert done.exit_code == 0, done.output
    found = answers(done)
    assert len(found) == 12 + 12 + 5 + 1
    single = answers(run(head_folder, photos, "--device", "cpu", "--json", "-q"))
    by_name = {name: [one for id, one in found.items() if id.endswith(name)] for name in ("cat/10.jpg", "alone.jpg")}
    assert by_name["cat/10.jpg"] == [single["cat/10.jpg"]] and by_name["alone.jpg"] == [single["dog/1.jpg"]]
    assert sorted(found.values()).count(single["dog/1.jpg"]) == 3  # In the folder, in the archive, and alone.
    again = run(head_folder, *sources, "--device", "cpu", "--csv", tmp_path / "out.csv")
    assert again.exit_code == 0 and again.stdout.endswith("out.csv: 30 images, 0 failed\n")


def test_command_takes_a_store_and_writes_csv(head_folder: Path, store: Store, tmp_path: Path) -> None:
    done = run(head_folder, store.path, "--csv", tmp_path / "out.csv")
    assert done.exit_code == 0 and done.stdout.endswith("out.csv: 24 images, 0 failed\n")
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to look at"),
        (["{store}", "--limit", "3"], "--limit is about images, and a store has embeddings"),
        (["{store}", "--json", "--csv", "x.csv"], "give one of them"),
    ],
)
def test_command_refuses_what_makes_no_sense(
    head_folder: Path, store: Store, arguments: list[str], message: str
) -> None:
    done = run(head_folder, *(argument.format(store=store.path) for argument in arguments))
    assert done.exit_code == 2 and message in done.output


def test_command_names_the_fields_that_differ(
    head_folder: Path, photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    made = extract(photos, tmp_path / "other.h5", Backbone.load(tiny_backbone, img_size=96, device="cpu"))
    done = run(head_folder, made.path)
    assert done.exit_code == 1 and "\n  preprocessing.img_size: [64, 64] != [96, 96]\n" in done.stderr
