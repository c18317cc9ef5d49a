"""The commands that build an index and search."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import click

from embedkit.cli import printing
from embedkit.cli.options import FILE, device_option, json_option, layer_option, overwrite_option, quiet_option
from embedkit.errors import EmbedkitError, StoreExistsError
from embedkit.text import counted, printable

_BYTES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class _Quantity(click.ParamType):  # type: ignore[type-arg]
    """A number with a unit."""

    def __init__(self, name: str, units: dict[str, float]) -> None:
        self.name, self.units = name, units

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([a-z]*)", value.lower())
        if found is None or found[2] not in self.units or not float(found[1]):
            units = ", ".join(filter(None, self.units))
            self.fail(f"{value!r} is not a number with a unit of {units}", param, ctx)
        return float(found[1]) * self.units[found[2]]


class _Expansion(click.ParamType):  # type: ignore[type-arg]
    """A number of neighbours and an alpha, such as 10,3."""

    name = "n,alpha"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        found = re.fullmatch(r"([1-9][0-9]{0,4}),([0-9]{1,3}(?:\.[0-9]{1,3})?)", str(value))
        if found is None:
            self.fail(f"{value!r} is not a number of neighbours and an alpha, such as 10,3", param, ctx)
        return int(found[1]), float(found[2])


@click.command("index")
@click.argument("store", type=FILE)
@click.option("-o", "--output", type=FILE, help="The folder to write.  [default: STORE with the suffix .index]")
@click.option("--factory", default="Flat", show_default=True, help="FAISS's name of an index, such as HNSW32.")
@click.option(
    "--metric", type=click.Choice(["cosine", "ip", "l2"]), default="cosine", show_default=True,
    help="Cosine similarity, inner product or Euclidean distance.",
)  # fmt: skip
@click.option(
    "--recall", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
    help="Choose the fastest index that finds this share of the exact ten neighbours, such as 0.99.",
)  # fmt: skip
@click.option(
    "--max-memory", type=_Quantity("bytes", _BYTES),
    help="Most bytes that the index may take, such as 2G. Without --recall, that is 0.99 then.",
)  # fmt: skip
@click.option("--max-latency", type=_Quantity("time", _SECONDS), help="Most time of a single query, such as 5ms.")
@click.option("--whiten", type=click.IntRange(1), metavar="WIDTH", help="Compare embeddings whitened to this width.")
@click.option(
    "--expand", "expansion", type=_Expansion(),
    help="Search again with the N nearest added to a query, by their similarity to the power of alpha: 10,3.",
)  # fmt: skip
@layer_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of held-out rows and samples.")
@click.option("--update", is_flag=True, help="Bring an index that exists up to date with its store.")
@overwrite_option
@json_option
@quiet_option
def build_index(
    store: Path, output: Path | None, factory: str, metric: str, recall: float | None, max_memory: float | None,
    max_latency: float | None, whiten: int | None, expansion: tuple[int, float] | None, layer: str | None, seed: int,
    update: bool, overwrite: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Build an index over STORE, to search faster than exactly.

    With --recall, the kinds of indexes that FAISS has are measured on rows that they do not hold, and the fastest that
    keeps to it is built. The table of what was measured is printed and kept. Without --recall and --factory the index
    is exact: it holds nothing but its options, and search reads the store.
    """
    from embedkit.index import Index, require_place
    from embedkit.store import Store

    folder = output or store.with_suffix(".index")

    def say(line: str) -> None:
        printing.notice(line, quiet)

    if update:
        given = click.get_current_context().get_parameter_source
        for name in ("factory", "metric", "recall", "max_memory", "max_latency", "whiten", "expansion", "seed"):
            if given(name) is click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError("--update keeps the index's options; to change them, build it with --overwrite")
        index = Index.open(folder, Store.open(store, layer=layer))
        added, gone = index.add(progress=say), index.gone
        say(f"{counted(added, 'row')} added; {counted(gone, 'row')} of the index gone from the store")
    else:
        if folder.exists() and not overwrite:
            raise StoreExistsError(f"{folder} exists; --update brings it up to date, and --overwrite replaces it")
        require_place(folder)
        try:
            index = Index.build(
                Store.open(store, layer=layer), factory, metric, recall=recall, max_latency=max_latency,
                max_memory=None if max_memory is None else int(max_memory), whiten=whiten, expansion=expansion,
                seed=seed, progress=say,
            )  # fmt: skip
        except EmbedkitError:
            raise
        except ValueError as error:  # A factory, width or metric that cannot be.
            raise click.UsageError(str(error)) from error
    index.save(folder)
    if as_json:
        chosen = None if index.chosen is None else dataclasses.asdict(index.chosen)
        measured = [dataclasses.asdict(one) for one in index.measurements]
        click.echo(json.dumps({"path": os.fspath(folder), "rows": len(index), "chosen": chosen, "measured": measured}))
    else:
        for line in _table(index):
            click.echo(line)
        click.echo(printable(f"{folder}: {counted(len(index), 'row')}, {index.factory}, {index.metric}"))


