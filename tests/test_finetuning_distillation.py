"""Distillation: a student that comes closer to its teachers, and goes on after a kill."""

from __future__ import annotations

import csv
import json
import logging
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import embedkit as ek
from embedkit.errors import FinetuneError
from embedkit.extraction import Progress
from embedkit.finetuning.distillation.distilling import DISTILLING, Distillation, distill
from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.run_folder import RunFolder
from tests.conftest import write_photos

SHORT = replace(DISTILLING, epochs=3, batch_size=8)
SETTINGS = Distillation(held_out=0.2, width=16)


def rows_of(folder: Path) -> list[dict[str, float]]:
    with open(folder / "epochs.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, photos: Path, tiny_backbone: Path, other_backbone: Path) -> Path:
    """A run of two teachers and two views."""
    folder = tmp_path_factory.mktemp("distillation") / "run"
    distill(
        [tiny_backbone, other_backbone], "test_resnet", photos, folder, recipe=SHORT,
        settings=replace(SETTINGS, views=2), img_size=32,
    )  # fmt: skip
    return folder


def test_a_student_comes_closer_to_its_teachers(taught: Path) -> None:
    rows = rows_of(taught)
    assert len(rows) == 3
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["val_cosine"] > rows[0]["val_cosine"]
    assert rows[-1]["val_cosine"] == pytest.approx((rows[-1]["val_cosine_1"] + rows[-1]["val_cosine_2"]) / 2)


def test_the_folder_is_a_backbone_that_says_where_it_comes_from(
    taught: Path, photos: Path, tiny_backbone: Path
) -> None:
    backbone = ek.Backbone.load(taught)
    assert backbone.preprocessing.img_size == (32, 32)
    assert backbone.preprocessing.mean == ek.Backbone.load(tiny_backbone).preprocessing.mean
    assert backbone.embed(photos / "cat" / "1.jpg").shape == (backbone.dim,)
    said = json.loads((taught / "backbone.json").read_text())
    assert len(said["parents"]) == 2
    assert said["information"]["began_with"] is None
    assert json.loads((taught / "report.json").read_text())["student"]["digest"] == backbone.spec.digest
    assert said["recipe"]["distillation"]["views"] == 2
    assert said["metrics"]["cosine"] == max(row["val_cosine"] for row in rows_of(taught))
    assert not (taught / "state").exists()


def test_teachers_are_asked_once_for_all_students(
    taught: Path, tmp_path: Path, photos: Path, tiny_backbone: Path, other_backbone: Path
) -> None:
    stores = sorted((taught / "teachers").glob("*.h5"))
    made = [path.stat().st_mtime_ns for path in stores]
    assert [len(ek.Store.open(path)) for path in stores] == [48, 48]
    distill(
        [tiny_backbone, other_backbone], "test_resnet", photos, tmp_path / "run", recipe=replace(SHORT, epochs=1),
        settings=replace(SETTINGS, views=2), img_size=32, stores=taught / "teachers",
    )  # fmt: skip
    assert [path.stat().st_mtime_ns for path in stores] == made


def test_one_folder_of_teachers_stores_serves_several_settings(
    tmp_path: Path, photos: Path, tiny_backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def teach(name: str, seed: int = 0, **values: object) -> set[str]:
        distill(
            tiny_backbone, "test_resnet", photos, tmp_path / name, recipe=replace(SHORT, epochs=0, seed=seed),
            settings=replace(SETTINGS, **values), img_size=32, stores=tmp_path / "teachers",
        )  # fmt: skip
        return {path.name for path in (tmp_path / "teachers").glob("*.h5")}

    (whole,) = teach("one")
    digest = ek.Backbone.load(tiny_backbone).spec.digest
    assert whole == f"test_resnet-{digest[:12]}.h5"
    assert teach("same", seed=1) == {whole}  # Whole images are drawn by nothing.
    two = teach("two", views=2) - {whole}
    assert len(two) == 1
    assert len(teach("seed", views=2, seed=1)) == 3
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "teachers").glob("*.h5")}
    assert len(teach("smaller", views=2, smallest_view=0.2)) == 4
    teach("again", width=8)
    assert all(path.stat().st_mtime_ns == moment for path, moment in made.items())
    assert "dropped" not in caplog.text


