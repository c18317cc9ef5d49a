"""Standings: how the backbones of a suite compare on each data set, as a table for people and for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from embedkit.errors import EvaluationError
from embedkit.evaluation.cells import Cell
from embedkit.evaluation.columns import align_columns, short_name
from embedkit.evaluation.comparing import adjust, compare
from embedkit.evaluation.suites import Suite
from embedkit.text import printable

LEVEL = 0.05
LEGEND = (
    "[95 % interval]; * the best; = the test rows prove no difference to the best (paired test on the same rows, "
    "Holm's correction within a column, level 0.05). The best was chosen on these very test rows, so its number is a "
    "little too high: choose on one part, and report another"
)
_SIGNS = {"best": " *", "even": " =", "behind": "", "unknown": " ?"}


@dataclass(frozen=True)
class Place:
    """Where one cell stands among those of its data set and protocol.

    Parameters
    ----------
    cell : Cell
        What was measured, or why it was not.
    metric : str
        Name of the headline; empty where there is none.
    value : float
        The headline.
    interval : tuple of float
        Its 95 % interval.
    mark : {"best", "even", "behind", "unknown", ""}
        The highest value, no real difference to it, a real one, no paired test on the same rows, or no value.
    p_value : float, optional
        That the difference to the best would come about by chance, after Holm's correction.
    """

    cell: Cell
    metric: str = ""
    value: float = float("nan")
    interval: tuple[float, float] = (float("nan"), float("nan"))
    mark: str = ""
    p_value: float | None = None

    @property
    def shots(self) -> int | None:
        """Of how many training rows of each class the headline is; None where it is of all of them."""
        shots = {} if self.cell.report is None else self.cell.report.metrics.get("shots", {})
        return int(list(shots)[-1]) if shots else None

    @property
    def label(self) -> str:
        """Name of the headline, with the shots of a few-shot one."""
        return self.metric if self.shots is None else f"{self.shots}-shot {self.metric}"

    @property
    def text(self) -> str:
        """What a table shows."""
        if not self.metric:
            return "failed" if self.cell.error else "-"
        return f"{self.value:.4f} [{self.interval[0]:.4f}, {self.interval[1]:.4f}]{_SIGNS[self.mark]}"


@dataclass(frozen=True)
class Standing:
    """The places of all backbones on one data set.

    Parameters
    ----------
    data : str
        Name of the data set.
    protocols : tuple of str
        The columns.
    rows : tuple of (str, tuple of Place or None)
        Name of a backbone, and its place by each protocol; None where the cell was never measured.
    """

    data: str
    protocols: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Place | None, ...]], ...]

    def column(self, protocol: str) -> list[Place]:
        """Return the places by one protocol that have a value, in the suite's order."""
        number = self.protocols.index(protocol)
        places = [row[number] for _, row in self.rows]
        return [place for place in places if place is not None and place.metric]

    def best(self, protocol: str) -> Place | None:
        """Return the place of the highest value by a protocol."""
        return next((place for place in self.column(protocol) if place.mark == "best"), None)


def rank_cells(suite: Suite, cells: Sequence[Cell]) -> list[Standing]:
    """Return how the backbones of a suite stand on each of its data sets.

    Parameters
    ----------
    suite : Suite
        Its order is that of rows and columns.
    cells : sequence of Cell
        What `run_suite` returned.

    Returns
    -------
    list of Standing
        One for each data set.

    Notes
    -----
    The best is chosen by the values that are then compared, so it looks a little better than it is. Holm's correction
    covers the comparisons of one column.
    """
    by_name = {cell.name: cell for cell in cells}
    standings = []
    for data in suite.data:
        plans = [plan for plan in suite.plans if plan.data is data]
        places: dict[str, Place] = {}
        for protocol in suite.protocols:
            column = [by_name[plan.name] for plan in plans if plan.protocol is protocol and plan.name in by_name]
            places |= _column(column)
        rows = tuple(
            (backbone.name, tuple(places.get(plan.name) for plan in plans if plan.backbone is backbone))
            for backbone in suite.backbones
        )
        standings.append(Standing(data.name, tuple(protocol.name for protocol in suite.protocols), rows))
    return standings


