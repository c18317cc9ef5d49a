"""The command that adapts a backbone."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedkit.cli import printing
from embedkit.cli.learning import learning_options, naming_options, saying_that_it_goes_on
from embedkit.cli.options import (
    FILE,
    Command,
    backbone_arguments,
    backbone_options,
    device_option,
    json_option,
    model_option,
    overwrite_option,
    quiet_option,
    some_source_options,
    source_arguments,
)

if TYPE_CHECKING:
    from embedkit.backbones import Backbone
    from embedkit.finetuning.examples import Division
    from embedkit.finetuning.recipe import Recipe
    from embedkit.sources import Listing

_HEAD_OPTIONS = [
    click.option("--head", default="linear", show_default=True, help="linear, or mlp:UNITS for a hidden layer."),
    click.option(
        "--warmup", type=click.Choice(["auto", "probe", "sgd", "none"]), default="auto", show_default=True,
        help="How the head is fitted on the frozen body; auto: a linear one by the probe, an MLP by steps.",
    ),
    click.option(
        "--head-epochs", type=int, default=30, show_default=True,
        help="Of --warmup sgd, over the store; at least 200 updates.",
    ),
    click.option(
        "--unfreeze", default="all", show_default=True, metavar="WHAT",
        help="all, none, last-N blocks, or a pattern of names such as blocks.5*.",
    ),
    click.option(
        "--gradual", type=int, default=0, show_default=True, metavar="EPOCHS",
        help="Thaw one block more every so many epochs, the last first.",
    ),
    click.option(
        "--freeze-norm/--no-freeze-norm", default=True, show_default=True,
        help="Batch normalisation keeps its pretrained statistics.",
    ),
    click.option("--from-scratch", is_flag=True, help="Begin with random weights, for an honest baseline."),
    click.option(
        "--lora", type=int, default=0, show_default=True, metavar="RANK",
        help="Train low-rank adapters in place of the weights; needs embedkit[lora].",
    ),
]  # fmt: skip

_TRAINING_OPTIONS = [
    *learning_options(
        epochs=10, batch_size=32, body_lr=3e-4, head_lr=1e-3, head="the head", layer_decay=0.75, weight_decay=0.05
    ),
    click.option("--decay-rate", type=float, default=0.1, show_default=True, help="Of exponential, step and plateau."),
    click.option("--decay-epochs", type=int, default=3, show_default=True, help="Of step; the patience of plateau."),
    click.option("--smoothing", type=float, default=0.0, show_default=True, help="Of labels."),
    click.option(
        "--loss", type=click.Choice(["cross-entropy", "supcon", "arcface", "triplet"]), default="cross-entropy",
        show_default=True, help="The others are for retrieval, and need embedkit[metric].",
    ),
    click.option("--balance", is_flag=True, help="Show every class equally often."),
    click.option("--grad-checkpointing", is_flag=True, help="Less memory, for a third more time."),
    click.option("--eval-metric", "metric", default="top1", show_default=True, help="What chooses the best epoch."),
]  # fmt: skip

_AUGMENTATION_OPTIONS = [
    click.option(
        "--augment", type=click.Choice(["none", "light", "medium", "heavy"]), default="light", show_default=True,
        help="A preset; the options below replace what it says.",
    ),
    click.option(
        "--scale", "crop_scale", type=(float, float), metavar="MIN MAX", help="Share of the area that a crop keeps."
    ),
    click.option("--ratio", "crop_ratio", type=(float, float), metavar="MIN MAX", help="Width to height of the crop."),
    click.option("--hflip", type=float, metavar="CHANCE", help="Mirror images."),
    click.option("--vflip", type=float, metavar="CHANCE", help="Images upside down."),
    click.option("--rotation", type=float, metavar="DEGREES", help="Largest turn to either side."),
    click.option("--zoom", type=float, metavar="SHARE", help="Largest change of scale: 0.2 is 0.8 to 1.2."),
    click.option("--shear", type=float, metavar="DEGREES", help="Largest shear to either side."),
    click.option("--shift", type=float, metavar="SHARE", help="Largest shift along either side."),
    click.option(
        "--color-jitter", type=float, metavar="SHARE", help="Largest change of brightness, contrast and saturation."
    ),
    click.option("--brightness", type=float, metavar="SHARE", help="Largest change to either side."),
    click.option("--contrast", type=float, metavar="SHARE", help="Largest change to either side."),
    click.option("--saturation", type=float, metavar="SHARE", help="Largest change to either side."),
    click.option("--hue", type=float, metavar="SHARE", help="Largest turn of the hue, at most 0.5."),
    click.option("--channel-shift", type=float, metavar="SHARE", help="Largest amount added to each channel."),
    click.option("--aa", metavar="POLICY", help="timm's RandAugment and the like, such as rand-m9-mstd0.5."),
    click.option("--reprob", type=float, metavar="CHANCE", help="Erase a rectangle."),
    click.option("--mixup", type=float, metavar="ALPHA", help="Mix images by MixUp."),
    click.option("--cutmix", type=float, metavar="ALPHA", help="Mix images by CutMix."),
    click.option("--mixup-prob", "mix_prob", type=float, metavar="CHANCE", help="Mix a batch at all."),
    click.option("--mixup-off-epoch", type=int, metavar="EPOCH", help="Mix nothing from this epoch on; 0: never."),
]  # fmt: skip


def recipe_options(command: Command) -> Command:
    """Add an option for every setting of a `Recipe` and of its `Augmentation`, which `recipe_of` reads."""
    for option in reversed([*_HEAD_OPTIONS, *_TRAINING_OPTIONS, *_AUGMENTATION_OPTIONS]):
        command = option(command)
    return command


def recipe_of(choices: dict[str, Any]) -> Recipe:
    """Take a recipe out of the values of a command's options."""
    from embedkit.finetuning.feeding.augmentation import PRESETS, Augmentation
    from embedkit.finetuning.recipe import Recipe

    jitter = choices.pop("color_jitter")
    varied = {"brightness": jitter, "contrast": jitter, "saturation": jitter}
    for field in dataclasses.fields(Augmentation):
        value = choices.pop(field.name)
        varied[field.name] = varied.get(field.name) if value is None else value
    with naming_options():
        augmentation = dataclasses.replace(
            PRESETS[choices.pop("augment")], **{name: value for name, value in varied.items() if value is not None}
        )
        names = [field.name for field in dataclasses.fields(Recipe) if field.name in choices]
        return Recipe(**{name: choices.pop(name) for name in names}, augmentation=augmentation)


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGES...")
@model_option
@click.option("-o", "--output", type=FILE, metavar="DIR", help="Folder of the run and of the adapted backbone.")
@click.option("--split", type=FILE, metavar="CSV", help="Columns path and split, and perhaps label.")
@click.option("--train-split", default="train", show_default=True, help="What --split calls the images to learn from.")
@click.option("--val-split", help="What it calls those that choose the best epoch.  [default: val, else test]")
@click.option("--test-split", help="What it calls those to compare on.  [default: test, else the former]")
@some_source_options("columns", "root", "include", "exclude", "sample", "follow_links")
@click.option("--store", type=FILE, help="Embeddings of IMAGES by MODEL, in place of embedding them.")
@click.option("--reextract/--no-reextract", default=True, show_default=True, help="Embed again, and compare.")
@click.option("--dry-run", is_flag=True, help="Print what would learn, block by block, and train nothing.")
@click.option("--show-augment", type=FILE, metavar="PAGE", help="Write a page of varied samples, and train nothing.")
@recipe_options
@backbone_options
@device_option
@click.option("-j", "--workers", type=click.IntRange(1), help="Threads that decode.  [default: one a processor]")
@click.option("--tensorboard", is_flag=True, help="Write the figures for TensorBoard, too.")
@click.option("--wandb", metavar="PROJECT", help="Send the figures to Weights & Biases, too.")
@click.option("--wandb-offline", is_flag=True, help="Keep them for wandb sync instead.")
@overwrite_option
@json_option
@quiet_option
@click.pass_context
def finetune(
    ctx: click.Context,
    /,
    images: tuple[str, ...],
    model: str,
    output: Path | None,
    store: Path | None,
    dry_run: bool,
    show_augment: Path | None,
    device: str,
    workers: int | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Adapt the backbone MODEL to the labelled images of IMAGES, and show what it bought.

    IMAGES is a folder with a folder for each class, or anything that embedkit extract takes and that has classes. They
    are embedded once; a new head is fitted to the embeddings while the body is frozen; then body and head learn with
    learning rates that fall from block to block; the epoch that the validation images like best is kept; all images are
    embedded again, and probe, k-NN and retrieval are compared before and after by paired tests.

    DIR can be used wherever a backbone is, as -m DIR, and DIR/head is a head for embedkit predict. An interrupted run
    goes on after its last epoch when the same command is given again. docs/finetuning.md says more.
    """
    from embedkit.finetuning.dividing import own_split
    from embedkit.finetuning.stages import finetune as adapt
    from embedkit.sources import list_images

    if not images:
        raise click.UsageError("name the images: a folder with a folder for each class, or a table")
    if output is None and not dry_run and show_augment is None:
        raise click.UsageError("name the folder of the run with -o DIR")
    quiet = quiet or follows()
    recipe = recipe_of(choices)
    splits = {name: choices.pop(name) for name in ("split", "train_split", "val_split", "test_split")}
    others = {name: choices.pop(name) for name in ("reextract", "tensorboard", "wandb", "wandb_offline", "overwrite")}
    selection = source_arguments(choices)
    if others["wandb_offline"] and others["wandb"] is None:
        raise click.UsageError("--wandb-offline keeps what --wandb PROJECT would send; name the project")
    if splits["split"] is not None and any(selection[name] for name in ("sample", "include", "exclude")):
        raise click.UsageError("--split says which images to take; leave --sample, --include and --exclude out")
    with printing.saying_when_long("listing the images", quiet):
        listing = list_images(*images, seed=recipe.seed, **selection)
    if splits["split"] is None and len(images) == 1:
        splits["split"] = own_split(images[0], listing, root=selection["root"], columns=selection["columns"])
    if splits["split"] is None and (splits["val_split"] or splits["test_split"] or splits["train_split"] != "train"):
        raise click.UsageError("--train-split, --val-split and --test-split are names of --split")
    printing.default_model_notice(ctx, quiet)
    backbone = _load(model, device, choices)
    printing.notice(f"backbone: {backbone.description}", quiet)
    if dry_run or show_augment is not None:
        _preview(listing, backbone, recipe, splits, show_augment, as_json=as_json if dry_run else None)
        return
    assert output is not None
    with saying_that_it_goes_on(), printing.StageBars(quiet) as bars:
        adapt(
            listing, backbone, output, recipe=recipe, store=store, workers=workers, progress=bars.update, **splits,
            **others,
        )  # fmt: skip
    if not follows():
        ctx.exit(_print_report(output, store, as_json=as_json, quiet=quiet))


def follows() -> bool:
    """Return whether torchrun started this process beside one that speaks."""
    if int(os.environ.get("RANK", "0")) == 0:
        return False
    logging.getLogger("embedkit").setLevel(logging.ERROR)
    return True


def _load(model: str, device: str, choices: dict[str, Any]) -> Backbone:
    """Load the backbone, on the accelerator of this process where torchrun started several."""
    import torch

    from embedkit.backbones import Backbone

    local = os.environ.get("LOCAL_RANK", "")
    if local.isdecimal() and (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
        device = f"cuda:{local}"
    arguments, more = backbone_arguments(**choices)
    if more:
        raise click.UsageError("a backbone is adapted by one pooling; name one with --pool")
    return Backbone.load(model, device=device, **arguments)


def _preview(
    listing: Listing, backbone: Backbone, recipe: Recipe, splits: dict[str, Any], page: Path | None, *,
    as_json: bool | None,
) -> None:  # fmt: skip
    """Print what would learn, unless `as_json` is None, and write the page of samples where one is wanted."""
    from embedkit.finetuning.dividing import divide

    division = divide(listing, seed=recipe.seed, **splits)
    if as_json is not None:
        _print_blocks(division, backbone, recipe, as_json)
    if page is not None:
        from embedkit.finetuning.feeding.samples_page import write_samples

        train = division.train
        write_samples(
            page, train.entries, backbone.preprocessing, recipe, codes=train.codes, max_pixels=backbone.max_pixels
        )
        printing.notice(f"page: {page}")


def _print_blocks(division: Division, backbone: Backbone, recipe: Recipe, as_json: bool) -> None:
    """Print what learns and what does not, block by block."""
    from embedkit.evaluation.columns import align_columns
    from embedkit.finetuning.blocks import list_states
    from embedkit.finetuning.stages import make_ready

    states = list_states(make_ready(backbone, recipe, len(division.classes))[0], recipe)
    frozen, trainable = sum(state.frozen for state in states), sum(state.trainable for state in states)
    if as_json:
        for state in states:
            click.echo(json.dumps(dataclasses.asdict(state)))
        return
    rows = [["block", "frozen", "trainable", "from epoch"]]
    rows += [[each.name, f"{each.frozen:,}", f"{each.trainable:,}", str(each.from_epoch or "never")] for each in states]
    if not states[-1].trainable:
        rows[-1][-1] = "afterwards"
    rows.append(["all", f"{frozen:,}", f"{trainable:,}", ""])
    click.echo(division.to_text())
    click.echo("\n".join(align_columns(rows, "<>>>")))


def _print_report(output: Path, store: Path | None, *, as_json: bool, quiet: bool) -> int:
    """Print what a run bought, and return the exit code."""
    from embedkit.finetuning.comparison import BeforeAfter
    from embedkit.finetuning.run_folder import RunFolder

    folder = RunFolder(output)
    values = folder.read_report()
    if as_json:
        click.echo(json.dumps(values))
    elif values.get("comparison") is None:
        click.echo(f"{output}: adapted; nothing was compared")
    else:
        click.echo(BeforeAfter.from_dict(values["comparison"]).to_text(), nl=False)
    printing.notice(f"backbone: {output}; head: {folder.head}; page: {folder.page}", quiet)
    failures = list(values.get("failures") or ())
    made = next((path for path in (folder.before, store) if path is not None and path.is_file()), None)
    printing.failed_images(failures, int(values.get("failed") or len(failures)), made, quiet)
    return 3 if failures else 0
