"""One self-contained HTML page of a suite: what was found, at what cost, where it fails, and how it was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from embedkit.backbones import usable_processors
from embedkit.errors import EmbedkitError
from embedkit.evaluation.benching import versions
from embedkit.evaluation.cell_details import Pictures, cell_details, name, table, text
from embedkit.evaluation.cells import Cell, write_whole
from embedkit.evaluation.charts import COLOURS, Point, scatter_chart
from embedkit.evaluation.speeds import machine_name
from embedkit.evaluation.standings import (
    LEGEND,
    Place,
    Standing,
    csv_table,
    markdown_table,
    rank_cells,
    text_table,
)
from embedkit.evaluation.suites import Suite, file_name
from embedkit.store import Store
from embedkit.store.locking import now
from embedkit.text import counted

PICTURES = 360
DETAILS = 60

_PALETTE = ["#2f6fde", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#8f6a00", "#5c5f66"]
_DARK = ["#74a7ff", "#ff9b6a", "#69c57d", "#d79ae8", "#f783ac", "#66d0e0", "#e0b84c", "#b0b4bb"]
_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --good: 43 138 62; --bad: 217 72 15; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.25rem; border-top: 1px solid var(--line); padding-top: 1.5rem;
  margin-top: 2.5rem; } h3 { font-size: 1rem; } h4 { font-size: .9rem; margin: 1.5rem 0 .4rem; }
h1, h2, h3, h4, p, figcaption { overflow-wrap: anywhere; }
.soft, small, figcaption { opacity: .75; font-size: .85rem; } small { display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; font-size: .85rem; } .n { text-align: right; white-space: nowrap; }
.w { min-width: 11em; }
.best { font-weight: 700; } .mark { opacity: .75; font-weight: 400; font-size: .8rem; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.beside { display: flex; flex-wrap: wrap; gap: 0 3rem; } section { max-width: 100%; }
figure { margin: 0; } .small { width: 19rem; max-width: 100%; } svg { width: 100%; height: auto; display: block; }
svg text { fill: currentColor; font: 11px system-ui, sans-serif; } svg .axis { font-size: 12px; }
svg .tick { opacity: .75; } .grid { stroke: var(--line); stroke-width: .6; fill: none; }
.frame { fill: var(--soft); } .diagonal { stroke: currentColor; stroke-dasharray: 3 3; opacity: .6; }
.whisker { stroke: currentColor; stroke-width: 1.5; opacity: .6; } circle { fill: currentColor; }
.curve { stroke: currentColor; stroke-width: 1.6; fill: none; }
.reliability rect:not(.frame) { fill: currentColor; } .reliability .count { opacity: .5; }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; } details { border-bottom: 1px solid var(--line); }
.confusion td { background: rgb(var(--bad) / calc(var(--share) * .9)); padding: .3rem .6rem; min-width: 2rem; }
.confusion .right { background: rgb(var(--good) / calc(var(--share) * .45)); }
meter { width: 8rem; height: .8rem; }
.pictures { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); list-style: none;
  padding: 0; margin: .5rem 0 1.5rem; }
img, .missing { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--soft); border-radius: 6px; }
.missing { display: grid; place-items: center; font-size: .75rem; text-align: center; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; } dt { opacity: .75; } dd { margin: 0;
  overflow-wrap: anywhere; } code { font-size: .85rem; }
"""


@dataclass(frozen=True)
class Circumstances:
    """How a suite was run.

    Parameters
    ----------
    command : str
        What was typed.
    machine : str
        See `embedkit.evaluation.speeds.machine_name`.
    finished : str
        When, as ISO 8601.
    seconds : float
        How long the run took, with what it could use again.
    versions : mapping
        Of the packages.
    """

    command: str
    machine: str
    finished: str
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)


def write_reports(suite: Suite, cells: Sequence[Cell], folder: Path, *, command: str, seconds: float) -> str:
    """Write ``table.md``, ``table.csv`` and ``report.html``, and return the table as plain text.

    Parameters
    ----------
    suite : Suite
        What was measured.
    cells : sequence of Cell
        What `run_suite` returned.
    folder : Path
        Where it keeps its results; the three files are written there.
    command : str
        What was typed, for the page.
    seconds : float
        How long the run took, for the page.
    """
    standings = rank_cells(suite, cells)
    run = Circumstances(command, machine_name(), now(), seconds, versions())
    for file, written in (
        ("table.md", markdown_table(suite, standings)),
        ("table.csv", csv_table(standings)),
        ("report.html", bench_page(suite, standings, folder, run)),
    ):
        write_whole(folder / file, written.encode("utf-8", "backslashreplace"))
    return text_table(standings)


