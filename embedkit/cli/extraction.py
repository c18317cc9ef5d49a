"""The command that makes stores."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from embedkit.cli import printing
from embedkit.cli.options import (
    COUNT_OR_SHARE,
    FILE,
    NAMES,
    backbone_arguments,
    backbone_options,
    devices_option,
    json_option,
    model_option,
    quiet_option,
    source_arguments,
    source_options,
)

_UNNAMED = "name the store with -o, such as -o photos.h5; only that of one folder has a name by itself"


@click.command()
@click.argument("images", nargs=-1, metavar="[IMAGES]...")
@click.option(
    "-o", "--output", type=FILE, help="The store to make or update.  [default: photos.h5 here, for a folder photos/]"
)
@model_option
@source_options
@backbone_options
@click.option(
    "--layers", type=NAMES, default=(), metavar="POOL[,...]",
    help="More embeddings from the same pass, such as avg,layer3:gem or -1,-4.",
)  # fmt: skip
@devices_option
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
@click.option(
    "--on-error", type=click.Choice(["skip", "fail"]), default="skip", show_default=True,
    help="skip records an image that cannot be read and goes on; fail ends the run at the first.",
)  # fmt: skip
@click.option(
    "--max-failures", type=COUNT_OR_SHARE, metavar="N|P%", help="End the run when more images fail than that."
)
@click.option("--isolate", is_flag=True, help="Decode in processes of their own: one that crashes costs one image.")
@click.option(
    "--time-limit", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, metavar="SECONDS",
    help="How long an image may take with --isolate.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Count the images, try a sample, and say what the run would take.")
@click.option("--report", type=FILE, metavar="FILE", help="Write as JSON what was chosen and where the time went.")
@json_option
@quiet_option
@click.pass_context
def extract(
    ctx: click.Context,
    /,
    images: tuple[str, ...],
    output: Path | None,
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
    on_error: str,
    max_failures: float | None,
    isolate: bool,
    time_limit: float,
    dry_run: bool,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Embed every image of IMAGES into one store, or bring a store up to date with them.

    IMAGES is a folder, a tar or zip archive, several such as 'shards/{000..099}.tar', a table (.csv, .tsv, .jsonl,
    .parquet), a URL, a Hugging Face dataset (its folder, or dataset:NAME), a video with --fps, or image files;
    docs/sources.md says more. When no image lies in a folder directly, the first folder below it is each image's class.
    Of several sources, every id begins with the source's name, or with another one given as NAME=SOURCE. An image that
    cannot be read is recorded with its reason and never replaced; the exit code is then 3.

    A run that was interrupted goes on where it stopped when the same command is given again. Of a store that exists,
    unchanged images are kept without reading them, moved ones are recognised by their content, and only new and
    changed ones are computed.
    """
    from embedkit.backbones import Backbone, device_names
    from embedkit.extraction import estimate
    from embedkit.extraction import extract as extract_images
    from embedkit.images import BYTES_A_PIXEL
    from embedkit.sources import list_images

    started = time.perf_counter()
    if not images and choices["files_from"] is None:
        raise click.UsageError("name what to embed: a folder, an archive, a table, a URL, or --files-from LIST")
    output = output or _named_after(images)
    selection = source_arguments(choices)
    # Before the backbone, which may be a long download for a name that is misspelt.
    with printing.saying_when_long("listing the images", quiet):
        listing = list_images(*images, **selection, max_bytes=BYTES_A_PIXEL * choices["max_pixels"])
    if output is None:
        raise click.UsageError(_UNNAMED)
    arguments, more = backbone_arguments(**choices)
    devices = device_names(device)
    printing.default_model_notice(ctx, quiet)
    backbone = Backbone.load(model, device=devices[0], **arguments)
    printing.notice(f"backbone: {backbone.description}", quiet)
    layers = (*more, *layers)
    with backbone.isolated(time_limit) if isolate else nullcontext(backbone) as backbone:
        if dry_run:
            with printing.SampleBar(quiet) as sample:
                found = estimate(listing, output, backbone, layers=layers, workers=workers, progress=sample.update)
            click.echo(json.dumps(dataclasses.asdict(found)) if as_json else printing.estimate_text(found))
            return
        with printing.ImageBar(quiet) as bar:
            store = extract_images(
                listing, output, backbone, layers=layers, batch_size=batch_size, part_size=part_size, workers=workers,
                threads=threads, engine=engine, devices=devices if len(devices) > 1 else (), overwrite=overwrite,
                checksum=checksum, retry_failed=retry_failed, repair=repair,
                max_failures=0 if on_error == "fail" else max_failures, progress=bar.update, report=report,
            )  # fmt: skip
    seconds = time.perf_counter() - started
    printing.failures(store, quiet)
    if as_json:
        measured = {"seconds": round(seconds, 3), "images_per_second": round(bar.images_per_second, 2)}
        click.echo(json.dumps({**store.summary(), **measured, "changes": bar.changes}))
    else:
        click.echo(printing.extraction_line(store, seconds, bar.images_per_second))
    ctx.exit(3 if store.failures else 0)


def _named_after(images: tuple[str, ...]) -> Path | None:
    """Return the store of a folder that nobody has named: in the working folder, after the folder.

    None for one source that is not there, or is a pattern: whoever lists it says so.
    """
    if len(images) == 1 and Path(images[0]).is_dir():
        name = os.path.basename(os.path.abspath(images[0]))
        if name:
            return Path(f"{name}.h5")
    if len(images) != 1 or "://" in images[0] or Path(images[0]).exists():
        raise click.UsageError(_UNNAMED)
    return None
