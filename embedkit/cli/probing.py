"""The command that measures what embeddings are worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedkit.cli import printing
from embedkit.cli.options import FILE, NUMBERS, json_option, layer_option, quiet_option

if TYPE_CHECKING:
    from embedkit.store import Store


@click.command()
@click.argument("train", type=FILE)
@click.argument("test", type=FILE, required=False)
@click.option(
    "--split", type=FILE, help="CSV with the columns path and split (and perhaps label, target), for one store."
)
@click.option("--train-split", default="train", show_default=True, help="What --split calls the rows to fit.")
@click.option("--test-split", help="What it calls the rows to score.  [default: test, else val]")
@layer_option
@click.option(
    "--protocol",
    default="default",
    show_default=True,
    metavar="NAME",
    help="default, dino-knn, dinov2-logreg, clip-lbfgs, bigvision-fewshot or mteb-image.",
)
@click.option(
    "--head",
    metavar="NAME",
    help="With the default protocol: logistic, ridge, svm, lda, mean, knn or mlp.  "
    "[default: logistic, of numbers ridge]",
)
@click.option(
    "--shots", type=NUMBERS, metavar="N[,...]", help="Fit to so many rows of each class only, such as 1,2,4,8,16."
)
@click.option(
    "--seeds", type=click.IntRange(1), help="Draws of such rows to average over.  [default: the protocol's, or 5]"
)
@click.option(
    "--folds", type=click.IntRange(2), help="Cross-validate one store, or its --train-split, instead of a test."
)
@click.option(
    "--target",
    type=click.Choice(["class", "multi-label", "regression"]),
    default="class",
    show_default=True,
    help="What to read off: a class, labels with ; between them, or the numbers of the column target of --split.",
)
@click.option("--drop-leaks", is_flag=True, help="Leave out training rows that show a picture of the test part.")
@click.option("--save", type=FILE, metavar="HEAD", help="Write the fitted head, for embedkit predict.")
@click.option("--each", is_flag=True, help="Probe the embeddings and every layer of the store, and rank them.")
@click.option("--suspects", is_flag=True, help="List training rows whose labels look wrong, instead of scoring.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="Where logistic regression and the perceptron are fitted: cpu, cuda or cuda:N.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the held-out part, the shots and the bootstrap."
)
@json_option
@quiet_option
@click.pass_context
def probe(
    ctx: click.Context,
    /,
    train: Path,
    test: Path | None,
    save: Path | None,
    each: bool,
    suspects: bool,
    layer: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Fit a linear probe and a k-NN on the store TRAIN and score them on the store TEST.

    With --split, one store is both; with --folds, it is cross-validated. Hyper-parameters are chosen on a held-out part
    of the training rows; the test rows are scored once. A published --protocol has a head, a recipe and a number of
    seeds of its own: see docs/evaluation.md.
    """
    from embedkit.evaluation import probe as probe_stores
    from embedkit.store import Store

    def progress(line: str) -> None:
        printing.notice(line, quiet)

    if suspects:
        names = {"split", "train_split"} if options["split"] is not None else set()
        _only_with(ctx, "--suspects", {"layer", "folds", "seed", *names})
        _print_suspects(Store.open(train, layer=layer), options, as_json, progress)
    elif each:
        _only_with(ctx, "--each", set(options) | {"test"})
        _print_ranking(train, test, options, as_json, progress)
    else:
        other = None if test is None else Store.open(test, layer=layer)
        report = probe_stores(Store.open(train, layer=layer), other, progress=progress, **options)
        if save is not None:
            report.head.save(save)
            progress(f"head: {save}")
        click.echo(json.dumps(report.to_dict()) if as_json else report.to_text())


def _only_with(ctx: click.Context, flag: str, options: set[str]) -> None:
    """Refuse what stands on the command line beside a flag that it does not go with."""
    always = {"train", "as_json", "quiet", flag.removeprefix("--")}
    for parameter in ctx.command.params:
        name = str(parameter.name)
        given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in options | always and ctx.params[name] is not None:
            raise click.UsageError(f"{flag} does not go with {parameter.get_error_hint(ctx)}")


def _print_suspects(store: Store, options: dict[str, Any], as_json: bool, progress: Callable[[str], None]) -> None:
    from embedkit.evaluation.splits import Split, training_part
    from embedkit.evaluation.suspects import find_suspects

    split = None if options["split"] is None else Split.read(options["split"])
    part = training_part(store, split, options["train_split"])
    found = find_suspects(part, folds=options["folds"] or 5, seed=options["seed"], progress=progress)
    click.echo(json.dumps(found.to_dict()) if as_json else found.to_text())


def _print_ranking(
    train: Path, test: Path | None, options: dict[str, Any], as_json: bool, progress: Callable[[str], None]
) -> None:
    from embedkit.evaluation.ranking import rank_layers

    ranking = rank_layers(train, test, progress=progress, **options)
    click.echo(json.dumps(ranking.to_dict()) if as_json else ranking.to_text())