def bench_page(
    suite: Suite, standings: Sequence[Standing], folder: Path, circumstances: Circumstances, *, pictures: int = PICTURES
) -> str:
    """Return the report of a suite as one page.

    Parameters
    ----------
    suite : Suite
        What was measured.
    standings : sequence of Standing
        What `rank_cells` returned.
    folder : Path
        Where `run_suite` keeps the stores, which know where the pictures are.
    circumstances : Circumstances
        How it was run.
    pictures : int, default 360
        How many thumbnails the page may hold, some 8 kB each.

    Returns
    -------
    str
        HTML that needs no other file and asks no network. What does not fit is left out, and the page says so.
    """
    room = Pictures(pictures)
    colours = {backbone.name: number for number, backbone in enumerate(suite.backbones)}
    body, left = [], DETAILS
    for standing in standings:
        body.append(f"<h2>{text(standing.data)}</h2>{_standing(standing)}{_charts(standing, colours)}")
        places = _in_order(standing)
        shown = places[: max(0, left)]
        body += [_details(place, folder, room, is_open=not number) for number, place in enumerate(shown)]
        if len(places) > len(shown):
            body.append(f"<p class=soft>{len(places) - len(shown)} cells are left out here; cells/ has them.</p>")
        left -= len(places)
    if room.left_out:
        body.append(f"<p class=soft>{counted(room.left_out, 'picture')} left out: a page holds {pictures}.</p>")
    facts = ", ".join(
        counted(len(parts), noun)
        for parts, noun in ((suite.backbones, "backbone"), (suite.data, "data set"), (suite.protocols, "protocol"))
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">\n<title>{text(suite.name)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<style>{page_style()}</style>\n"
        f"<header><h1>{text(suite.name)}</h1><p class=soft>{facts}; {text(circumstances.finished)}</p></header>\n"
        + "\n".join([*body, _failures(standings), _circumstances(standings, circumstances)])
        + "\n</html>\n"
    )


def page_style() -> str:
    """Return the style sheet of our pages: light and dark, tables, charts, pictures."""
    light, dark = (
        " ".join(f"--c{number}: {colour};" for number, colour in enumerate(colours)) for colours in (_PALETTE, _DARK)
    )
    classes = "".join(f".c{number} {{ color: var(--c{number}); }}\n" for number in range(COLOURS))
    return _STYLE.replace("LIGHT", light).replace("DARK", dark) + classes


def _standing(standing: Standing) -> str:
    header = ["backbone"]
    for protocol in standing.protocols:
        metrics = sorted({place.label for place in standing.column(protocol)})
        header.append(f"{name(protocol)}<small>{text(' '.join(metrics))}</small>")
    rows = []
    for backbone, places in standing.rows:
        cells = [place.cell for place in places if place is not None]
        speed = next((cell.facts["speed"] for cell in cells if cell.images_per_second is not None), None)
        parameters = next((cell.facts["parameters"] for cell in cells if "parameters" in cell.facts), None)
        dim = next((cell.facts["dim"] for cell in cells if "dim" in cell.facts), None)
        rows.append([
            name(backbone), *map(_place, places),
            "–" if speed is None else f"<span title={chr(34)}{text(timed(speed))}{chr(34)}>"
            f"{speed['images_per_second']:,.1f}</span>",
            "–" if parameters is None else f"{parameters / 1e6:,.2f} M", "–" if dim is None else f"{dim:,}",
        ])  # fmt: skip
    kinds = "t" * (1 + len(standing.protocols)) + "nnn"
    found = table([*header, "images/s", "parameters", "width"], rows, kinds)
    return f"{found}<p class=soft>{text(LEGEND.replace('* the best', 'bold: the best'))}.</p>"


def _place(place: Place | None) -> str:
    if place is None or not place.metric:
        return text("–" if place is None else place.text)
    marks = {"best": "", "even": " = best", "behind": "", "unknown": " ? not the same test rows"}
    chance = "" if place.p_value is None else f" title={chr(34)}p = {place.p_value:.2g} against the best{chr(34)}"
    low, high = place.interval
    return (
        f'<span class="{text(place.mark)}"{chance}>{place.value:.4f}<span class=mark>{marks[place.mark]}</span></span>'
        f"<small>[{low:.4f}, {high:.4f}]</small>"
    )


def timed(speed: Mapping[str, object]) -> str:
    """Return what was timed, in words."""
    what = {"extraction": "the extraction of the training images", "sample": "a random sample of the training images"}
    return (
        f"{what.get(str(speed.get('what')), '?')}: {speed.get('images')} images in {speed.get('seconds')} s on "
        f"{speed.get('device')}, engine {speed.get('engine')}, {speed.get('workers')} workers, "
        f"{speed.get('batch_size')} a pass, {speed.get('measured')}, load {speed.get('load', '?')}"
    )


