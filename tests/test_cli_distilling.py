"""embedkit distill: options, a file of settings, and the judge."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import embedkit as ek
from embedkit.cli import main
from embedkit.cli.distilling import distill
from embedkit.finetuning.distillation.distilling import DISTILLING, Distillation
from embedkit.finetuning.recipe_file import read_settings
from tests.conftest import write_photos


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["distill", *map(str, arguments)])


SMALL = ("--student", "test_resnet", "--img-size", 32, "--epochs", 1, "-b", 8, "--held-out", 0.2, "--target-width", 16)


def test_defaults_are_those_of_the_library() -> None:
    found = {str(param.name): param.default for param in distill.params}
    for field in fields(DISTILLING):
        if field.name in found:
            assert found[field.name] == getattr(DISTILLING, field.name), field.name
    for field in fields(Distillation):
        name = "target_width" if field.name == "width" else field.name
        assert found[name] == getattr(Distillation(), field.name), name
    for name in ("hflip", "hue", "reprob"):
        assert found[name] == getattr(DISTILLING.augmentation, name), name


def test_a_student_is_taught_and_judged(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    judge = tmp_path / "judge.h5"
    ek.extract(photos, judge, ek.Backbone.load(tiny_backbone))
    result = run(photos, "--teacher", tiny_backbone, "-o", tmp_path / "run", *SMALL, "--judge", judge, "-q")
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()][:3] == ["width", "judge", "student"]
    assert "19 images, best epoch 1: cosine" in result.stdout
    assert ek.Backbone.load(tmp_path / "run").preprocessing.img_size == (32, 32)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "http" not in page.replace("http://www.w3.org", "")
    again = run(
        photos, "--teacher", tiny_backbone, "-o", tmp_path / "run", *SMALL, "--judge", judge, "-q", "--json"
    )  # fmt: skip
    values = json.loads(again.stdout)
    words = ["distill", photos, "--teacher", tiny_backbone, "-o", tmp_path / "run", *SMALL]
    assert "finished already" in CliRunner().invoke(main, list(map(str, words))).stderr
    assert values["judgement"]["student"]["linear_top1"] == pytest.approx(1.0)
    assert values["facts"]["images"] == 19
    assert values["teachers"][0]["digest"] == ek.Store.open(judge).digest


def test_a_file_of_settings_is_a_command_that_can_be_committed(
    tmp_path: Path, photos: Path, tiny_backbone: Path
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        f"teacher: {tiny_backbone}\nstudent: test_resnet\nimg-size: 32\nepochs: 1\nbatch_size: 8\nhflip: 0.25\n"
        "held_out: 0.2\nviews: 2\n"
    )
    result = run(photos, "--config", path, "--epochs", 2, "-o", tmp_path / "run", "-q")
    assert result.exit_code == 0, result.output
    said = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (said["recipe"]["epochs"], said["recipe"]["augmentation"]["hflip"]) == (2, 0.25)
    assert said["identity"]["distillation"]["views"] == 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("epoch: 3", "did you mean epochs"),
        ("epochs: 3\nepochs: 4", "twice"),
        ("teacher: a\nteachers: [b]", "are one setting"),
        ("- a\n- b", "holds no settings"),
        ("output: /tmp/x", "no setting 'output'"),
        ("a: &a [1]\nb: *a", "aliases"),
        ("epochs: {a: 1}", "a list of these"),
        ("epochs: [", "not a YAML file"),
        ("epochs: [1, 2]", "bad.yaml: epochs takes one value, and not a list; got [1, 2]"),
        ("img-size: [64]", "bad.yaml: img_size takes one value"),
        ("hflip: [0.5]", "bad.yaml: hflip takes one value"),
        ("sample: [3]", "bad.yaml: sample takes one value"),
        ("student: [a, b]", "bad.yaml: student takes one value"),
        ("columns: 3", "bad.yaml: columns: '3' is not of the form key=value"),
        ("columns: [path=a, 3]", "bad.yaml: columns: '3' is not of the form key=value"),
        ("epochs: true", "bad.yaml: epochs is not true or false"),
        ("hflip: yes", "bad.yaml: hflip is not true or false"),
        ("student: on", "bad.yaml: student is not true or false; put it in quotes"),
        ("epochs: 2.7", "bad.yaml: epochs: '2.7' is not a valid integer"),
        ("img-size: 4", "bad.yaml: img_size: 4 is not in the range x>=8"),
        ("distance: 3", "bad.yaml: distance: '3' is not one of 'cosine', 'mse'"),
        ("project: 5", "bad.yaml: project is true or false; got 5"),
        ("x" * (1 << 17), "larger than"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    result = run("photos", "--config", path, "-o", tmp_path / "run")
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ") and "bad.yaml" in result.output


def test_a_file_that_is_no_settings_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("- a\n")
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        read_settings(path, {"epochs"})


def parsed(*arguments: object) -> dict[str, object]:
    """Return the values of the command's options."""
    parent = click.Context(main, info_name="embedkit", **main.context_settings)
    return distill.make_context("distill", list(map(str, arguments)), parent=parent).params


