"""The command that says what is on images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedkit.cli import printing
from embedkit.cli.options import FILE, device_option, json_option, quiet_option, source_arguments, source_options
from embedkit.text import counted, printable

if TYPE_CHECKING:
    from embedkit.errors import ImageError
    from embedkit.evaluation.predicting import Prediction, Predictions


@click.command()
@click.argument("head", type=FILE)
@click.argument("images", nargs=-1, metavar="[IMAGES]...")
@click.option("--csv", "csv_file", type=FILE, metavar="OUT", help="Write a CSV file instead of printing.")
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Labels of each image.")
@source_options
@click.option("-m", "--model", help="Where the head's backbone is now, when it has moved.")
@device_option
@click.option("-b", "--batch-size", type=click.IntRange(1), help="Images a pass.  [default: 8, on a GPU 256]")
@click.option("-j", "--workers", type=click.IntRange(1), help="Worker threads.  [default: one a processor]")
@click.option("--isolate", is_flag=True, help="Decode in processes of their own: one that crashes costs one image.")
@click.option(
    "--time-limit", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, metavar="SECONDS",
    help="How long an image may take with --isolate.",
)  # fmt: skip
@json_option
@quiet_option
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    head: Path,
    images: tuple[str, ...],
    csv_file: Path | None,
    top: int,
    model: str | None,
    device: str,
    batch_size: int | None,
    workers: int | None,
    isolate: bool,
    time_limit: float,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Say what HEAD, which `embedkit probe --save` wrote, sees in each of IMAGES.

    IMAGES are as for `embedkit extract`, or one STORE. They are embedded by the backbone and preprocessing that the
    head was fitted to; a backbone or a store that embeds otherwise is refused, with the fields that differ. Every image
    gets a line with its path, label and probability, in the order of the paths. One that cannot be read gets its reason
    instead, and the exit code is then 3.
    """
    from embedkit.evaluation.predicting import predict as predict_images
    from embedkit.heads import load_head
    from embedkit.sources import list_images

    if csv_file is not None and as_json:
        raise click.UsageError("--csv writes a file, and --json prints; give one of them")
    selection = source_arguments(choices)
    loaded = load_head(head)
    settings: dict[str, Any] = {"top": top, "batch_size": batch_size, "workers": workers}
    if len(images) == 1 and images[0].endswith(".h5"):
        _refuse_selection(ctx)
        found = predict_images(loaded, images[0], **settings)
        _finish(ctx, found, csv_file, as_json, quiet)
    if not images and selection["files_from"] is None:
        raise click.UsageError("name what to look at: a folder, an archive, a table, image files, or a store")
    with printing.saying_when_long("listing the images", quiet):
        listing = list_images(*images, **selection)
    with _backbone(loaded, model, device, time_limit if isolate else None, quiet) as backbone:
        found = predict_images(loaded, listing, backbone=backbone, **settings)
        _finish(ctx, found, csv_file, as_json, quiet)


def _backbone(head: Any, model: str | None, device: str, time_limit: float | None, quiet: bool) -> Any:
    """Return a context with the head's backbone."""
    from embedkit.evaluation.predicting import reload_backbone

    backbone = reload_backbone(head, model=model, device=device)
    printing.notice(f"backbone: {backbone.description}", quiet)
    return nullcontext(backbone) if time_limit is None else backbone.isolated(time_limit)


def _refuse_selection(ctx: click.Context) -> None:
    """Refuse options that choose among images or embed them, where there is a store."""
    chosen = [name for name in ctx.params if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE]
    others = sorted(set(chosen) - {"head", "images", "csv_file", "top", "as_json", "quiet"})
    if others:
        option = next(option for option in ctx.command.params if option.name == others[0])
        raise click.UsageError(f"{option.opts[-1]} is about images, and a store has embeddings; drop it")


def _finish(ctx: click.Context, found: Predictions, csv_file: Path | None, as_json: bool, quiet: bool) -> None:
    """Write or print every prediction, say what failed, and end."""
    if csv_file is not None:
        with printing.SampleBar(quiet) as bar:
            found.to_csv(csv_file, progress=bar.update)
        done = counted(found.total - len(found.failures), "image")
        click.echo(printable(f"{csv_file}: {done}, {len(found.failures):,} failed"))
    else:
        width = max(map(len, map(printable, found.classes)), default=0)
        for prediction in found:
            click.echo(_json_line(prediction, found) if as_json else _lines(prediction, width))
    _say_failures(found.failures, quiet)
    ctx.exit(3 if found.failures else 0)


def _json_line(prediction: Prediction, found: Predictions) -> str:
    values: dict[str, Any] = {"path": prediction.id}
    if prediction.error is not None:
        values |= {"error": prediction.error.reason, "kind": prediction.error.kind}
    elif not found.classes:
        values |= {"values": prediction.scores}
    else:
        values |= {"label": prediction.labels[0], found.score: prediction.scores[0]}
        if found.top > 1:
            pairs = zip(prediction.labels, prediction.scores, strict=True)
            values["top"] = [{"label": label, found.score: score} for label, score in pairs]
    return json.dumps(values)


def _lines(prediction: Prediction, width: int) -> str:
    """Return a line with score, label and path; of several labels, the path and a line for each."""
    path = printable(prediction.id)
    if prediction.error is not None:
        return f"failed  {path}: {printable(prediction.error.reason)}"
    if not prediction.labels:
        return f"{'  '.join(f'{value:.6g}' for value in prediction.scores)}  {path}"
    pairs = [
        f"{score:.4f}  {printable(label):<{width}}"
        for label, score in zip(prediction.labels, prediction.scores, strict=True)
    ]
    if len(pairs) == 1:
        return f"{pairs[0]}  {path}"
    return "\n".join([path, *(f"{rank:>4}  {pair}".rstrip() for rank, pair in enumerate(pairs, start=1))])


def _say_failures(failures: Sequence[ImageError], quiet: bool) -> None:
    if failures:
        counts = Counter(failure.kind for failure in failures).most_common()
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts)
        printing.notice(f"{len(failures):,} failed: {kinds}", quiet)