def _charts(standing: Standing, colours: Mapping[str, int]) -> str:
    figures = []
    for protocol in standing.protocols:
        places = standing.column(protocol)
        for label, cost in (("images/s", _speed), ("parameters, millions", _millions)):
            points = [
                Point(
                    place.cell.backbone, value, place.value, place.interval[0], place.interval[1],
                    colours.get(place.cell.backbone, 0),
                    f"{place.cell.backbone}: {place.metric} {place.text.rstrip(' *=?')}, {value:,.4g} {label}",
                )
                for place in places
                if (value := cost(place.cell)) is not None and value > 0
            ]  # fmt: skip
            if points:
                metric = places[0].label
                chart = scatter_chart(points, label, metric, (-1.0 if metric == "r2" else 0.0, 1.0))
                caption = f"{name(protocol)}: {text(metric)} against {label}"
                figures.append(f"<figure><figcaption>{caption}</figcaption>{chart}</figure>")
    note = (
        "<p class=soft>Images/s: from the files to the embeddings, on the machine below; the mouse on a number in the "
        f"table says what was timed. Bars are 95 % intervals.{_busy(standing)}</p>"
    )
    return f"<div class=charts>{''.join(figures)}</div>{note}" if figures else ""


def _busy(standing: Standing) -> str:
    """Return a warning where other programs ran while backbones were timed."""
    cells = [place.cell for _, row in standing.rows for place in row if place is not None]
    loads = [cell.facts["speed"].get("load") for cell in cells if cell.images_per_second is not None]
    most = max((load for load in loads if isinstance(load, int | float)), default=0.0)
    if most <= usable_processors() + 0.5:
        return ""
    return f" The machine was busy with other programs, its load up to {most:.1f}: these rates are too low."


def _speed(cell: Cell) -> float | None:
    return cell.images_per_second


def _millions(cell: Cell) -> float | None:
    return cell.facts["parameters"] / 1e6 if "parameters" in cell.facts else None


def _in_order(standing: Standing) -> list[Place]:
    """Return the places of the measured cells, those of each protocol by their values."""
    columns = [sorted(standing.column(one), key=lambda place: -place.value) for one in standing.protocols]
    return [place for column in columns for place in column]


def _details(place: Place, folder: Path, room: Pictures, is_open: bool) -> str:
    cell = place.cell
    assert cell.report is not None
    title = f"{name(cell.backbone)}, {name(cell.protocol)}: {place.label} {place.value:.4f}"
    inside = cell_details(cell.report, _test_store(cell, folder), room)
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>{inside}</details>"


def _test_store(cell: Cell, folder: Path) -> Store | None:
    """Return the store of a cell's test rows, if it is still the one that was probed."""
    start = f"{file_name(cell.backbone)}--{file_name(cell.data)}"
    for path, content_id in ((f"{start}--test.h5", cell.key.get("test")), (f"{start}.h5", cell.key.get("train"))):
        try:
            store = Store.open(folder / "stores" / path)
        except EmbedkitError:
            continue
        if store.content_id == content_id:
            return store
    return None


def _failures(standings: Sequence[Standing]) -> str:
    failed = [
        place.cell for standing in standings for _, row in standing.rows for place in row if place and place.cell.error
    ]
    if not failed:
        return ""
    rows = [[name(cell.backbone), name(cell.data), name(cell.protocol), text(cell.error)] for cell in failed[:DETAILS]]
    left = len(failed) - len(rows)
    note = f"<p class=soft>{left} more are left out.</p>" if left else ""
    return f"<h2>Failed</h2>{table(['backbone', 'data', 'protocol', 'why'], rows, 'tttw')}{note}"


def _circumstances(standings: Sequence[Standing], run: Circumstances) -> str:
    cells = [place.cell for standing in standings for _, row in standing.rows for place in row if place is not None]
    reused = sum(cell.reused for cell in cells)
    versions = ", ".join(f"{package} {number}" for package, number in run.versions.items())
    facts = {
        "command": f"<code>{text(run.command)}</code>",
        "machine": text(run.machine),
        "time": f"{run.seconds:,.1f} s, finished {text(run.finished)}",
        "cells": f"{counted(len(cells), 'cell')}, of which {reused} were measured by earlier runs and are unchanged",
        "versions": text(versions),
    }
    items = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in facts.items())
    return f"<h2>How it was run</h2><dl>{items}</dl>"