def _column(cells: Sequence[Cell]) -> dict[str, Place]:
    """Return the places of the cells of one data set and protocol by the cells' names."""
    measured = [cell for cell in cells if cell.report is not None]
    places = {cell.name: Place(cell) for cell in cells if cell.report is None}
    if not measured:
        return places
    best = max(measured, key=lambda cell: cell.report.headline[1])  # type: ignore[union-attr]
    p_values: dict[str, float] = {}
    for cell in measured:
        if cell is not best:
            try:
                p_values[cell.name] = compare(best.report, cell.report).p_value  # type: ignore[arg-type]
            except EvaluationError:
                continue  # Other test rows, such as where an image could not be read: there is no paired test.
    adjusted = dict(zip(p_values, adjust(list(p_values.values())), strict=True))
    for cell in measured:
        assert cell.report is not None
        metric, value, (low, high) = cell.report.headline
        p = adjusted.get(cell.name)
        mark = "best" if cell is best else "unknown" if p is None else "behind" if p < LEVEL else "even"
        places[cell.name] = Place(cell, metric, value, (low, high), mark, p)
    return places


def text_table(standings: Sequence[Standing]) -> str:
    """Return the standings as plain text for a terminal."""
    parts = []
    for standing in standings:
        lines = [_header(standing, short_name), *_rows(standing, short_name)]
        parts.append("\n".join([printable(standing.data), *align_columns(lines, _alignment(standing))]))
    return "\n\n".join([*parts, LEGEND.replace(". The", ".\nThe")])


def markdown_table(suite: Suite, standings: Sequence[Standing]) -> str:
    """Return the standings as Markdown."""
    lines = [f"# {_markdown(suite.name)}", ""]
    for standing in standings:
        lines += [f"## {_markdown(standing.data)}", ""]
        rule = ["---" if side == "<" else "---:" for side in _alignment(standing)]
        for cells in (_header(standing, _markdown), rule, *_rows(standing, _markdown)):
            lines.append(f"| {' | '.join(cell.replace(' *', ' **best**') for cell in cells)} |")
        lines.append("")
    legend = LEGEND.replace("* the best", "**best** the highest value")
    return "\n".join([*lines, f"{legend}.", ""])


def csv_table(standings: Sequence[Standing]) -> str:
    """Return the standings as CSV with one line for each cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([
        "data", "backbone", "protocol", "metric", "shots", "value", "low", "high", "mark", "p_value",
        "images_per_second", "timed", "parameters", "dim", "test_rows", "cell", "error",
    ])  # fmt: skip
    for standing in standings:
        for backbone, row in standing.rows:
            for protocol, place in zip(standing.protocols, row, strict=True):
                if place is not None:
                    writer.writerow([standing.data, backbone, protocol, *_values(place)])
    return text.getvalue()


def _values(place: Place) -> list[object]:
    cell = place.cell
    speed = cell.facts.get("speed") or {}
    told = [
        place.metric,
        "" if place.shots is None else place.shots,
        place.value,
        *place.interval,
        place.mark,
        "" if place.p_value is None else place.p_value,
    ]
    rows = "" if cell.report is None else len(cell.report.predictions["ids"])
    return [
        *(told if place.metric else [""] * 7), speed.get("images_per_second", ""), speed.get("what", ""),
        cell.facts.get("parameters", ""), cell.facts.get("dim", ""), rows, cell.name, cell.error,
    ]  # fmt: skip


def _alignment(standing: Standing) -> str:
    return "<" + "<" * len(standing.protocols) + ">>"


def _header(standing: Standing, shown: Callable[[str], str]) -> list[str]:
    metrics = []
    for protocol in standing.protocols:
        names = {place.label for place in standing.column(protocol)}
        metrics.append(f"{shown(protocol)} {'/'.join(sorted(names))}".rstrip())
    return ["backbone", *metrics, "images/s", "parameters"]


def _rows(standing: Standing, shown: Callable[[str], str]) -> list[list[str]]:
    rows = []
    for backbone, places in standing.rows:
        cells = [place.cell for place in places if place is not None]
        speed = next((cell.images_per_second for cell in cells if cell.images_per_second is not None), None)
        parameters = next((cell.facts["parameters"] for cell in cells if "parameters" in cell.facts), None)
        rows.append([
            shown(backbone), *("-" if place is None else place.text for place in places),
            "-" if speed is None else f"{speed:,.1f}", "-" if parameters is None else f"{parameters / 1e6:,.2f} M",
        ])  # fmt: skip
    return rows


def _markdown(text: str) -> str:
    """Return a name that cannot be taken for a sign of Markdown or for a tag."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>()#+!|~&" else sign for sign in printable(text))
