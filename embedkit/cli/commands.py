"""The commands. A body imports what it needs when it runs, so that --help costs nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from embedkit.cli import printing
from embedkit.cli.options import (
    FILE,
    device_option,
    json_option,
    layer_option,
    quiet_option,
)


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
@click.argument("store", type=FILE)
@click.argument("queries", type=FILE, nargs=-1, metavar="[QUERY]...")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Search with a row of the store; may be repeated.")
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="Neighbours of each query.")
@layer_option
@click.option("-m", "--model", help="Where the store's backbone is now, when it has moved.")
@device_option
@json_option
@click.option("-p", "--plain", is_flag=True, help="Print paths only, one a line.")
@click.option("--html", "page", type=FILE, metavar="PAGE", help="Write one self-contained page with pictures.")
def search(
    store: Path,
    queries: tuple[Path, ...],
    ids: tuple[str, ...],
    k: int,
    layer: str | None,
    model: str | None,
    device: str,
    as_json: bool,
    plain: bool,
    page: Path | None,
) -> None:
    """Find the images in STORE that are most like each QUERY.

    A QUERY is an image file. It is embedded by the store's own backbone and compared with every row by cosine
    similarity, exactly.
    """
    from embedkit.backbones import Backbone
    from embedkit.index import Index, search_page
    from embedkit.store import Store

    if not queries and not ids:
        raise click.UsageError("name an image to search with, or a row with --id")
    index = Index.build(Store.open(store, layer=layer))
    if queries and (model is not None or device != "auto"):
        index.backbone = Backbone.reload(index.store.spec, index.store.recipe, model=model, device=device)
    rows = [printing.row_of(index.store, id) for id in ids]
    result = index.search([*queries, *rows], k)
    named = [(os.fspath(query), False) for query in queries] + [(id, True) for id in ids]
    printing.search_result(result, [name for name, _ in named], as_json=as_json, plain=plain)
    if page is not None:
        page.write_text(search_page(result, named), encoding="utf-8")
        printing.notice(f"page: {page}")


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
