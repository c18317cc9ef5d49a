"""The command that teaches a small backbone."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedkit.cli import printing
from embedkit.cli.finetuning import follows
from embedkit.cli.learning import learning_options, naming_options, saying_that_it_goes_on
from embedkit.cli.options import (
    FILE,
    KEY_VALUE,
    Command,
    device_option,
    json_option,
    overwrite_option,
    quiet_option,
    some_source_options,
    source_arguments,
)

if TYPE_CHECKING:
    from embedkit.backbones import Backbone
    from embedkit.finetuning.distillation.distilling import Distillation
    from embedkit.finetuning.recipe import Recipe
    from embedkit.store import Store

_TARGET_OPTIONS = [
    click.option(
        "--views", type=int, default=1, show_default=True,
        help="Views of each image that the teachers see: all of it, and squares of it; an epoch shows one.",
    ),
    click.option(
        "--smallest-view", type=float, default=0.3, show_default=True, metavar="SHARE",
        help="The least share of an image's largest square that a view shows.",
    ),
    click.option(
        "--target-width", type=int, default=512, show_default=True, metavar="N",
        help="Directions that are kept of each teacher, those of the greatest variance.",
    ),
    click.option(
        "--whitening", type=float, default=0.0, show_default=True,
        help="0 keeps the teachers' geometry, 1 makes all of their directions equally loud.",
    ),
    click.option(
        "--distance", type=click.Choice(["cosine", "mse"]), default="cosine", show_default=True,
        help="Between what the student says and what it should.",
    ),
    click.option(
        "--held-out", type=float, default=0.02, show_default=True, metavar="SHARE",
        help="Images that choose the best epoch, at most 2,000.",
    ),
]  # fmt: skip

_TRAINING_OPTIONS = [
    *learning_options(
        epochs=30, batch_size=64, body_lr=2e-3, head_lr=2e-3, head="the projection", layer_decay=1.0, weight_decay=0.02
    ),
    click.option(
        "--freeze-norm/--no-freeze-norm", default=False, show_default=True,
        help="Batch normalisation keeps its statistics, for a student that has some.",
    ),
]  # fmt: skip

_AUGMENTATION_OPTIONS = [
    click.option("--hflip", type=float, default=0.5, show_default=True, metavar="CHANCE", help="Mirror images."),
    click.option(
        "--color-jitter", type=float, default=0.0, show_default=True, metavar="SHARE",
        help="Largest change of brightness, contrast and saturation.",
    ),
    click.option("--hue", type=float, default=0.0, show_default=True, metavar="SHARE", help="Largest turn of the hue."),
    click.option("--reprob", type=float, default=0.0, show_default=True, metavar="CHANCE", help="Erase a rectangle."),
]  # fmt: skip


def _configure(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Take defaults from a file of settings; what stands on the command line replaces them."""
    if path is None:
        return
    from embedkit.errors import FinetuneError
    from embedkit.finetuning.recipe_file import read_settings

    kinds = {str(option.name): option for option in ctx.command.params if isinstance(option, click.Option)}
    known = kinds.keys() - {"config", "output", "device", "as_json", "quiet", "overwrite", "judge", "judge_split"}
    try:
        values = read_settings(path, known | {"teacher"})
    except FinetuneError as error:
        raise click.UsageError(str(error)) from error
    if "teacher" in values:  # The option's own name, beside that of its list.
        if "teachers" in values:
            raise click.UsageError(f"{path}: teacher and teachers are one setting; keep one")
        values["teachers"] = values.pop("teacher")
    ctx.default_map = {name: _configured(ctx, kinds[name], path, name, value) for name, value in values.items()}


def _configured(ctx: click.Context, option: click.Option, path: Path, name: str, value: Any) -> Any:
    """Return what a file says for an option as it would be typed; raise UsageError where it cannot be meant."""
    if isinstance(value, list) and not option.multiple:
        raise click.UsageError(f"{path}: {name} takes one value, and not a list; got {value!r}")
    if option.is_flag:
        if not isinstance(value, bool):
            raise click.UsageError(f"{path}: {name} is true or false; got {value!r}")
        return value
    typed = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, bool):
            raise click.UsageError(f"{path}: {name} is not true or false; put it in quotes if it is a name")
        try:
            option.type.convert(str(each), option, ctx)
        except click.BadParameter as error:
            raise click.UsageError(f"{path}: {name}: {error.message}") from error
        typed.append(str(each))
    return typed if option.multiple else typed[0]


