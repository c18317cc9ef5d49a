"""The commands that look at how the rows of stores lie to one another."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from embedkit.cli import printing
from embedkit.cli.options import FILE, json_option, layer_option, quiet_option
from embedkit.text import counted, printable

if TYPE_CHECKING:
    from embedkit.index.clusters import Clusters
    from embedkit.index.outliers import Outlier

WIDEST_LABEL = 30
SHOWN_CLUSTERS = 30
CLEAR_SILHOUETTE = 0.25  # Below, Kaufman and Rousseeuw speak of no substantial structure.


class QueryBar(printing.CountBar):
    """The bar of a retrieval report."""

    unit = " queries"


class _ClusterCount(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """A number of clusters, or auto."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        if not value.isdecimal() or not 1 <= len(value) <= 9 or int(value) < 1:
            self.fail(f"{value!r} is neither auto nor a number of clusters such as 20", param, ctx)
        return int(value)


class _Depths(click.ParamType):  # type: ignore[type-arg]
    """Comma-separated numbers from 1 on."""

    name = "number[,...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        depths = value.split(",")
        if not all(depth.isdecimal() and len(depth) <= 9 and int(depth) for depth in depths):
            self.fail(f"{value!r} is not one number from 1 on or several with commas between them", param, ctx)
        return tuple(map(int, depths))