def _table(index: Any) -> list[str]:
    if not index.measurements:
        return []
    width = max(len(one.factory) for one in index.measurements)
    lines = [f"  {'factory':<{width}}  effort  refine  recall@10  queries/s  ms alone  bytes/row  build s"]
    lines += [
        f"{'*' if one == index.chosen else ' '} {one.factory:<{width}}  {one.effort or '':>6}  {one.refine:>6}"
        f"  {one.ann_recall:>9.4f}  {one.queries_per_second:>9,.0f}  {1000 * one.seconds:>8.2f}"
        f"  {one.bytes_per_row:>9,.0f}  {one.build_seconds:>7.1f}"
        for one in index.measurements
    ]
    return lines


@click.command()
@click.argument("store", type=FILE, metavar="STORE|INDEX")
@click.argument("queries", type=FILE, nargs=-1, metavar="[QUERY]...")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Search with a row of the store; may be repeated.")
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="Neighbours of each query.")
@click.option(
    "--where", multiple=True, metavar="FIELD=PATTERN",
    help="Search only rows whose label or id matches, such as label=cat or id=2024/*; of several, all must.",
)  # fmt: skip
@click.option(
    "--radius", type=float, help="Find everything at least so similar, by l2 at most so far, instead of the k nearest."
)
@click.option("--exclude-self", is_flag=True, help="Leave out the query itself: its row, or files of the same content.")
@layer_option
@click.option("-m", "--model", help="Where the store's backbone is now, when it has moved.")
@device_option
@json_option
@click.option("-p", "--plain", is_flag=True, help="Print paths only, one a line.")
@click.option("--html", "page", type=FILE, metavar="PAGE", help="Write one self-contained page with pictures.")
def search(
    store: Path, queries: tuple[Path, ...], ids: tuple[str, ...], k: int, where: tuple[str, ...],
    radius: float | None, exclude_self: bool, layer: str | None, model: str | None, device: str, as_json: bool,
    plain: bool, page: Path | None,
) -> None:  # fmt: skip
    """Find the images in STORE that are most like each QUERY.

    A QUERY is an image file. It is embedded by the store's own backbone and compared with every row by cosine
    similarity, exactly. Instead of a store, an index that `embedkit index` built may be named, to search as that does:
    by its metric, whitening and expansion, and as exactly as it was measured to be.
    """
    from embedkit.backbones import Backbone
    from embedkit.index import SCORE_NAMES, Index, is_index, search_page
    from embedkit.store import Store

    if not queries and not ids:
        raise click.UsageError("name an image to search with, or a row with --id")
    if is_index(store):
        if layer is not None:
            raise click.UsageError("--layer goes with a store; an index has one layer")
        index = Index.open(store)
    else:
        index = Index.build(Store.open(store, layer=layer))
    if queries and (model is not None or device != "auto"):
        index.backbone = Backbone.reload(index.store.spec, index.store.recipe, model=model, device=device)
    rows = [printing.row_of(index.store, id) for id in ids]
    result = index.search([*queries, *rows], k, where=list(where) or None, radius=radius, exclude_self=exclude_self)
    named = [(os.fspath(query), False) for query in queries] + [(id, True) for id in ids]
    printing.search_result(result, [name for name, _ in named], as_json=as_json, plain=plain)
    if page is not None:
        facts = f"{SCORE_NAMES[index.metric]}, {'exact' if index.factory == 'Flat' else index.factory}"
        page.write_text(search_page(result, named, facts=facts), encoding="utf-8")
        printing.notice(f"page: {page}")