def _options(command: Command) -> Command:
    for option in reversed([*_TARGET_OPTIONS, *_TRAINING_OPTIONS, *_AUGMENTATION_OPTIONS]):
        command = option(command)
    return command


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGES...")
@click.option(
    "--config", type=FILE, metavar="YAML", is_eager=True, expose_value=False, callback=_configure,
    help="Settings by the names of these options; what is given here replaces them.",
)  # fmt: skip
@click.option(
    "--teacher", "teachers", multiple=True, required=True, metavar="MODEL",
    help="timm name, weight file, JSON sidecar, or folder; may be repeated.",
)  # fmt: skip
@click.option(
    "--student", required=True, metavar="ARCH", help="timm architecture, or a MODEL that goes on from what it knows."
)
@click.option("-o", "--output", type=FILE, required=True, metavar="DIR", help="Folder of the run and of the student.")
@click.option(
    "--img-size", type=click.IntRange(8), metavar="PIXELS", help="Side of the student's crop.  [default: 128]"
)
@click.option(
    "--arch-kwargs", type=KEY_VALUE, multiple=True, callback=lambda ctx, param, value: dict(value) or None,
    help="Keyword argument of the student's architecture; may be repeated.",
)  # fmt: skip
@click.option(
    "--teacher-stores", type=FILE, metavar="DIR", help="Where the teachers' stores are.  [default: DIR/teachers]"
)
@some_source_options("columns", "root", "include", "exclude", "limit", "sample", "follow_links")
@_options
@click.option("--project", is_flag=True, help="Keep the linear map to the teachers' directions as the embedding.")
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
    help="Number format of the weight file.",
)  # fmt: skip
@click.option(
    "--judge", type=FILE, metavar="STORE", help="Probe the student beside this labelled store, on its images."
)
@click.option("--judge-split", type=FILE, metavar="CSV", help="As for probe --split.  [default: five folds]")
@device_option
@click.option("-j", "--workers", type=click.IntRange(1), help="Threads that decode.  [default: one a processor]")
@overwrite_option
@json_option
@quiet_option
@click.pass_context
def distill(
    ctx: click.Context,
    /,
    images: tuple[str, ...],
    teachers: tuple[str, ...],
    student: str,
    output: Path,
    img_size: int | None,
    arch_kwargs: dict[str, Any] | None,
    teacher_stores: Path | None,
    project: bool,
    precision: str,
    judge: Path | None,
    judge_split: Path | None,
    device: str,
    workers: int | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Teach a small backbone to reproduce the embeddings of one or several others, on images without labels.

    The teachers embed IMAGES once, into stores that later students use again; the student sees the same images at its
    own size. A bare timm architecture begins with random weights, anything else with its own.

    DIR can be used wherever a backbone is, as -m DIR. An interrupted run goes on after its last epoch when the same
    command is given again. docs/distillation.md says more.
    """
    from embedkit.finetuning.distillation.distilling import distill as teach
    from embedkit.sources import list_images

    if not images:
        raise click.UsageError("name the images: a folder, an archive, a table, ...")
    if judge is None and judge_split is not None:
        raise click.UsageError("--judge-split divides the images of a --judge store")
    quiet = quiet or follows()
    settings, recipe = _settings_of(choices)
    known = None if judge is None else _judge(judge, judge_split)  # Before hours of teaching.
    with printing.saying_when_long("listing the images", quiet):
        listing = list_images(*images, seed=recipe.seed, **source_arguments(choices))
    with saying_that_it_goes_on(), printing.StageBars(quiet) as bars:
        backbone = teach(
            teachers, student, listing, output, settings=settings, recipe=recipe, img_size=img_size,
            arch_kwargs=arch_kwargs, stores=teacher_stores, project=project, precision=precision, device=device,
            workers=workers, overwrite=overwrite, progress=bars.update,
        )  # fmt: skip
    if follows():
        return
    printing.notice(f"backbone: {backbone.description}", quiet)
    if known is not None:
        _pass_judgement(backbone, known, judge_split, output, workers, as_json, quiet)
    ctx.exit(_print_result(output, teacher_stores or output / "teachers", as_json, quiet))


def _settings_of(choices: dict[str, Any]) -> tuple[Distillation, Recipe]:
    """Take the settings of a distillation out of the values of the command's options."""
    from embedkit.finetuning.distillation.distilling import DISTILLING, Distillation
    from embedkit.finetuning.feeding.augmentation import Augmentation

    colours = dict.fromkeys(("brightness", "contrast", "saturation"), "--color-jitter")
    with naming_options(width="--target-width", **colours):
        jitter = choices.pop("color_jitter")
        augmentation = Augmentation(
            **{name: choices.pop(name) for name in ("hflip", "hue", "reprob")}, brightness=jitter, contrast=jitter,
            saturation=jitter,
        )  # fmt: skip
        choices["width"] = choices.pop("target_width")
        settings = Distillation(**{field.name: choices.pop(field.name) for field in fields(Distillation)})
        names = [field.name for field in fields(DISTILLING) if field.name in choices]
        return settings, replace(DISTILLING, **{name: choices.pop(name) for name in names}, augmentation=augmentation)


def _judge(path: Path, split: Path | None) -> Store:
    from embedkit.finetuning.distillation.judging import check_judge
    from embedkit.store import Store

    store = Store.open(path)
    check_judge(store, split)
    return store


def _pass_judgement(
    backbone: Backbone, judge: Store, split: Path | None, output: Path, workers: int | None, as_json: bool, quiet: bool
) -> None:
    """Probe the student beside a store, record it in the run's folder, and print the table unless JSON is wanted."""
    from embedkit.finetuning.distillation.account import record_judgement
    from embedkit.finetuning.distillation.judging import judge_backbone, verdict_dict, verdict_text

    with printing.ImageBar(quiet) as bar:
        verdicts = judge_backbone(
            backbone, judge, output / "judged.h5", split=split, workers=workers, progress=bar.update
        )
    record_judgement(output, verdict_dict(verdicts, judge, split))
    if not as_json:
        click.echo(verdict_text(verdicts))


def _print_result(output: Path, stores: Path, as_json: bool, quiet: bool) -> int:
    """Print what came of a run, and return the exit code."""
    values = json.loads((output / "report.json").read_text(encoding="utf-8"))
    if as_json:
        click.echo(json.dumps(values))
    else:
        facts, history, metrics = values["facts"], values["history"], values["metrics"]
        said = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "nothing was held out"
        said = f"best epoch {history['best_epoch']}: {said}" if history["epochs"] else "no epoch was trained"
        click.echo(f"{output}: {facts['images']:,} images, {said}")
    failed_in = values.get("failed_in") or [None]
    printing.failed_images(
        values.get("failures", []), values.get("failed", 0), stores / failed_in[0] if failed_in[0] else None, quiet
    )
    return 3 if values.get("failed") else 0
