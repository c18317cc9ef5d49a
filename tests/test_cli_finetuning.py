from __future__ import annotations

import dataclasses
import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import embedkit as ek
from embedkit.cli import main
from embedkit.cli.finetuning import recipe_of
from embedkit.finetuning import PRESETS, Augmentation, Recipe

COMMAND = main.commands["finetune"]


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["finetune", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def parsed(*arguments: object) -> Recipe:
    """Return the recipe that a command line asks for."""
    parent = click.Context(main, info_name="embedkit", **main.context_settings)
    context = COMMAND.make_context("finetune", ["photos", "-m", "x", *map(str, arguments)], parent=parent)
    return recipe_of(context.params)


def options() -> Iterator[tuple[str, click.Option]]:
    for parameter in COMMAND.params:
        if isinstance(parameter, click.Option):
            yield str(parameter.name), parameter


@pytest.mark.parametrize("kind", [Recipe, Augmentation])
def test_every_setting_is_an_option_with_its_default(kind: type) -> None:
    found = dict(options())
    for field in dataclasses.fields(kind):
        if field.name == "augmentation":
            continue
        assert field.name in found, f"no option sets {field.name}"
        default = found[field.name].get_default(click.Context(COMMAND))
        if kind is Recipe:
            assert default == field.default and type(default) is type(field.default), field.name
        else:  # Left out, it is the preset's.
            assert default is None or "UNSET" in repr(default).upper(), field.name
    assert PRESETS["none"] == Augmentation() and parsed() == Recipe()


def test_settings_reach_the_recipe() -> None:
    recipe = parsed(
        "--head", "mlp:16", "--unfreeze", "last-2", "--body-lr", "3e-4", "--eval-metric", "loss", "--no-freeze-norm",
        "--augment", "medium", "--scale", "0.5", "1", "--color-jitter", "0.4", "--contrast", "0.1",
        "--mixup", "0.2", "--mixup-prob", "0.5",
    )  # fmt: skip
    assert (recipe.head, recipe.unfreeze, recipe.body_lr, recipe.metric, recipe.freeze_norm) == (
        "mlp:16", "last-2", 3e-4, "loss", False,
    )  # fmt: skip
    expected = dataclasses.replace(
        PRESETS["medium"], crop_scale=(0.5, 1.0), brightness=0.4, contrast=0.1, saturation=0.4, mixup=0.2, mix_prob=0.5
    )
    assert recipe.augmentation == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--head", "forest"), "there is no head 'forest'"),
        (("--epochs", "-1"), "Error: --epochs must be"),
        (("--head-epochs", "1" * 400), "Error: --head-epochs must be at least 1, and no larger than 2^53"),
        (("--body-lr", "-1"), "Error: --body-lr must be 0 or more"),
        (("--mixup", "inf"), "Error: --mixup must be between 0 and"),
        (("--hflip", "2"), "Error: --hflip must be between 0 and 1"),
        (("--scale", "0.9", "0.2"), "Error: --scale is two shares"),
        (("--aa", "x"), "Error: --aa is timm's text"),
        (("--epochs", "1", "--warmup-epochs", "2"), "choose fewer --warmup-epochs"),
        (("--from-scratch", "--lora", "4"), "from scratch"),
        (("--sched", "steep"), "'--sched'"),
        (("--pool", "avg,max"), "one pooling"),
        (("--split", "x.csv", "--sample", "5"), "--split says which images to take"),
    ],
)
def test_settings_that_make_no_sense_are_wrong_usage(
    photos: Path, tiny_backbone: Path, tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    assert named in run(photos, "-m", tiny_backbone, "-o", tmp_path / "run", *arguments, code=2).stderr
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_said(photos: Path, tiny_backbone: Path) -> None:
    assert "-o DIR" in run(photos, "-m", tiny_backbone, code=2).stderr
    assert "name the images" in run("-m", tiny_backbone, "-o", "x", code=2).stderr


def test_a_dry_run_counts_what_learns_and_writes_nothing(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    result = run(
        photos, "-m", tiny_backbone, "-o", tmp_path / "run", "--dry-run", "--unfreeze", "last-1", "--device", "cpu"
    )
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["head", "0", "194", "1"] in lines and lines[-1][0] == "all"
    assert next(line for line in lines if line[0] == "layer3.0")[-1] == "never"
    assert not (tmp_path / "run").exists()
    rows = run(photos, "-m", tiny_backbone, "--dry-run", "--json", "-q").stdout.splitlines()
    found = [json.loads(row) for row in rows]
    assert found[-1] == {"name": "head", "frozen": 0, "trainable": 194, "from_epoch": 1}
    assert sum(row["frozen"] for row in found) == 0


def test_a_dry_run_of_a_loss_that_trains_no_head_says_so(photos: Path, tiny_backbone: Path) -> None:
    command = (photos, "-m", tiny_backbone, "--dry-run", "--loss", "supcon", "--unfreeze", "last-1", "--device", "cpu")
    lines = [line.split() for line in run(*command).stdout.splitlines()]
    assert ["head", "194", "0", "afterwards"] in lines
    found = [json.loads(row) for row in run(*command, "--json").stdout.splitlines()]
    assert found[-1] == {"name": "head", "frozen": 194, "trainable": 0, "from_epoch": 0}
    assert int(lines[-1][2].replace(",", "")) == sum(row["trainable"] for row in found) > 0


def test_figures_are_not_kept_for_no_project(photos: Path, tiny_backbone: Path) -> None:
    assert "name the project" in run(photos, "-m", tiny_backbone, "--dry-run", "--wandb-offline", code=2).output


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--opt", "adamv"), "no optimiser is called 'adamv'; timm's are many, such as adam"),
        (("--eval-metric", "top9"), "choose one of top1, mean_class_accuracy, loss"),
        (("--loss", "supcon", "--eval-metric", "loss"), "choose one of recall@1"),
        (("--loss", "supcon", "--mixup", "0.2"), "leave --mixup and --cutmix at 0"),
    ],
)
def test_what_cannot_work_is_found_out_before_anything_is_embedded(
    photos: Path, tiny_backbone: Path, tmp_path: Path, wrong: tuple[str, ...], said: str
) -> None:
    common = (photos, "-m", tiny_backbone, "-o", tmp_path / "run", "--device", "cpu", *wrong)
    for more in (("--dry-run",), ()):
        assert said in run(*common, *more, code=1).output
    assert not (tmp_path / "run").exists()