def test_settings_are_read_as_they_would_be_typed(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "teacher: 5\nstudent: 7\nteacher-stores: 5\nbody-lr: 1e-3\nhead-lr: 0.1\nepochs: 3\nsample: 9\nproject: true\n"
        "freeze_norm: no\ncolumns: path=a\ninclude: [a, b]\n"
    )
    found = parsed("photos", "--config", path, "-o", tmp_path / "run")
    expected = {
        "teachers": ("5",), "student": "7", "teacher_stores": Path("5"), "body_lr": 1e-3, "head_lr": 0.1, "epochs": 3,
        "sample": 9, "project": True, "freeze_norm": False, "columns": {"path": "a"}, "include": ("a", "b"),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_the_settings_of_nano_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDKIT_DATA", "/x")
    path = Path(__file__).parents[1] / "configs" / "nano.yaml"
    found = parsed("photos", "--config", path, "-o", tmp_path / "run")
    assert (found["student"], found["img_size"], found["body_lr"], found["freeze_norm"], found["precision"]) == (
        "/x/weights/tf_mobilenetv3_small_100.tf_in1k.json", 112, 0.001, True, "fp16",
    )  # fmt: skip
    assert len(found["teachers"]) == 4  # type: ignore[arg-type]


def test_places_in_settings_are_said_by_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("teachers: ['${DATA}/a.json', b]\nepochs: 3\n")
    known = {"teachers", "epochs"}
    assert read_settings(path, known, environment={"EMBEDKIT_DATA": "/x"}) == {
        "teachers": ["/x/a.json", "b"],
        "epochs": 3,
    }
    with pytest.raises(ValueError, match="EMBEDKIT_DATA"):
        read_settings(path, known, environment={})


def test_the_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = run("photos", "--config", tmp_path / "none.yaml", "-o", tmp_path / "run")
    assert result.exit_code == 2 and "none.yaml" in result.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--teacher", "a", "--student", "b", "-o", "x"), "name the images"),
        (("photos", "--student", "b", "-o", "x"), "--teacher"),
        (("photos", "--teacher", "a", "--student", "b", "-o", "x", "--judge-split", "s.csv"), "--judge"),
        (("photos", "--teacher", "a", "--student", "b", "-o", "x", "--views", 0), "views"),
        (("photos", "--teacher", "a", "--student", "b", "-o", "x", "--whitening", 3), "Error: --whitening must"),
        (("photos", "--teacher", "a", "--student", "b", "-o", "x", "--epochs", -1), "Error: --epochs must"),
        (("photos", "--teacher", "a", "--student", "b", "-o", "x", "--target-width", 0), "Error: --target-width must"),
        (("photos", "--teacher", "a", "--student", "b", "-o", "x", "--color-jitter", 2), "Error: --color-jitter must"),
        (("photos", "--teacher", "a", "--student", "b", "-o", "x", "--held-out", 1), "Error: --held-out must"),
    ],
)
def test_commands_that_make_no_sense_are_refused(arguments: tuple[object, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_unreadable_images_are_named_and_make_exit_code_3(tmp_path: Path, tiny_backbone: Path) -> None:
    photos = write_photos(tmp_path / "photos", per_class=8)
    for number in range(1, 6):
        (photos / "cat" / f"bad{number}.jpg").write_bytes(b"no picture")
    command = (photos, "--teacher", tiny_backbone, "-o", tmp_path / "run", *SMALL, "--views", 2)
    for _ in range(2):  # A run that is finished already still lacks them.
        result = run(*command)
        assert result.exit_code == 3, result.output
        shown = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
        assert [line.split(":")[1].strip() for line in shown] == [f"cat/bad{number}.jpg" for number in (1, 2, 3)]
        (store,) = (tmp_path / "run" / "teachers").glob("*.h5")
        assert f"... and 2 more: embedkit info {store} --failures" in result.stderr
    values = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (values["failed"], len(values["failures"]), values["failed_in"]) == (5, 5, [store.name])
    assert "5 images could not be read, such as cat/bad1.jpg" in (tmp_path / "run" / "report.html").read_text()


def test_without_an_epoch_none_is_called_the_best(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    result = run(photos, "--teacher", tiny_backbone, "-o", tmp_path / "run", *SMALL, "--epochs", 0, "-q")
    assert result.stdout == f"{tmp_path / 'run'}: 19 images, no epoch was trained\n"


def test_a_judge_that_cannot_judge_is_found_out_before_anything_is_taught(
    tmp_path: Path, photos: Path, tiny_backbone: Path
) -> None:
    backbone, split = ek.Backbone.load(tiny_backbone), tmp_path / "split.csv"
    ek.extract(photos, tmp_path / "good.h5", backbone)
    ek.extract(photos / "cat", tmp_path / "bare.h5", backbone)
    moved = write_photos(tmp_path / "photos", per_class=6)
    ek.extract(moved, tmp_path / "moved.h5", backbone)
    moved.rename(tmp_path / "elsewhere")
    split.write_text("path,split\ncat/1.jpg,train\n")
    for judge, more, said in (
        ("none.h5", (), "none.h5"),
        ("bare.h5", (), "no labels to judge by"),
        ("moved.h5", (), "are not where it says, such as 'cat/1.jpg'"),
        ("good.h5", ("--judge-split", split), "no split named test"),
        ("good.h5", ("--judge-split", tmp_path / "none.csv"), "none.csv cannot be read"),
    ):
        command = (photos, "--teacher", tiny_backbone, "-o", tmp_path / "run", *SMALL, "--judge", tmp_path / judge)
        result = run(*command, *more)
        assert result.exit_code == 1 and said in result.stderr, result.output
        assert not (tmp_path / "run").exists()


def test_a_judgement_is_recorded_beside_what_a_finished_run_wrote(
    tmp_path: Path, photos: Path, tiny_backbone: Path
) -> None:
    judge, report = tmp_path / "judge.h5", tmp_path / "run" / "report.json"
    command = (photos, "--teacher", tiny_backbone, "-o", tmp_path / "run", *SMALL, "-q")
    assert run(*command).exit_code == 0
    first, page = json.loads(report.read_text()), (tmp_path / "run" / "report.html").read_text()
    assert "judgement" not in first and "Judgement" not in page
    first["history"]["epochs"][0]["metrics"]["cosine"] = None  # As a report says that it was no number.
    report.write_text(json.dumps(first))
    ek.extract(photos, judge, ek.Backbone.load(tiny_backbone))
    assert run(*command, "--judge", judge).exit_code == 0
    found = json.loads(report.read_text())
    judgement = found.pop("judgement")
    assert found == first
    assert judgement["student"]["linear_top1"] == pytest.approx(1.0) and judgement["judge"]["dim"] == 96
    assert (judgement["store"], judgement["split"], judgement["images"]) == (str(judge), None, 24)
    judged = (tmp_path / "run" / "report.html").read_text()
    assert f"On the 24 images of {judge}, 5 folds." in judged and judged.count("<h2>") == page.count("<h2>") + 1
    assert json.loads(run(*command, "--json").stdout)["judgement"] == judgement


def test_a_store_without_labels_is_no_judge(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    from embedkit.finetuning.distillation.judging import judge_backbone

    backbone = ek.Backbone.load(tiny_backbone)
    store = ek.extract(photos / "cat", tmp_path / "a.h5", backbone)
    with pytest.raises(ValueError, match="no labels"):
        judge_backbone(backbone, store, tmp_path / "b.h5")


def test_a_judge_whose_images_are_gone_is_named(tmp_path: Path, tiny_backbone: Path) -> None:
    from embedkit.finetuning.distillation.judging import judge_backbone

    photos, backbone = write_photos(tmp_path / "photos", per_class=6), ek.Backbone.load(tiny_backbone)
    store = ek.extract(photos, tmp_path / "a.h5", backbone)
    (photos / "dog" / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of the 12 images .* 'dog/1\.jpg'"):
        judge_backbone(backbone, store, tmp_path / "b.h5")


def test_a_judgement_of_another_student_is_replaced(
    tmp_path: Path, photos: Path, tiny_backbone: Path, other_backbone: Path
) -> None:
    from embedkit.finetuning.distillation.judging import judge_backbone

    one, other = ek.Backbone.load(tiny_backbone), ek.Backbone.load(other_backbone)
    store = ek.extract(photos, tmp_path / "a.h5", one)
    for backbone in (one, other, other):
        judge_backbone(backbone, store, tmp_path / "b.h5")
        assert ek.Store.open(tmp_path / "b.h5").digest == backbone.spec.digest


def test_it_is_a_command_with_help() -> None:
    assert isinstance(distill, click.Command)
    assert "--teacher" in run("--help").output
