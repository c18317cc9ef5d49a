"""The commands. A body imports what it needs when it runs, so that --help costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import click

from embedkit.cli import printing
from embedkit.cli.options import FILE, json_option, quiet_option


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
@click.argument("pattern", required=False)
@json_option
@quiet_option
def models(pattern: str | None, as_json: bool, quiet: bool) -> None:
    """List the backbone that comes with embedkit, and timm's pretrained models.

    PATTERN is a part of the name, or has * and ?. With it, parameters and embedding width are counted as well.
    """
    from embedkit.backbones import list_models

    with printing.CountBar(quiet or pattern is None) as bar:
        found = list_models(pattern, progress=bar.update)
    printing.model_table(found, as_json=as_json)