@click.command()
@click.argument("queries", type=FILE, metavar="QUERY_STORE")
@click.argument("gallery", type=FILE, metavar="[GALLERY_STORE]", required=False)
@click.option(
    "-k", "ks", type=_Depths(), default=(1, 5, 10), show_default="1,5,10", metavar="K[,...]",
    help="Depths of recall and precision.",
)  # fmt: skip
@click.option(
    "--exclude-self/--include-self", "exclude_self", default=None,
    help="Leave each query's own image out of what it finds, or count it; to be said when the stores share images.",
)  # fmt: skip
@click.option(
    "--metric", type=click.Choice(["cosine", "ip", "l2"]), default="cosine", show_default=True,
    help="What ranks the gallery.",
)  # fmt: skip
@click.option("--index", "index_path", type=FILE, metavar="INDEX", help="Measure what this index of the gallery finds.")
@layer_option
@json_option
@quiet_option
def retrieve(
    queries: Path,
    gallery: Path | None,
    ks: tuple[int, ...],
    exclude_self: bool | None,
    metric: str,
    index_path: Path | None,
    layer: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how well the images of QUERY_STORE find images of their class in GALLERY_STORE.

    Without GALLERY_STORE, the one store is both, or with --index the index's store is the gallery. Every query is
    compared with every row, or with --index with what the index finds; recall@k, precision@k, mAP@R,
    R-precision and MRR are fractions, over all queries and for each class. Classes are matched by their names. Queries
    without a label, and those of whose class there is no other row, are left out and counted.
    """
    from embedkit.index.neighbours import Index
    from embedkit.index.retrieval import retrieval_report
    from embedkit.store import Store

    ranked = click.get_current_context().get_parameter_source("metric") is ParameterSource.COMMANDLINE
    if index_path is not None and ranked:
        raise click.UsageError("--metric goes without --index: an index ranks by its own")
    query_store = Store.open(queries, layer=layer)
    gallery_store = None if gallery is None else Store.open(gallery, layer=layer)
    with QueryBar(quiet) as bar:
        report = retrieval_report(
            query_store,
            gallery_store,
            ks=ks,
            metric=metric,
            exclude_self=exclude_self,
            index=None if index_path is None else Index.open(index_path),
            progress=bar.update,
        )
    click.echo(json.dumps(report.to_dict()) if as_json else report.to_text(), nl=as_json)


@click.command()
@click.argument("store", type=FILE)
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="Neighbours of each image.")
@click.option("--top", type=click.IntRange(0), default=20, show_default=True, help="How many to print; 0 prints all.")
@click.option("--by-class", "within_class", is_flag=True, help="Compare with images of the same class only.")
@layer_option
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("-p", "--plain", is_flag=True, help="Print paths only, one a line.")
@quiet_option
def outliers(
    store: Path,
    k: int,
    top: int,
    within_class: bool,
    layer: str | None,
    as_json: bool,
    as_csv: bool,
    plain: bool,
    quiet: bool,
) -> None:
    """Print the images of STORE that are farthest from their neighbours.

    The distance is the mean cosine distance to the k nearest other images; z is by how many robust standard deviations
    it is above the median, and beyond 3.5 is commonly called an outlier. With --by-class both are taken within the
    class, and what stands out is odd for its class or has the wrong label.
    """
    from embedkit.index.outliers import find_outliers
    from embedkit.store import Store

    if as_json + as_csv + plain > 1:
        raise click.UsageError("--json, --csv and --plain exclude one another")
    with printing.RowBar(quiet) as bar:
        found = find_outliers(Store.open(store, layer=layer), k, within_class=within_class, progress=bar.update)
    rows = found.top(top or None)
    if plain:
        for one in rows:  # As bytes: a path is printed as it is, whatever it holds.
            click.echo(os.fsencode(one.path or one.id))
    elif as_json:
        for one in rows:
            click.echo(json.dumps(vars(one) | {"path": None if one.path is None else os.fspath(one.path)}))
    elif as_csv:
        names = ["rank", "id", "label", "distance", "z_score", "nearest"]
        printing.print_csv(names, ([vars(one)[name] for name in names] for one in rows))
    else:
        _outlier_table(list(rows))
        beyond = int((found.z_scores > 3.5).sum())
        left_out = len(found.store) - len(found)
        more = f"; {left_out:,} without a label, or alone in their class, were left out" if left_out else ""
        printing.notice(f"{beyond:,} of {len(found):,} images have a z above 3.5{more}", quiet)


@click.command("cluster")
@click.argument("store", type=FILE)
@click.option("-k", type=_ClusterCount(), default="auto", show_default=True, help="How many clusters.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of what is drawn.")
@layer_option
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print the cluster of every image, and its similarity, as CSV.")
@quiet_option
def cluster_store(
    store: Path, k: int | str, seed: int, layer: str | None, as_json: bool, as_csv: bool, quiet: bool
) -> None:
    """Group the images of STORE that look alike, by k-means.

    Printed are the sizes of the clusters, the image nearest to each centre, and where there are labels, how well the
    clusters agree with them. With auto, the number is chosen among 2 to 256 by a silhouette; a store without separate
    groups gets few clusters, and any number may be given instead.
    """
    from embedkit.index.clusters import cluster
    from embedkit.store import Store

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude one another")
    opened = Store.open(store, layer=layer)
    if isinstance(k, int) and k > len(opened):
        raise click.UsageError(f"-k asks for {k:,} clusters, {store} has {len(opened):,} rows")
    with printing.saying_when_long("clustering", quiet), printing.RowBar(quiet) as bar:
        found = cluster(opened, k, seed=seed, progress=bar.update)
    if as_csv:
        columns = (found.assignments.tolist(), found.similarities.astype("U32").tolist())
        printing.print_csv(["id", "cluster", "similarity"], zip(opened.ids, *columns, strict=True))
    elif as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        click.echo(cluster_text(found))


def cluster_text(found: Clusters) -> str:
    """Return what clusters there are, for people."""
    values = found.to_dict()
    labelled = bool(found.labelled.any())
    rows = [["cluster", "size", "similarity", *(["class", "share"] if labelled else []), "medoid"]]
    for one in values["clusters"][:SHOWN_CLUSTERS]:
        share = [_short(one.get("label", "-")), f"{one.get('label_share', 0):.2f}"] if labelled else []
        rows.append(
            [str(one["cluster"]), f"{one['size']:,}", f"{one['similarity']:.3f}", *share, printable(one["medoid"])]
        )
    lines = _columns(rows, ">>><><" if labelled else ">>><")
    more = len(values["clusters"]) - SHOWN_CLUSTERS
    lines += [f"... and {more:,} more (--json has all)"] if more > 0 else []
    facts = [f"{counted(len(found), 'cluster')} of {counted(len(found.store), 'image')}, seed {values['seed']}"]
    if labelled:
        facts.append(
            f"purity {values['purity']:.4f}, NMI {values['nmi']:.4f} with the {len(found.store.classes):,} classes"
        )
    if found.candidates:
        best = max(candidate.silhouette for candidate in found.candidates)
        verdict = "" if best >= CLEAR_SILHOUETTE else "; below 0.25 no number stands out, and any may be given with -k"
        facts.append(
            f"chosen of {len(found.candidates)} numbers by the silhouette, which is {best:.2f} at best{verdict}"
        )
    return "\n".join([*lines, "", *facts])


def _outlier_table(rows: Sequence[Outlier]) -> None:
    header = ["rank", "z", "distance", "label", "id"]
    cells = [
        [str(one.rank), f"{one.z_score:.2f}", f"{one.distance:.4f}", _short(one.label or ""), printable(one.id)]
        for one in rows
    ]
    click.echo("\n".join(_columns([header, *cells], ">>><<")))


def _short(label: str) -> str:
    text = printable(label)
    return text if len(text) <= WIDEST_LABEL else text[: WIDEST_LABEL - 3] + "..."


def _columns(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Return rows of cells as aligned lines; `alignment` has < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True)).rstrip()
        for row in rows
    ]
