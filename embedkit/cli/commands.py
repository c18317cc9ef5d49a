"""The commands. A body imports what it needs when it runs, so that --help costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import click

from embedkit.cli import printing
from embedkit.cli.options import FILE, json_option, layer_option, quiet_option


@click.command()
@click.argument("store", type=FILE)
@click.option("--failures", is_flag=True, help="List every image that could not be read, its kind of failure, and why.")
@click.option("--csv", "as_csv", is_flag=True, help="With --failures: print CSV with the columns id, kind and error.")
@json_option
def info(store: Path, failures: bool, as_csv: bool, as_json: bool) -> None:
    """Say what STORE holds and what produced it.

    Failures are counted by kind, and the first few of each are shown. With --failures, they alone are printed, and all
    of them: as a table, as CSV, or as JSON lines. File names are written to CSV as they are, byte for byte.
    """
    from embedkit.store import Store

    if as_csv and (as_json or not failures):
        raise click.UsageError("--csv goes with --failures, and not with --json")
    opened = Store.open(store)
    if failures:
        printing.failure_table(opened, as_json=as_json, as_csv=as_csv)
    else:
        click.echo(json.dumps(opened.summary()) if as_json else printing.info_text(opened))


@click.command()
@click.argument("train", type=FILE)
@click.argument("test", type=FILE, required=False)
@click.option("--split", type=FILE, help="CSV with the columns path and split (and perhaps label), for one store.")
@click.option("--train-split", default="train", show_default=True, help="What --split calls the rows to fit.")
@click.option("--test-split", help="What it calls the rows to score.  [default: test, else val]")
@layer_option
@click.option("--protocol", default="default", show_default=True, help="How to fit and score.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the held-out part and the bootstrap.")
@json_option
@quiet_option
def probe(
    train: Path,
    test: Path | None,
    split: Path | None,
    train_split: str,
    test_split: str | None,
    layer: str | None,
    protocol: str,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fit a linear probe and a k-NN on the store TRAIN and score them on the store TEST.

    With --split, one store is both. Hyper-parameters are chosen on a held-out part of the training rows; the test
    rows are scored once.
    """
    from embedkit.evaluation import probe as probe_stores
    from embedkit.store import Store

    other = None if test is None else Store.open(test, layer=layer)
    report = probe_stores(
        Store.open(train, layer=layer), other, split=split, protocol=protocol, seed=seed, train_split=train_split,
        test_split=test_split, progress=lambda line: printing.notice(line, quiet),
    )  # fmt: skip
    click.echo(json.dumps(report.to_dict()) if as_json else report.to_text())


@click.command()
@click.argument("pattern", required=False)
@json_option
@quiet_option
def models(pattern: str | None, as_json: bool, quiet: bool) -> None:
    """List timm's pretrained models.

    PATTERN is a part of the name, or has * and ?. With it, parameters and embedding width are counted as well.
    """
    from embedkit.backbones import list_models

    with printing.CountBar(quiet or pattern is None) as bar:
        found = list_models(pattern, progress=bar.update)
    printing.model_table(found, as_json=as_json)