def test_a_finished_run_is_returned_and_another_one_refused(
    taught: Path, photos: Path, tiny_backbone: Path, other_backbone: Path
) -> None:
    weights = (taught / "model.safetensors").stat().st_mtime_ns
    teachers, settings = [tiny_backbone, other_backbone], replace(SETTINGS, views=2)
    same = distill(teachers, "test_resnet", photos, taught, recipe=SHORT, settings=settings, img_size=32)
    assert same.spec == ek.Backbone.load(taught).spec
    assert (taught / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(FinetuneError, match="body_lr"):
        distill(
            teachers, "test_resnet", photos, taught, recipe=replace(SHORT, body_lr=0.5), settings=settings, img_size=32
        )
    with pytest.raises(FinetuneError, match="student"):
        distill(teachers, "test_resnet", photos, taught, recipe=SHORT, settings=settings, img_size=48)


def test_one_process_at_a_time_teaches_in_a_folder(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    folder = tmp_path / "run"
    with RunFolder(folder).lock(), pytest.raises(ek.StoreBusyError, match="run is being written by process"):
        distill(tiny_backbone, "test_resnet", photos, folder, recipe=SHORT, settings=SETTINGS, img_size=32)
    assert not folder.exists()


def test_another_run_replaces_one_when_asked_and_the_teachers_stores_stay(
    tmp_path: Path, photos: Path, tiny_backbone: Path
) -> None:
    recipe, folder = replace(SHORT, epochs=1), tmp_path / "run"
    first = distill(tiny_backbone, "test_resnet", photos, folder, recipe=recipe, settings=SETTINGS, img_size=32)
    (store,) = (folder / "teachers").glob("*.h5")
    made = store.stat().st_mtime_ns
    other = distill(
        tiny_backbone, "test_resnet", photos, folder, recipe=replace(recipe, seed=1), settings=SETTINGS, img_size=32,
        overwrite=True,
    )  # fmt: skip
    assert other.spec.weights_sha256 != first.spec.weights_sha256
    assert store.stat().st_mtime_ns == made


def test_a_backbone_goes_on_from_what_it_knows(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    frozen = replace(SHORT, epochs=1, body_lr=0.0, freeze_norm=True)
    before = ek.Backbone.load(tiny_backbone, img_size=48)
    after = distill(tiny_backbone, before, photos, tmp_path / "run", recipe=frozen, settings=SETTINGS)
    said = json.loads((tmp_path / "run" / "report.json").read_text())
    assert said["began_with"]["digest"] == before.spec.digest
    assert said["student"]["digest"] == after.spec.digest
    assert after.spec.weights_sha256 == before.spec.weights_sha256
    assert after.preprocessing == before.preprocessing


def test_images_that_a_teacher_cannot_read_are_left_out_and_said(
    tmp_path: Path, tiny_backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = write_photos(tmp_path / "photos", per_class=6)
    (photos / "cat" / "broken.jpg").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING, "embedkit"):
        distill(
            tiny_backbone, "test_resnet", photos, tmp_path / "run", recipe=replace(SHORT, epochs=1), settings=SETTINGS,
            img_size=32,
        )  # fmt: skip
    assert "1 image cannot be learned from" in caplog.text
    assert rows_of(tmp_path / "run")[0]["images"] == 10  # Of 12, a fifth is held out.


def test_a_file_in_half_precision_loads_as_float32(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    recipe = replace(SHORT, epochs=1)
    for precision in ("fp32", "fp16"):
        distill(
            tiny_backbone, "test_resnet", photos, tmp_path / precision, recipe=recipe, settings=SETTINGS, img_size=32,
            precision=precision,
        )  # fmt: skip
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "fp16"))
    assert {value.dtype for value in half.values() if value.is_floating_point()} == {torch.float16}
    image = photos / "cat" / "1.jpg"
    left, right = (ek.Backbone.load(tmp_path / name).embed(image) for name in ("fp32", "fp16"))
    assert right.dtype == np.float32
    assert right == pytest.approx(left, rel=0.02, abs=0.02)
    assert full.keys() == half.keys()


@pytest.mark.parametrize(
    "values", [{"distance": "manhattan"}, {"width": 0}, {"whitening": 2.0}, {"held_out": 1.0}, {"views": 0}]
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, photos: Path, tiny_backbone: Path, values: dict[str, object]
) -> None:
    with pytest.raises(FinetuneError, match=next(iter(values))):
        distill(tiny_backbone, "test_resnet", photos, tmp_path / "run", settings=Distillation(**values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "recipe, words",
    [
        (Recipe(), "cosine or loss"),
        (replace(SHORT, augmentation=Augmentation(mixup=0.2)), "mixed images"),
        (replace(SHORT, batch_size=1), "no statistics of a single image; choose a --batch-size of 2 or more"),
    ],
)
def test_recipes_that_would_be_ignored_are_refused(
    tmp_path: Path, photos: Path, tiny_backbone: Path, recipe: Recipe, words: str
) -> None:
    with pytest.raises(FinetuneError, match=words):
        distill(tiny_backbone, "test_resnet", photos, tmp_path / "run", recipe=recipe)


def test_without_held_out_images_the_training_loss_chooses(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    settings = replace(SETTINGS, held_out=0.0)
    distill(tiny_backbone, "test_resnet", photos, tmp_path / "run", recipe=SHORT, settings=settings, img_size=32)
    rows = rows_of(tmp_path / "run")
    assert [row["images"] for row in rows] == [24.0] * 3
    assert json.loads((tmp_path / "run" / "backbone.json").read_text())["metrics"] == {}


def test_nothing_is_learned_from_copies_of_held_out_images(tmp_path: Path, tiny_backbone: Path) -> None:
    photos = write_photos(tmp_path / "photos", per_class=6)
    for path in sorted(photos.rglob("*.jpg")):
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    recipe = replace(SHORT, epochs=1)
    distill(tiny_backbone, "test_resnet", photos, tmp_path / "run", recipe=recipe, settings=SETTINGS, img_size=32)
    facts = json.loads((tmp_path / "run" / "report.json").read_text())["facts"]
    assert facts["held_out"] == 5
    assert facts["images"] % 2 == 0
    assert 14 <= facts["images"] <= 18  # Of 24 pairs' halves, 3 to 5 pairs are gone whole.


def test_of_few_images_one_is_held_out_at_least(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    settings, recipe = replace(SETTINGS, held_out=0.001), replace(SHORT, epochs=1)
    distill(tiny_backbone, "test_resnet", photos, tmp_path / "run", recipe=recipe, settings=settings, img_size=32)
    assert rows_of(tmp_path / "run")[0]["images"] == 23
    with pytest.raises(FinetuneError, match="precision: 'fp32' there, 'fp16' now"):
        distill(
            tiny_backbone, "test_resnet", photos, tmp_path / "run", recipe=recipe, settings=settings, img_size=32,
            precision="fp16",
        )  # fmt: skip


def test_a_student_that_goes_on_in_its_own_folder_is_not_removed(
    tmp_path: Path, photos: Path, tiny_backbone: Path
) -> None:
    folder = tmp_path / "run"
    distill(
        tiny_backbone, "test_resnet", photos, folder, recipe=replace(SHORT, epochs=1), settings=SETTINGS, img_size=32
    )
    weights = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FinetuneError, match=r"--overwrite would remove .*run', which this run begins with"):
        distill(tiny_backbone, folder, photos, folder, recipe=SHORT, settings=SETTINGS, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == weights


def test_teachers_are_several_different_ones(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    with pytest.raises(FinetuneError, match="named twice"):
        distill([tiny_backbone, tiny_backbone], "test_resnet", photos, tmp_path / "run")
    with pytest.raises(FinetuneError, match="needs a teacher"):
        distill([], "test_resnet", photos, tmp_path / "run")


KILLED = """
import sys
from dataclasses import replace
import os, signal
import torch
torch.set_num_threads(1)
from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.finetuning.distillation.distilling import DISTILLING, Distillation, distill
teacher, photos, folder, deadly = sys.argv[1:]

def watch(what, state):
    if what == "training" and deadly == "yes" and (state.epoch, state.images) >= (3, 8):
        os.kill(os.getpid(), signal.SIGKILL)

distill(
    teacher, "test_resnet", photos, folder, recipe=replace(DISTILLING, epochs=4, batch_size=8),
    settings=Distillation(held_out=0.2, width=16, views=2), img_size=32, progress=watch, workers=1,
)
"""


def test_a_killed_run_ends_in_the_weights_of_one_that_nobody_interrupted(
    tmp_path: Path, photos: Path, tiny_backbone: Path
) -> None:
    def run(folder: str, deadly: str) -> int:
        arguments = [str(tiny_backbone), str(photos), str(tmp_path / folder), deadly]
        return subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=300).returncode

    assert run("whole", "no") == 0
    assert run("broken", "yes") == -signal.SIGKILL
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    assert run("broken", "no") == 0
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert len(rows_of(tmp_path / "broken")) == 4


@pytest.mark.parametrize("arch", ["test_resnet", "test_efficientnet", "test_vit"])
def test_a_kept_projection_is_the_embedding_everywhere(
    tmp_path: Path, photos: Path, tiny_backbone: Path, arch: str
) -> None:
    recipe, folder, size = replace(SHORT, epochs=1), tmp_path / "run", {"test_vit": 160}.get(arch, 32)
    student = distill(
        tiny_backbone, arch, photos, folder, recipe=recipe, settings=replace(SETTINGS, width=6), img_size=size,
        project=True,
    )  # fmt: skip
    assert student.dim == 6
    store = ek.extract(photos, tmp_path / "a.h5", student)
    again = ek.Backbone.reload(store.spec, store.recipe)
    assert np.allclose(again.embed(photos / "cat" / "1.jpg"), store.rows(ids=["cat/1.jpg"])[0], atol=1e-4)
    import timm

    crop = torch.from_numpy(student.pixels(photos / "cat" / "1.jpg")).permute(2, 0, 1)[None] / 255
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (student.preprocessing.mean, student.preprocessing.std)
    )
    with torch.no_grad():
        found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()((crop - mean) / std)[0]
    assert found.numpy() == pytest.approx(student.embed(photos / "cat" / "1.jpg"), abs=1e-3)


def test_two_processes_teach_one_student(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    script = tmp_path / "teach.py"
    script.write_text(KILLED)
    arguments = [str(tiny_backbone), str(photos), str(tmp_path / "run"), "no"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["images"] for row in rows_of(tmp_path / "run")] == [19.0] * 4
    assert ek.Backbone.load(tmp_path / "run").dim == 96


def test_the_default_recipe_learns_everything() -> None:
    assert isinstance(DISTILLING, Recipe)
    assert (DISTILLING.layer_decay, DISTILLING.freeze_norm, DISTILLING.unfreeze) == (1.0, False, "all")


def test_a_student_with_weights_begins_with_the_projection_that_fits_best(
    tmp_path: Path, photos: Path, tiny_backbone: Path
) -> None:
    still = replace(SHORT, epochs=1, body_lr=0.0, head_lr=0.0, freeze_norm=True, batch_size=4)
    settings = Distillation(held_out=0.2, width=4)
    own = distill(
        tiny_backbone, ek.Backbone.load(tiny_backbone), photos, tmp_path / "own", recipe=still, settings=settings
    )
    assert own.spec == ek.Backbone.load(tiny_backbone).spec
    distill(tiny_backbone, "test_resnet", photos, tmp_path / "new", recipe=still, settings=settings, img_size=64)
    # The teacher itself reproduces the teacher, for a ridge of few images nearly; random weights do not.
    assert rows_of(tmp_path / "own")[0]["val_cosine"] > 0.9
    assert rows_of(tmp_path / "new")[0]["val_cosine"] < 0.5


def test_training_images_that_are_gone_once_the_teachers_saw_them_are_named(
    tmp_path: Path, tiny_backbone: Path
) -> None:
    photos = write_photos(tmp_path / "photos", per_class=6)

    def spoil(what: str, state: object) -> None:
        if isinstance(state, Progress) and state.done == state.total:  # The teacher is through.
            for path in photos.rglob("*.jpg"):
                path.write_bytes(b"no image")

    with pytest.raises(FinetuneError, match="none of the 10 training images can be read any more"):
        distill(
            tiny_backbone, ek.Backbone.load(tiny_backbone), photos, tmp_path / "run", recipe=SHORT, settings=SETTINGS,
            progress=spoil,
        )  # fmt: skip


def test_a_validation_that_is_no_number_does_not_take_the_student_away(
    tmp_path: Path, photos: Path, tiny_backbone: Path
) -> None:
    recipe = replace(
        SHORT, epochs=1, batch_size=32, opt="momentum", momentum=0.0, head_lr=1e36, body_lr=0.0, sched="constant",
        warmup_epochs=0.0,
    )  # fmt: skip
    settings, folder = replace(SETTINGS, distance="mse"), tmp_path / "run"
    distill(tiny_backbone, "test_resnet", photos, folder, recipe=recipe, settings=settings, img_size=32)
    (row,) = rows_of(folder)
    assert not np.isfinite(row["val_loss"])
    report = json.loads((folder / "report.json").read_text())
    assert "loss" not in report["metrics"] and report["history"]["epochs"][0]["metrics"]["loss"] is None
    assert ek.Backbone.load(folder).dim == 96