def test_without_an_epoch_none_was_chosen(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    found = run(photos, "-m", tiny_backbone, "-o", tmp_path / "run", "--epochs", 0, "--no-reextract", "--device", "cpu")
    assert "which nothing was chosen on" in found.stdout and "best epoch" not in found.stdout


def test_a_file_is_no_place_for_a_run(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("here")
    said = run(photos, "-m", tiny_backbone, "-o", tmp_path / "taken", "--device", "cpu", code=1).output
    assert "taken is a file; name a folder" in said and (tmp_path / "taken").read_text() == "here"


def test_samples_of_an_augmentation_are_shown_and_nothing_is_trained(
    photos: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    page = tmp_path / "samples.html"
    result = run(photos, "-m", tiny_backbone, "--show-augment", page, "--augment", "heavy", "--device", "cpu")
    assert "data:image/jpeg;base64," in page.read_text() and f"page: {page}" in result.stderr and not result.stdout


def test_a_run_prints_the_comparison_and_its_places(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    command = (photos, "-m", tiny_backbone, "-o", tmp_path / "run", "--epochs", 1, "-b", 8, "--device", "cpu")
    result = run(*command)
    assert "classifier" in result.stdout and "fine-tuning" in result.stdout and "95 % interval" in result.stdout
    for line in ("warm-up: the head (linear) on 20 stored embeddings", "epoch 1 of 1: loss", "report.html"):
        assert line in result.stderr
    again = run(*command, "--json")
    assert "finished already" in again.stderr and json.loads(again.stdout)["recipe"]["epochs"] == 1
    assert run(*command, "-q").stderr == ""
    info = CliRunner().invoke(main, ["info", str(tmp_path / "run" / "after.h5")]).stdout
    assert f"parent     {tmp_path / 'run' / 'before.h5'}" in info
    probed = CliRunner().invoke(
        main, ["probe", str(tmp_path / "run" / "after.h5"), "--split", str(tmp_path / "run" / "split.csv"), "-q"]
    )
    assert probed.exit_code == 0 and "linear top1" in probed.stdout


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_ctrl_c_says_that_the_run_goes_on(photos: Path, tiny_backbone: Path, tmp_path: Path, command: str) -> None:
    class Impatient(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("epoch 1 of 3"):
                signal.raise_signal(signal.SIGINT)

    kind = ["-m"] if command == "finetune" else ["--student", "test_resnet", "--img-size", 32, "--teacher"]
    arguments = [command, photos, *kind, tiny_backbone, "-o", tmp_path / "run", "-b", 8, "--epochs", 3]
    log, handler = logging.getLogger("embedkit"), Impatient()
    log.addHandler(handler)
    try:
        result = CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])
    finally:
        log.removeHandler(handler)
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted; the same command goes on after the last whole epoch\n")
    assert (tmp_path / "run" / "state").is_dir()


def test_the_options_are_those_of_the_function() -> None:
    import inspect

    signature = inspect.signature(ek.finetune).parameters
    found: dict[str, Any] = dict(options())
    for name in signature.keys() - {"images", "backbone", "output", "recipe", "progress"}:
        default = found[name].get_default(click.Context(COMMAND))
        empty = default is None or "UNSET" in repr(default).upper()
        assert (None if empty else default) == signature[name].default, name


def test_unreadable_images_make_exit_code_3(photos: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(photos, tmp_path / "photos")
    for number in range(1, 6):
        (tmp_path / "photos" / "cat" / f"{number}.jpg").write_bytes(b"no picture")
    command = ("-m", tiny_backbone, "-o", tmp_path / "run", "--epochs", 0, "--no-reextract", "--device", "cpu")
    said = run(tmp_path / "photos", *command, code=3).stderr
    assert "failed: cat/3.jpg" in said and "failed: cat/4.jpg" not in said
    assert f"... and 2 more: embedkit info {tmp_path / 'run' / 'before.h5'} --failures" in said
    for number in (2, 3, 4, 5):
        shutil.copy(photos / "cat" / f"{number}.jpg", tmp_path / "photos" / "cat")
    one = run(tmp_path / "photos", *command, "--overwrite", code=3).stderr
    assert f"embedkit info {tmp_path / 'run' / 'before.h5'} --failures lists them" in one and "more" not in one
