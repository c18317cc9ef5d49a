"""Fine-tuning from images to report, with a small network and generated pictures."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import embedkit as ek
from embedkit.errors import EvaluationError, FinetuneError, SpecMismatchError
from embedkit.finetuning import Augmentation, Recipe
from embedkit.finetuning.report_page import WARMUP_TOP1
from embedkit.finetuning.run_folder import RunFolder
from embedkit.finetuning.training.history import Moment
from embedkit.heads import load_head

RECIPE = Recipe(epochs=2, batch_size=8, augmentation=Augmentation(hflip=0.5))


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> ek.Backbone:
    return ek.Backbone.load(tiny_backbone, device="cpu")


@pytest.fixture(scope="module")
def run(photos: Path, backbone: ek.Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "pets"
    ek.finetune(photos, backbone, folder, recipe=RECIPE, workers=2)
    return folder


@pytest.fixture(scope="module")
def half(photos: Path, backbone: ek.Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in its second epoch. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "half"

    def interrupt(what: str, state: object) -> None:
        if isinstance(state, Moment) and state.epoch == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ek.finetune(photos, backbone, folder, recipe=RECIPE, workers=2, progress=interrupt)
    return folder


def test_a_run_leaves_a_backbone_a_head_stores_and_a_report(run: Path, backbone: ek.Backbone, photos: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"backbone.json", "model.safetensors", "head", "recipe.json", "split.csv", "epochs.csv"}
    assert names >= {"before.h5", "after.h5", "report.json", "report.html"} and "state" not in names
    adapted = ek.Backbone.load(run, device="cpu")
    assert adapted.spec.weights_sha256 != backbone.spec.weights_sha256
    assert adapted.preprocessing == backbone.preprocessing
    after = ek.Store.open(run / "after.h5")
    assert after.spec == adapted.spec and len(after) == 24
    picture = photos / after.ids[0]
    assert np.allclose(adapted.embed(picture), after.embeddings[0], atol=1e-4)
    with open(run / "epochs.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_the_new_store_descends_from_the_old_one(run: Path) -> None:
    before, after = ek.Store.open(run / "before.h5"), ek.Store.open(run / "after.h5")
    parent = after.information["parent"]
    assert parent["content_id"] == before.content_id and parent["digest"] == before.digest
    assert "parent" not in before.information
    sidecar = json.loads((run / "backbone.json").read_text())
    assert sidecar["parents"][0]["digest"] == before.digest and sidecar["classes"] == ["cat", "dog"]
    assert Recipe.from_dict(sidecar["recipe"]) == RECIPE


def test_the_report_agrees_with_what_lies_beside_it(run: Path) -> None:
    values = json.loads((run / "report.json").read_text())
    names = [change["name"] for change in values["comparison"]["changes"]]
    assert names == ["classifier", "linear probe", "k-NN", "recall@1", "mAP@R"]
    assert values["comparison"]["chosen_on"] and values["images"]["val"]["images"] == 4
    head, after = load_head(run / "head"), ek.Store.open(run / "after.h5")
    with open(run / "split.csv", newline="") as file:
        val = [row for row in csv.DictReader(file) if row["split"] == "val"]
    x = after.rows(ids=[row["path"] for row in val])
    right = [head.classes[code] == row["label"] for code, row in zip(head.estimator.predict(x), val, strict=True)]
    assert values["after"]["top1"] == np.mean(right)
    assert values["history"]["epochs"][-1]["metrics"]["top1"] <= values["after"]["top1"]
    assert values["warmup"]["warm-up"] == "probe" and values["seconds"].keys() >= {"embedding", "training"}


def test_the_saved_head_predicts_images_by_the_adapted_backbone(run: Path, photos: Path) -> None:
    found = list(ek.predict(run / "head", photos, device="cpu"))
    assert len(found) == 24 and all(one.labels[0] == one.id.partition("/")[0] for one in found)


def test_a_finished_run_is_not_repeated(run: Path, photos: Path, backbone: ek.Backbone) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = ek.finetune(photos, backbone, run, recipe=RECIPE, workers=2)
    assert again.spec == ek.Store.open(run / "after.h5").spec
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_another_run_in_the_folder_is_refused_by_its_differences(
    run: Path, photos: Path, backbone: ek.Backbone
) -> None:
    with pytest.raises(FinetuneError, match=r"recipe.body_lr: 0.0003 there, 0.5 now"):
        ek.finetune(
            photos, backbone, run, recipe=Recipe(epochs=2, batch_size=8, augmentation=RECIPE.augmentation, body_lr=0.5)
        )
    with pytest.raises(FinetuneError, match=r"identity.images"):
        ek.finetune(photos, backbone, run, recipe=RECIPE, split=_split(run.parent / "s.csv", photos))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FinetuneError, match=r"something else than a run, such as 'thesis.tex'"):
            ek.finetune(photos, backbone, tmp_path, recipe=RECIPE, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_one_process_at_a_time_is_at_work_in_a_folder(tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    with RunFolder(tmp_path / "run").lock(), pytest.raises(ek.StoreBusyError, match=r"run is being written by process"):
        ek.finetune(photos, backbone, tmp_path / "run", recipe=Recipe(epochs=0))
    assert os.listdir(tmp_path) == []


def test_overwrite_replaces_a_run_and_nothing_else(
    run: Path, tmp_path: Path, photos: Path, backbone: ek.Backbone
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    recipe = Recipe(epochs=0)
    ek.finetune(photos, backbone, tmp_path / "run", recipe=recipe, overwrite=True, reextract=False)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "after.h5").exists()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["recipe"]["epochs"] == 0


def test_overwrite_goes_on_with_this_very_run(run: Path, tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()  # As if it had been killed before.
    kept = (tmp_path / "run" / "before.h5").stat().st_mtime_ns
    ek.finetune(photos, backbone, tmp_path / "run", recipe=RECIPE, overwrite=True)
    assert (tmp_path / "run" / "before.h5").stat().st_mtime_ns == kept
    ek.finetune(photos, backbone, tmp_path / "run", recipe=RECIPE, overwrite=True)
    assert (tmp_path / "run" / "before.h5").stat().st_mtime_ns != kept


def test_damaged_descriptions_are_named(run: Path, tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    for text in ("{", "[1]", '{"format": "other", "version": 1}'):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / "recipe.json").write_text(text)
        with pytest.raises(FinetuneError, match=r"recipe.json is not what a run writes: .*; name .*, or remove .*run"):
            ek.finetune(photos, backbone, tmp_path / "run", recipe=RECIPE, overwrite=True)
        assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("top1", ["<b>", None, True, -1, [0.5]])
def test_a_warm_up_that_is_no_number_is_named_before_hours_are_spent(
    tmp_path: Path, photos: Path, backbone: ek.Backbone, half: Path, top1: object
) -> None:
    shutil.copytree(half, tmp_path / "run")
    kept = tmp_path / "run" / "state" / "warmup.json"
    facts = json.loads(kept.read_bytes())
    kept.write_text(json.dumps(facts | {WARMUP_TOP1: top1}))
    with pytest.raises(FinetuneError, match=r"warmup\.json is not what a run writes: its .* remove the folder .*state"):
        ek.finetune(photos, backbone, tmp_path / "run", recipe=RECIPE, workers=2)


def test_warm_up_alone_changes_no_weight_of_the_body(tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    recipe = Recipe(epochs=2, batch_size=8, unfreeze="none")
    adapted = ek.finetune(photos, backbone, tmp_path / "frozen", recipe=recipe)
    assert adapted.spec.weights_sha256 == backbone.spec.weights_sha256
    values = json.loads((tmp_path / "frozen" / "report.json").read_text())
    assert values["warmup"]["warm-up top1 on validation"] == values["before"]["top1"]
    changes = {change["name"]: change for change in values["comparison"]["changes"]}
    assert changes["linear probe"]["difference"] == changes["mAP@R"]["difference"] == 0


def _split(path: Path, photos: Path) -> Path:
    """Write a split of three parts."""
    parts = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    rows = [f"{kind}/{n}.jpg,{parts[n - 1]}" for kind in ("cat", "dog") for n in range(1, 13)]
    path.write_text("\n".join(["path,split", *rows]) + "\n")
    return path


def test_a_given_store_is_used_and_a_third_part_is_compared_on(
    tmp_path: Path, photos: Path, backbone: ek.Backbone, other_backbone: Path
) -> None:
    store = ek.extract(photos, tmp_path / "photos.h5", backbone)
    split = _split(tmp_path / "split.csv", photos)
    ek.finetune(photos, backbone, tmp_path / "run", recipe=RECIPE, split=split, store=store)
    assert not (tmp_path / "run" / "before.h5").exists()
    assert ek.Store.open(tmp_path / "run" / "after.h5").information["parent"]["content_id"] == store.content_id
    found = json.loads((tmp_path / "run" / "report.json").read_text())["comparison"]
    assert found["part"] == "test" and not found["chosen_on"] and found["changes"][0]["rows"] == 4
    stranger = ek.extract(photos, tmp_path / "other.h5", ek.Backbone.load(other_backbone, device="cpu"))
    with pytest.raises(SpecMismatchError, match="was not made by this backbone"):
        ek.finetune(photos, backbone, tmp_path / "a", recipe=RECIPE, split=split, store=stranger)
    few = store.select(tmp_path / "few.h5", range(20))
    with pytest.raises(EvaluationError, match="lacks 4 images"):
        ek.finetune(photos, backbone, tmp_path / "b", recipe=RECIPE, split=split, store=few)
    assert not (tmp_path / "a" / "recipe.json").exists() and not (tmp_path / "b" / "split.csv").exists()


def test_a_table_with_parts_is_trained_by_them(tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    table = _split(tmp_path / "photos" / "table.csv", photos)
    lines = table.read_text().splitlines()
    table.write_text("\n".join([f"label,{lines[0]}", *(f"{line[:3]},{line}" for line in lines[1:])]))
    ek.finetune(table, backbone, tmp_path / "run", recipe=Recipe(epochs=0), reextract=False)
    parts = json.loads((tmp_path / "run" / "report.json").read_text())["images"]
    assert not parts["made"] and [parts[role]["images"] for role in ("train", "val", "test")] == [16, 4, 4]


def test_images_that_cannot_be_read_are_left_out_and_named(
    tmp_path: Path, photos: Path, backbone: ek.Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for id in ("cat/3.jpg", "dog/7.jpg"):
        (tmp_path / "photos" / id).write_bytes(b"no picture")
    ek.finetune(tmp_path / "photos", backbone, tmp_path / "run", recipe=RECIPE)
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [line.partition(":")[0] for line in values["failures"]] == ["cat/3.jpg", "dog/7.jpg"]
    parts = values["images"]
    assert parts["train"]["images"] + parts["val"]["images"] == 22
    assert "images that could not be read are left out: " in caplog.text
    assert len(ek.Store.open(tmp_path / "run" / "after.h5")) == 22


def test_images_that_fail_without_a_store_are_named_too(tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for number in (2, 5, 8):
        (tmp_path / "photos" / "cat" / f"{number}.jpg").write_bytes(b"no picture")
    recipe = Recipe(epochs=1, batch_size=8, from_scratch=True)
    ek.finetune(tmp_path / "photos", backbone, tmp_path / "run", recipe=recipe, reextract=False)
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [line.partition(":")[0] for line in values["failures"]] == ["cat/2.jpg", "cat/5.jpg", "cat/8.jpg"]


def test_a_store_of_other_pictures_is_refused(tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    store = ek.extract(photos, tmp_path / "photos.h5", backbone)
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)  # Of another time, and the same bytes.
    ek.finetune(tmp_path / "copy", backbone, tmp_path / "run", recipe=Recipe(epochs=0), store=store, reextract=False)
    shutil.copyfile(photos / "dog" / "3.jpg", tmp_path / "copy" / "cat" / "3.jpg")
    with pytest.raises(
        EvaluationError, match=r"made of another picture than the 'cat/3.jpg' of .*copy; bring it up to"
    ):
        ek.finetune(tmp_path / "copy", backbone, tmp_path / "other", recipe=Recipe(epochs=0), store=store)


def test_other_pictures_of_the_same_names_are_another_run(
    run: Path, tmp_path: Path, photos: Path, backbone: ek.Backbone
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "3.jpg").write_bytes((photos / "dog" / "3.jpg").read_bytes() + b" ")
    with pytest.raises(FinetuneError, match=r"of other settings.*\n  identity.images: "):
        ek.finetune(tmp_path / "photos", backbone, run, recipe=RECIPE)


def test_a_run_without_embeddings_says_how_to_get_them(tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    recipe = Recipe(epochs=0)
    ek.finetune(photos, backbone, tmp_path / "run", recipe=recipe, reextract=False)
    ek.finetune(photos, backbone, tmp_path / "run", recipe=recipe, reextract=False)
    with pytest.raises(
        FinetuneError, match=r"ended with --no-reextract; embedkit extract IMAGES -o .*after.h5 -m .*run"
    ):
        ek.finetune(photos, backbone, tmp_path / "run", recipe=recipe)


def test_overwrite_removes_nothing_that_the_run_begins_with(
    run: Path, tmp_path: Path, photos: Path, backbone: ek.Backbone
) -> None:
    shutil.copytree(run, tmp_path / "run")
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    with pytest.raises(FinetuneError, match=r"--overwrite would remove .*run', which this run begins with"):
        ek.finetune(photos, str(tmp_path / "run"), tmp_path / "run", recipe=RECIPE, overwrite=True)
    with pytest.raises(FinetuneError, match=r"--overwrite would remove .*before.h5'"):
        ek.finetune(
            photos, backbone, tmp_path / "run", recipe=Recipe(epochs=0), store=tmp_path / "run" / "before.h5",
            overwrite=True,
        )  # fmt: skip
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == files
    mended = (tmp_path / "run" / "split.csv").read_text().replace("val", "judge")
    (tmp_path / "run" / "split.csv").write_text(mended)
    ek.finetune(
        photos, backbone, tmp_path / "run", recipe=Recipe(epochs=0), split=tmp_path / "run" / "split.csv",
        val_split="judge", overwrite=True, reextract=False,
    )  # fmt: skip
    assert (tmp_path / "run" / "split.csv").read_text() == mended


def test_pictures_that_change_during_a_run_end_it(tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    bitmap = tmp_path / "photos" / "cat" / "3.bmp"
    Image.open(photos / "cat" / "3.jpg").save(bitmap)

    class Stopped(Exception):
        pass

    def stop(stage: str, state: object) -> None:
        if getattr(state, "epoch", 0) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        ek.finetune(tmp_path / "photos", backbone, tmp_path / "run", recipe=RECIPE, progress=stop)
    Image.open(photos / "dog" / "3.jpg").save(bitmap)  # Of as many bytes.
    with pytest.raises(FinetuneError, match=r"unfinished run of other settings.*\n  embeddings: "):
        ek.finetune(tmp_path / "photos", backbone, tmp_path / "run", recipe=RECIPE)


def test_progress_names_the_stages(tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    seen: dict[str, list[float]] = {}

    def watch(stage: str, state: object) -> None:
        seen.setdefault(stage, []).append(float(getattr(state, "done", 0) or getattr(state, "images", 0)))

    ek.finetune(photos, backbone, tmp_path / "run", recipe=RECIPE, progress=watch)
    assert list(seen) == ["embedding", "training", "embedding again"]
    assert seen["embedding"][-1] == seen["embedding again"][-1] == 24 and seen["training"][-1] == 20


def test_from_scratch_needs_no_embeddings_unless_they_are_compared(
    tmp_path: Path, photos: Path, backbone: ek.Backbone
) -> None:
    recipe = Recipe(epochs=1, batch_size=8, from_scratch=True, head="mlp:8")
    adapted = ek.finetune(photos, backbone, tmp_path / "run", recipe=recipe, reextract=False)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {"before.h5", "after.h5"} and "head" in names
    assert adapted.spec.weights_sha256 != backbone.spec.weights_sha256
    assert json.loads((tmp_path / "run" / "report.json").read_text())["comparison"] is None


def test_a_killed_run_ends_in_the_weights_of_one_that_was_not(
    tmp_path: Path, photos: Path, tiny_backbone: Path
) -> None:
    def command(folder: str) -> list[str]:
        return [
            sys.executable, "-m", "embedkit", "finetune", str(photos), "-m", str(tiny_backbone), "-o",
            str(tmp_path / folder), "--epochs", "6", "-b", "4", "--augment", "medium", "--device", "cpu",
        ]  # fmt: skip

    subprocess.run(command("whole"), check=True, capture_output=True)
    process = subprocess.Popen(command("killed"), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed" / "epochs.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "killed" / "report.json").exists()
    subprocess.run(command("killed"), check=True, capture_output=True)
    left, right = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "killed"))
    assert left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)
    stores = [ek.Store.open(tmp_path / folder / "after.h5").content_id for folder in ("whole", "killed")]
    assert stores[0] == stores[1]
    reports = [json.loads((tmp_path / folder / "report.json").read_text()) for folder in ("whole", "killed")]
    assert reports[0]["comparison"] == reports[1]["comparison"] and reports[0]["warmup"] == reports[1]["warmup"]


@pytest.mark.parametrize("head", ["linear", "mlp:8"])
def test_a_loss_of_metric_learning_is_judged_by_retrieval_and_gets_its_head_afterwards(
    tmp_path: Path, photos: Path, backbone: ek.Backbone, head: str
) -> None:
    pytest.importorskip("pytorch_metric_learning", reason="embedkit[metric] is not installed")
    recipe = Recipe(epochs=2, batch_size=8, loss="supcon", head=head)
    ek.finetune(photos, backbone, tmp_path / "run", recipe=recipe)
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(values["history"]["epochs"][0]["metrics"]) == {"recall@1"} and values["recipe"]["metric"] == "recall@1"
    names = [change["name"] for change in values["comparison"]["changes"]]
    assert names == ["linear probe", "k-NN", "recall@1", "mAP@R"] and values["after"]["top1"] == 1.0
    assert all(one.labels[0] == one.id.partition("/")[0] for one in ek.predict(tmp_path / "run" / "head", photos))


def test_recall_without_company_is_said_and_chooses_no_epoch(
    tmp_path: Path, photos: Path, backbone: ek.Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pytorch_metric_learning", reason="embedkit[metric] is not installed")
    rows = [f"{kind}/{n}.jpg,{'val' if n == 1 else 'train'}" for kind in ("cat", "dog") for n in range(1, 13)]
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *rows]))
    recipe, split = Recipe(epochs=2, batch_size=8, loss="triplet"), tmp_path / "split.csv"
    with pytest.raises(FinetuneError, match=r"no class has two images in val, .* --patience would never end the run"):
        ek.finetune(photos, backbone, tmp_path / "none", recipe=replace(recipe, patience=1), split=split)
    assert not (tmp_path / "none" / "before.h5").exists()
    ek.finetune(photos, backbone, tmp_path / "run", recipe=recipe, split=split)
    assert "recall@1 can judge no epoch: the last one is kept" in caplog.text
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    assert values["history"]["best_epoch"] == 2 and not values["comparison"]["chosen_on"]
    assert "epoch 2, the last: no validation judged it" in (tmp_path / "run" / "report.html").read_text()


def test_two_processes_train_together_and_one_speaks(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "embedkit",
        "finetune", str(photos), "-m", str(tiny_backbone), "-o", str(tmp_path / "run"), "--epochs", "2", "-b", "4",
        "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.count("classifier") == 2  # In the table and in the verdict.
    assert done.stderr.count("epoch 2 of 2: loss") == 1
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    assert values["circumstances"]["processes"] == "2" and len(values["history"]["epochs"]) == 2
    assert ek.Backbone.load(tmp_path / "run", device="cpu").spec == ek.Store.open(tmp_path / "run" / "after.h5").spec


def test_what_is_saved_answers_as_the_best_epoch_did(tmp_path: Path, photos: Path, backbone: ek.Backbone) -> None:
    drawn = np.random.default_rng(3).integers(0, 2, 24)  # Classes that no picture shows: nobody gets them all right.
    ids = [f"{kind}/{n}.jpg" for kind in ("cat", "dog") for n in range(1, 13)]
    parts = ["train", "val"] * 12
    lines = [f"{id},{'ab'[code]},{part}" for id, code, part in zip(ids, drawn, parts, strict=True)]
    (tmp_path / "split.csv").write_text("\n".join(["path,label,split", *lines]))
    recipe = Recipe(epochs=3, batch_size=4, warmup="none", head_lr=0.01, model_ema=0.5)
    ek.finetune(photos, backbone, tmp_path / "run", recipe=recipe, split=tmp_path / "split.csv")
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    best = values["history"]["epochs"][values["history"]["best_epoch"] - 1]["metrics"]
    assert values["after"]["top1"] == pytest.approx(best["top1"]) and best["top1"] < 1
    head, after = load_head(tmp_path / "run" / "head"), ek.Store.open(tmp_path / "run" / "after.h5")
    rows = [row for row, part in enumerate(parts) if part == "val"]
    scores = head.estimator.predict_proba(after.rows(ids=[ids[row] for row in rows]))
    assert -np.log(scores[np.arange(12), drawn[rows]]).mean() == pytest.approx(best["loss"], rel=1e-3)
