"""The commands. A body imports what it needs when it runs, so that --help costs nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from embedkit.cli import printing
from embedkit.cli.options import (
    FILE,
    NAMES,
    backbone_arguments,
    backbone_options,
    device_option,
    json_option,
    layer_option,
    quiet_option,
)


@click.command()
@click.argument("images", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The store to make or update, such as photos.h5.")
@click.option("-m", "--model", required=True, help="timm name, weight file, JSON sidecar, or folder with one.")
@backbone_options
@click.option(
    "--layers", type=NAMES, default=(), metavar="POOL[,...]",
    help="More embeddings from the same pass, such as avg,layer3:gem or -1,-4.",
)  # fmt: skip
@device_option
@click.option("-b", "--batch-size", type=click.IntRange(1), help="Images a pass.  [default: 8, on a GPU 256]")
@click.option("--part-size", type=click.IntRange(1), help="Images written at a time.  [default: 2 s of work]")
@click.option("-j", "--workers", type=click.IntRange(1), help="Worker threads.  [default: one a processor]")
@click.option("--threads", type=click.IntRange(1), help="Threads of each worker's pass.  [default: 1]")
@click.option(
    "--engine", type=click.Choice(["auto", "eager", "graph", "openvino", "compile"]), default="auto",
    show_default=True, help="How the network is run; auto tries them and takes the fastest that is exact.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a store that exists instead of updating it.")
@click.option("--checksum", is_flag=True, help="Tell changed images by content, whatever their time says.")
@click.option("--retry-failed", is_flag=True, help="Try images again that failed before.")
@click.option("--repair", is_flag=True, help="Compute rows again that do not match their checksums.")
@click.option("--report", type=FILE, metavar="FILE", help="Write as JSON what was chosen and where the time went.")
@json_option
@quiet_option
@click.pass_context
def extract(
    ctx: click.Context,
    /,
    images: Path,
    output: Path,
    model: str,
    layers: tuple[str, ...],
    device: str,
    batch_size: int | None,
    part_size: int | None,
    workers: int | None,
    threads: int | None,
    engine: str,
    overwrite: bool,
    checksum: bool,
    retry_failed: bool,
    repair: bool,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **backbone_choices: Any,
) -> None:
    """Embed every image below the folder IMAGES into one store, or bring a store up to date with them.

    When no image lies in IMAGES itself, the first folder below it is each image's class. An image that cannot be read
    is recorded with its reason and never replaced; the exit code is then 3.

    A run that was interrupted goes on where it stopped when the same command is given again. Of a store that exists,
    unchanged images are kept without reading them, moved ones are recognised by their content, and only new and
    changed ones are computed.
    """
    from embedkit.backbones import Backbone
    from embedkit.extraction import extract as extract_images

    started = time.perf_counter()
    arguments, more = backbone_arguments(**backbone_choices)
    backbone = Backbone.load(model, device=device, **arguments)
    printing.notice(f"backbone: {backbone.description}", quiet)
    with printing.ImageBar(quiet) as bar:
        store = extract_images(
            images, output, backbone, layers=(*more, *layers), batch_size=batch_size, part_size=part_size,
            workers=workers, threads=threads, engine=engine, overwrite=overwrite, checksum=checksum,
            retry_failed=retry_failed, repair=repair, progress=bar.update, report=report,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    printing.failures(store, quiet)
    if as_json:
        measured = {"seconds": round(seconds, 3), "images_per_second": round(bar.images_per_second, 2)}
        click.echo(json.dumps({**store.summary(), **measured, "changes": bar.changes}))
    else:
        click.echo(printing.extraction_line(store, seconds, bar.images_per_second))
    ctx.exit(3 if store.failures else 0)


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
    from embedkit.index import Index, image_path, search_page
    from embedkit.store import Store

    if not queries and not ids:
        raise click.UsageError("name an image to search with, or a row with --id")
    index = Index.build(Store.open(store, layer=layer))
    if queries and (model is not None or device != "auto"):
        index.backbone = Backbone.reload(index.store.spec, index.store.recipe, model=model, device=device)
    rows = [printing.row_of(index.store, id) for id in ids]
    result = index.search([*queries, *rows], k)
    named: list[tuple[str, Path | None]] = [(os.fspath(query), query) for query in queries]
    named += [(id, image_path(index.store, id)) for id in ids]
    printing.search_result(result, [name for name, _ in named], as_json=as_json, plain=plain)
    if page is not None:
        page.write_text(search_page(result, named), encoding="utf-8")
        printing.notice(f"page: {page}")


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
