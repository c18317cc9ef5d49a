"""The commands that work on stores alone."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import click

from embedkit.cli import printing
from embedkit.cli.options import FILE, json_option, overwrite_option, quiet_option
from embedkit.errors import EmbedkitError
from embedkit.text import printable


@click.command()
@click.argument("store", type=FILE)
@json_option
def status(store: Path, as_json: bool) -> None:
    """Say what stands at STORE: none, unfinished, busy or finished.

    Nobody who writes there is disturbed.
    """
    from embedkit.store import Store

    found = Store.status(store)
    values = {name: value for name, value in dataclasses.asdict(found).items() if value is not None}
    click.echo(json.dumps(values) if as_json else printing.status_line(store, found))


@click.command()
@click.argument("stores", type=FILE, nargs=-1, required=True, metavar="STORE...")
@json_option
@quiet_option
@click.pass_context
def verify(ctx: click.Context, /, stores: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """Compare every byte of each STORE with the checksums that were written with it.

    Damaged embeddings are named by their rows; `embedkit extract --repair` computes exactly those again. What has no
    damage must also be a store: its embeddings finite, its ids in order, its labels names of classes. The exit code is
    1 when anything is damaged or cannot be read; the other stores are verified all the same.
    """
    from embedkit.store import verify as verify_store

    damaged = False
    for store in stores:
        try:
            with printing.ByteBar(quiet) as bar:
                problems = verify_store(store, progress=bar.update)
        except (EmbedkitError, OSError) as error:
            printing.error_lines(error, store)
            damaged = True
            continue
        damaged = damaged or bool(problems)
        if as_json:
            click.echo(json.dumps({"path": os.fspath(store), "problems": [dataclasses.asdict(p) for p in problems]}))
        else:
            for problem in problems:
                click.echo(printable(f"{store}: {problem}"))
            if not problems:
                click.echo(printable(f"{store}: every byte is as it was written"))
    ctx.exit(1 if damaged else 0)


@click.command()
@click.argument("stores", type=FILE, nargs=-1, required=True, metavar="STORE...")
@click.option("-o", "--output", type=FILE, required=True, help="The store to make.")
@click.option(
    "--on-conflict", type=click.Choice(["error", "first", "newest"]), default="error", show_default=True,
    help="Which row stays when an id stands for different content.",
)  # fmt: skip
@overwrite_option
@json_option
@quiet_option
def merge(
    stores: tuple[Path, ...], output: Path, on_conflict: str, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Make one store of several that were made by the same backbone in the same way."""
    from embedkit.store import merge as merge_stores

    with printing.ByteBar(quiet) as bar:
        made = merge_stores(stores, output, on_conflict=on_conflict, overwrite=overwrite, progress=bar.update)
    click.echo(json.dumps(made.summary()) if as_json else printing.store_line(made))


@click.command()
@click.argument("store", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The store to make.")
@click.option(
    "--where", multiple=True, metavar="FIELD=PATTERN",
    help="Rows whose label or id matches, such as label=cat or id=2024/*; of several, all must.",
)  # fmt: skip
@click.option("--ids", type=FILE, metavar="LIST", help="Rows whose ids are in a file, one a line; - reads them.")
@click.option(
    "--split", type=(FILE, str), metavar="CSV NAME", help="Rows that a CSV with the columns path and split calls NAME."
)
@overwrite_option
@json_option
@quiet_option
def select(
    store: Path,
    output: Path,
    where: tuple[str, ...],
    ids: Path | None,
    split: tuple[Path, str] | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write some rows of STORE as a store of their own: those that every option given names."""
    from embedkit.store import Store, matching, named

    if not where and ids is None and split is None:
        raise click.UsageError("say which rows: --where, --ids or --split")
    opened = Store.open(store)
    chosen = matching(opened, where)
    if ids is not None:
        lines = (sys.stdin.buffer if os.fspath(ids) == "-" else ids.open("rb")).read().splitlines()
        chosen &= named(opened, [os.fsdecode(line) for line in lines if line], all_of_them=True)
    if split is not None:
        from embedkit.evaluation import Split

        path, part = split
        parts = Split.read(path).parts
        if part not in parts.values():
            names = ", ".join(repr(name) for name in sorted(set(parts.values())))
            raise click.UsageError(f"{path} has no split {part!r}; it has {names}")
        chosen &= named(opened, [id for id, name in parts.items() if name == part])
    with printing.ByteBar(quiet) as bar:
        made = opened.select(output, chosen, overwrite=overwrite, progress=bar.update)
    click.echo(json.dumps(made.summary()) if as_json else printing.store_line(made))


@click.command("export")
@click.argument("store", type=FILE)
@click.argument("output", type=FILE)
@overwrite_option
@quiet_option
def export_store(store: Path, output: Path, overwrite: bool, quiet: bool) -> None:
    """Write STORE in another format: OUTPUT ends in .parquet, .npy, .safetensors, .csv or .lance.

    The spec goes along where the format has room for it; .npy gets a .json beside it.
    """
    from embedkit.store import Store

    with printing.RowBar(quiet) as bar:
        written = Store.open(store).export(output, overwrite=overwrite, progress=bar.update)
    for path in written:
        click.echo(printable(os.fspath(path)))


@click.command("import")
@click.argument("source", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The store to make.")
@click.option("--names", type=FILE, help="Ids of a bare .npy: .txt (one a line), .json, .csv or .parquet.")
@click.option("--name", help="What made the embeddings, when the file does not say; only stores of one name compare.")
@overwrite_option
@json_option
@quiet_option
def import_store(
    source: Path, output: Path, names: Path | None, name: str | None, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Make a store of embeddings that lie in another format.

    SOURCE is a .npy, .npz, .parquet or .safetensors file, or a folder that thingsvision or clip-retrieval wrote. What
    embedkit exported comes back as it was. Other embeddings do not say what made them: their store is marked so, and
    searching it by image is refused.
    """
    from embedkit.store import Store

    with printing.RowBar(quiet) as bar:
        made = Store.import_from(source, output, names=names, name=name, overwrite=overwrite, progress=bar.update)
    click.echo(json.dumps(made.summary()) if as_json else printing.store_line(made))
