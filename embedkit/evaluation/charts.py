"""Charts: accuracy against a cost, reliability, and curves, as inline SVG that follows the page's colours."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedkit.text import printable

COLOURS = 8
_LABEL = 34  # Signs of a name that is drawn; the hover title has all of it.

_Place = Callable[[float, float], tuple[float, float]]

_WIDTH, _HEIGHT = 520, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 14, 46


@dataclass(frozen=True)
class Point:
    """One backbone in a scatter chart.

    Parameters
    ----------
    name : str
        Written beside it.
    x : float
        The cost, positive.
    y, low, high : float
        The value and its interval.
    colour : int
        Which of the page's colours, the same for a backbone in all charts.
    title : str
        Shown when the mouse rests on it.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    colour: int
    title: str


@dataclass(frozen=True)
class Line:
    """One curve of a line chart.

    Parameters
    ----------
    name : str
        Shown when the mouse rests on it.
    points : sequence of tuple of float
        (x, y) by rising x, at least one.
    colour : int
        Which of the page's colours.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int


def scatter_chart(points: Sequence[Point], x_label: str, y_label: str, y_limits: tuple[float, float]) -> str:
    """Return a scatter chart with intervals, its horizontal axis logarithmic.

    Parameters
    ----------
    points : sequence of Point
        At least one.
    x_label, y_label : str
        What the axes say.
    y_limits : tuple of float
        What the values cannot leave, such as (0, 1).

    Returns
    -------
    str
        An SVG element, every text in it escaped.
    """
    xs = [math.log10(point.x) for point in points]
    left, right = _padded(min(xs), max(xs), 0.12, (-math.inf, math.inf))
    low, high = _padded(min(point.low for point in points), max(point.high for point in points), 0.06, y_limits)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        return across, _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(f"{y_label} against {x_label}")}">',
        *_across(left, right, place, low, high), *_down(low, high, place, left, right), *_titles(x_label, y_label),
    ]  # fmt: skip
    centres = [place(x, point.y) for x, point in zip(xs, points, strict=True)]
    for point, x, (across, down) in zip(points, xs, centres, strict=True):
        top, bottom = place(x, point.high)[1], place(x, point.low)[1]
        parts.append(
            f'<g class="c{point.colour % COLOURS}"><title>{_text(point.title)}</title>'
            f'<path class="whisker" d="M{across:.1f} {top:.1f}V{bottom:.1f}"/>'
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="5"/></g>'
        )
    parts += _labels(points, centres)
    return "".join([*parts, "</svg>"])


def reliability_chart(confidence: npt.NDArray[np.floating], correct: npt.NDArray[np.bool_], bins: int = 15) -> str:
    """Return a reliability diagram: the accuracy of rows by the probability that was stated, and how many there are.

    Parameters
    ----------
    confidence : array of shape (n,)
        Probability that the head gave to what it predicted, in [0, 1].
    correct : array of bool of shape (n,)
        Whether it was right.
    bins : int, default 15
        Number of bins of equal width, as in `embedkit.evaluation.metrics.calibration_error`.

    Returns
    -------
    str
        An SVG element.
    """
    size, left, top, strip = 240, 44, 10, 46
    which = np.clip(np.ceil(np.asarray(confidence, dtype=np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    shares = np.bincount(which, weights=correct, minlength=bins) / np.maximum(counts, 1)
    stated = np.bincount(which, weights=confidence, minlength=bins) / np.maximum(counts, 1)
    foot, width = top + size, size / bins
    parts = [
        f'<svg class="reliability" viewBox="0 0 {left + size + 14} {foot + strip + 44}" role="img" '
        'aria-label="accuracy against stated probability">',
        f'<rect class="frame" x="{left}" y="{top}" width="{size}" height="{size}"/>',
        f'<path class="diagonal" d="M{left} {foot}L{left + size} {top}"/>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + tick * size, foot - tick * size
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{foot + strip + 16}" text-anchor="middle">{tick:g}</text>')
    for number in np.flatnonzero(counts).tolist():
        x, share, rows = left + number * width, shares[number], counts[number] / counts.max() * (strip - 6)
        title = (
            f"{number / bins:.2f} to {(number + 1) / bins:.2f}: {counts[number]:,} rows, "
            f"stated {stated[number]:.3f}, right {share:.3f}"
        )
        parts.append(
            f'<g class="c0"><title>{title}</title>'
            f'<rect x="{x + 1:.1f}" y="{foot - share * size:.1f}" width="{width - 2:.1f}" height="{share * size:.1f}"/>'
            f'<rect class="count" x="{x + 1:.1f}" y="{foot + 4}" width="{width - 2:.1f}" height="{rows:.1f}"/></g>'
        )
    parts.append(
        f'<text class="axis" x="{left + size / 2}" y="{foot + strip + 36}" text-anchor="middle">'
        "stated probability (below the axis: rows)</text>"
        f'<text class="axis" transform="translate(11 {top + size / 2}) rotate(-90)" text-anchor="middle">'
        "share that was right</text></svg>"
    )
    return "".join(parts)


def line_chart(
    lines: Sequence[Line], x_label: str, y_label: str, *, logarithmic: bool = False, mark: float | None = None
) -> str:
    """Return a chart of curves over a linear axis.

    Parameters
    ----------
    lines : sequence of Line
        At least one.
    x_label, y_label : str
        What the axes say.
    logarithmic : bool, default False
        Whether the vertical axis is logarithmic; points that are not positive are left out then.
    mark : float, optional
        An x that a vertical line marks.

    Returns
    -------
    str
        An SVG element, every text in it escaped.

    Examples
    --------
    >>> from embedkit.evaluation.charts import Line, line_chart
    >>> line_chart([Line("loss", [(1, 0.9), (2, 0.4)], 0)], "epoch", "loss").count("<circle")
    2
    """
    curves = [[(x, y) for x, y in line.points if y > 0 or not logarithmic] for line in lines]
    xs, ys = ([point[axis] for curve in curves for point in curve] or [1.0] for axis in (0, 1))
    left, right = _padded(min(xs), max(xs), 0.04, (-math.inf, math.inf))
    ends = [math.log10(y) if logarithmic else y for y in (min(ys), max(ys))]
    low, high = _padded(ends[0], ends[1], 0.06, (-math.inf, math.inf))

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        return across, _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(f"{y_label} by {x_label}")}">',
        *_along(left, right, place, low, high),
        *(_powers if logarithmic else _down)(low, high, place, left, right), *_titles(x_label, y_label),
    ]  # fmt: skip
    if mark is not None:
        (x, top), (_, foot) = place(mark, high), place(mark, low)
        parts.append(f'<path class="diagonal" d="M{x:.1f} {top:.1f}V{foot:.1f}"/>')
    for line, curve in zip(lines, curves, strict=True):
        at = [place(x, math.log10(y) if logarithmic else y) for x, y in curve]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        parts.append(f'<g class="c{line.colour % COLOURS}"><title>{_text(line.name)}</title>')
        parts.append(f'<path class="curve" d="M{path}"/>' if at else "")
        for (x, y), (epoch, value) in zip(at, curve, strict=True):
            title = f"{line.name}, {epoch:g}: {value:.4g}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{_text(title)}</title></circle>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _titles(x_label: str, y_label: str) -> list[str]:
    return [
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{_text(x_label)}</text>",
        f'<text class="axis" transform="translate(13 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{_text(y_label)}</text>',
    ]


def _along(left: float, right: float, place: _Place, low: float, high: float) -> list[str]:
    """Return the grid of a linear horizontal axis, at whole numbers."""
    first, last = math.ceil(left), math.floor(right)
    step = max(1, math.ceil((last - first + 1) / 12))
    parts = []
    for value in range(first, last + 1, step):
        (x, top), (_, foot) = place(value, high), place(value, low)
        parts.append(f'<path class="grid" d="M{x:.1f} {top:.1f}V{foot:.1f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{foot + 16:.1f}" text-anchor="middle">{value:,}</text>')
    return parts


def _powers(low: float, high: float, place: _Place, left: float, right: float) -> list[str]:
    """Return the grid of a logarithmic vertical axis."""
    steps = range(math.floor(low), math.ceil(high) + 1)
    digits = (1,) if high - low > 3 else (1, 3) if high - low > 1 else (1, 2, 3, 5, 7)
    parts = []
    for value in (digit * 10.0**power for power in steps for digit in digits):
        if low <= math.log10(value) <= high:
            (x, y), (end, _) = place(left, math.log10(value)), place(right, low)
            parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{end:.1f}"/>')
            parts.append(f'<text class="tick" x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:.0e}</text>')
    return parts


def _padded(low: float, high: float, share: float, limits: tuple[float, float]) -> tuple[float, float]:
    """Return limits a little wider than the values, and never of no width."""
    room = (high - low) * share or max(abs(high) * 0.05, 0.02)
    return max(limits[0], low - room), min(limits[1], high + room)


def _across(left: float, right: float, place: _Place, low: float, high: float) -> list[str]:
    digits = (1, 2, 5) if right - left > 1 else (1, 1.5, 2, 3, 5, 7)
    values = [digit * 10.0**power for power in range(math.floor(left), math.ceil(right) + 1) for digit in digits]
    shown = [value for value in values if left <= math.log10(value) <= right]
    if len(shown) < 2:  # Between two of them: round numbers.
        shown = [float(f"{10 ** (left + (right - left) * at):.2g}") for at in (0.1, 0.5, 0.9)]
    parts = []
    for value in dict.fromkeys(shown[:: 1 + len(shown) // 10]):
        x, foot = place(math.log10(value), low)
        top = place(left, high)[1]
        parts.append(f'<path class="grid" d="M{x:.1f} {top:.1f}V{foot:.1f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{foot + 16:.1f}" text-anchor="middle">{value:,.12g}</text>')
    return parts


def _down(low: float, high: float, place: _Place, left: float, right: float) -> list[str]:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(digit for digit in (1, 2, 5, 10) if digit * power >= rough)
    digits = max(0, -math.floor(math.log10(step)))
    parts = []
    for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        x, y = place(left, number * step)
        end = place(right, low)[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{end:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{number * step:.{digits}f}</text>'
        )
    return parts


def _labels(points: Sequence[Point], centres: Sequence[tuple[float, float]]) -> list[str]:
    """Return the names beside the points, where there is room; every point has its hover title."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in centres]
    parts = []
    for point, (x, y) in zip(points, centres, strict=True):
        name = printable(point.name)
        name = name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…"
        wide = 6.4 * len(name)
        for anchor, start, down in _offsets(x, y, wide):
            box = (start, down - 11, start + wide, down + 3)
            inside = start >= _LEFT and start + wide <= _WIDTH and down - 11 >= 0 and down + 3 <= _HEIGHT - _BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                at = {"start": start, "end": start + wide, "middle": start + wide / 2}[anchor]
                parts.append(
                    f'<text class="name" x="{at:.1f}" y="{down:.1f}" text-anchor="{anchor}">{html.escape(name)}</text>'
                )
                break
    return parts


def _offsets(x: float, y: float, wide: float) -> list[tuple[str, float, float]]:
    """Return where a name may stand, the best place first: its anchor, its left end, its foot."""
    sides = [("start", x + 10, y + 4), ("end", x - 10 - wide, y + 4)]
    above = [("middle", x - wide / 2, y + shift) for shift in (-12, 20)]
    slanted = [(anchor, start, y + shift) for shift in (-10, 18, -22, 30) for anchor, start, _ in sides]
    return [*sides, *above, *slanted]


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _text(text: str) -> str:
    return html.escape(printable(text))
