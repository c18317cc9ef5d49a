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
        (("photos", "--teacher", "a", "--student", "b", "-o", "x", "--whitening", 3), "whitening"),
        (("photos", "--teacher", "a", "--student", "b", "-o", "x", "--epochs", -1), "epochs"),
    ],
)
def test_commands_that_make_no_sense_are_refused(arguments: tuple[object, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_a_store_without_labels_is_no_judge(tmp_path: Path, photos: Path, tiny_backbone: Path) -> None:
    from embedkit.finetuning.distillation.judging import judge_backbone

    backbone = ek.Backbone.load(tiny_backbone)
    store = ek.extract(photos / "cat", tmp_path / "a.h5", backbone)
    with pytest.raises(ValueError, match="no labels"):
        judge_backbone(backbone, store, tmp_path / "b.h5")


def test_a_judge_whose_images_are_gone_is_named(tmp_path: Path, tiny_backbone: Path) -> None:
    from embedkit.finetuning.distillation.judging import judge_backbone
    from tests.conftest import write_photos

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
