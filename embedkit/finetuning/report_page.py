"""Account: everything that a run did, as JSON values and as one self-contained page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.evaluation.bench_page import page_style
from embedkit.evaluation.cell_details import Pictures, cell_details, name, table, text
from embedkit.evaluation.charts import COLOURS, Line, line_chart
from embedkit.evaluation.leaks import Leaks
from embedkit.evaluation.reports import Report
from embedkit.finetuning.comparison import MEANINGS, BeforeAfter, Change
from embedkit.finetuning.recipe import Recipe
from embedkit.finetuning.training.history import EpochRow, History
from embedkit.store import Store
from embedkit.text import counted, printable

PICTURES = 120
CHANGED = 24  # Of those that are right now, and of those that are wrong now.
LEGEND = 12
CLASSES = 40  # Of a table; report.json has all.
MATRIX_CLASSES = 200  # Of a confusion in report.json.
FAILURES = 1000

_NEVER = {"head": "afterwards"}  # With a loss that trains none.
WARMUP_TOP1 = "warm-up top1 on validation"  # Of the facts about a warm-up.


@dataclass(frozen=True, eq=False)
class Account:
    """Everything that a run did.

    Parameters
    ----------
    title : str
        What the backbone was adapted to.
    parent : mapping
        What it was adapted from: name, digest and hash of its weights.
    recipe : Recipe
        Every setting.
    images : mapping
        Counts of the parts; see `embedkit.finetuning.examples.Division.summary`.
    warmup : mapping
        How the head was fitted on the frozen body.
    history : History
        The epochs.
    comparison : BeforeAfter, optional
        What it bought.
    leaks : mapping of str to Leaks
        Pictures that a part shares with the training part.
    failures : sequence of str
        Images that could not be read, and why.
    parameters : sequence of mapping
        Frozen and trainable parameters of every block.
    seconds : mapping of str to float
        How long each stage took.
    circumstances : mapping of str to str
        Command, machine, versions, time.
    """

    title: str
    parent: Mapping[str, Any]
    recipe: Recipe
    images: Mapping[str, Any]
    warmup: Mapping[str, Any]
    history: History
    comparison: BeforeAfter | None = None
    leaks: Mapping[str, Leaks] = field(default_factory=dict)
    failures: Sequence[str] = ()
    parameters: Sequence[Mapping[str, Any]] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    circumstances: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the account as JSON values."""
        values = {
            "title": self.title, "parent": dict(self.parent), "recipe": self.recipe.to_dict(),
            "images": dict(self.images), "warmup": dict(self.warmup), "history": self.history.to_dict(),
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "leaks": {part: leaks.summary() for part, leaks in self.leaks.items()},
            "failed": len(self.failures), "failures": list(self.failures[:FAILURES]),
            "parameters": [dict(row) for row in self.parameters], "seconds": dict(self.seconds),
            "circumstances": dict(self.circumstances),
        }  # fmt: skip
        for label, report in self._reports():
            metrics = dict(report.metrics)
            if len(report.classes) > MATRIX_CLASSES:
                metrics["confusion"] = None
            values[label] = metrics
        plain: dict[str, Any] = finite(json.loads(json.dumps(values)))
        return plain

    def _reports(self) -> Iterator[tuple[str, Report]]:
        found = self.comparison
        if found is not None and found.before is not None:
            yield "before", found.before
        if found is not None and found.after is not None:
            yield "after", found.after


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of numbers that JSON does not know, infinity and NaN.

    Parameters
    ----------
    value : JSON value
        Tuples count as lists.

    Examples
    --------
    >>> from embedkit.finetuning.report_page import finite
    >>> finite({"loss": [0.5, float("nan")]})
    {'loss': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_page(account: Account, store: Store | None = None) -> str:
    """Return the account of a run as one page.

    Parameters
    ----------
    account : Account
        What happened.
    store : Store, optional
        Of the images, for their thumbnails.

    Returns
    -------
    str
        HTML that needs no other file and asks no network, light and dark.
    """
    room = Pictures(PICTURES)
    parts = [
        _comparison(account.comparison), _curves(account.history, account.recipe, account.warmup),
        _changed(account.comparison, store, room), *_details(account, store, room), _data(account), _settings(account),
    ]  # fmt: skip
    about = f"adapted from {printable(str(account.parent.get('name', 'a backbone')))}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">\n<title>{text(account.title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<style>{page_style()}</style>\n"
        f"<header><h1>{text(account.title)}</h1><p class=soft>{text(about)}</p></header>\n"
        + "\n".join(part for part in parts if part)
        + "\n</html>\n"
    )


def _comparison(found: BeforeAfter | None) -> str:
    if found is None:
        return "<h2>Before and after</h2><p>Not compared.</p>"
    rows = [_change(change) for change in found.changes]
    header = ["", "before", "after", "difference", "95 % interval", "p (Holm)", "images", "paired test"]
    return (
        f"<h2>Before and after</h2><p><b>{text(found.verdict)}.</b></p>{table(header, rows, 'wnnnnnnw')}"
        f"<p class=soft>Bold: larger than chance, for all measures together. On {text(found.caveat)}.</p>"
    )


def _change(change: Change) -> list[str]:
    low, high = change.interval
    mark = "b" if change.real else "span"
    return [
        f"{text(change.name)}<small>{text(MEANINGS.get(change.name, ''))}</small>", f"{change.before:.4f}",
        f"{change.after:.4f}", f"<{mark}>{change.difference:+.4f}</{mark}>", f"[{low:+.4f}, {high:+.4f}]",
        f"{change.adjusted_p_value:.2g}", f"{change.rows:,}", text(change.test),
    ]  # fmt: skip


def _curves(history: History, recipe: Recipe, warmup: Mapping[str, Any]) -> str:
    """Return the losses, the metrics and the learning rates by epoch; epoch 0 is the warm-up."""
    rows = history.epochs
    if not rows:
        return "<h2>Training</h2><p>No epoch was trained: the head alone was fitted.</p>"
    best = float(history.best_epoch) if history.best_epoch else None
    losses = [Line("training loss", [(row.epoch, row.loss) for row in rows], 0)]
    losses += _metric_lines(rows, ["loss"], first=1)
    metrics = [one for one in dict.fromkeys(name for row in rows for name in row.metrics) if one != "loss"]
    charts = [_figure("loss", losses, "loss", best)]
    if lines := _metric_lines(rows, metrics, first=2):
        if (start := warmup.get(WARMUP_TOP1)) is not None and lines[0].name == "validation top1":
            lines[0] = replace(lines[0], points=[(0, start), *lines[0].points])
        charts.append(_figure("validation", lines, "share", best))
    rates = [
        Line(group, [(row.epoch, row.rates[group]) for row in rows if group in row.rates], number)
        for number, group in enumerate(_groups(rows))
    ]
    charts.append(_figure("learning rate of each group", rates, "learning rate", best, logarithmic=True))
    why = (
        f"the best by {recipe.metric} on the validation images"
        if history.judged
        else "the last: no validation judged it"
    )
    note = f"Dashed: epoch {history.best_epoch}, {why}." if best else ""
    stopped = f" Stopped early: {history.stopped}." if history.stopped else ""
    return (
        f"<h2>Training</h2><div class=charts>{''.join(charts)}</div><p class=soft>{text(note + stopped)}</p>"
        f"{_rates(rows)}{_epochs(rows, metrics, history.best_epoch if history.judged else 0)}"
    )


def _metric_lines(rows: Sequence[EpochRow], names: Sequence[str], first: int) -> list[Line]:
    found = [
        (metric, [(row.epoch, row.metrics[metric]) for row in rows if math.isfinite(row.metrics.get(metric, math.nan))])
        for metric in names
    ]
    return [Line(f"validation {metric}", points, first + at) for at, (metric, points) in enumerate(found) if points]


def _figure(caption: str, lines: Sequence[Line], label: str, mark: float | None, *, logarithmic: bool = False) -> str:
    shown = [f'<span class="c{line.colour % COLOURS}">● {name(line.name)}</span>' for line in lines[:LEGEND]]
    shown += [f"and {len(lines) - LEGEND} more"] if len(lines) > LEGEND else []
    chart = line_chart(lines, "epoch", label, logarithmic=logarithmic, mark=mark)
    return f"<figure><figcaption>{text(caption)}: {' '.join(shown)}</figcaption>{chart}</figure>"


def _groups(rows: Sequence[EpochRow]) -> list[str]:
    return list(dict.fromkeys(group for row in rows for group in row.rates))


def _rates(rows: Sequence[EpochRow]) -> str:
    cells = []
    for group in _groups(rows):
        values = [row.rates[group] for row in rows if group in row.rates]
        cells.append([name(group), *(f"{value:.3g}" for value in (values[0], max(values), values[-1]))])
    inside = table(["group", "after the first epoch", "highest", "last"], cells, "tnnn")
    return f"<details><summary>Learning rates of {len(cells)} groups</summary>{inside}</details>"


def _epochs(rows: Sequence[EpochRow], metrics: Sequence[str], best: int) -> str:
    header = ["epoch", "loss", *metrics, "images/s", "seconds", "at once"]
    cells = [
        [
            f"{row.epoch}{' (best)' if row.epoch == best else ''}", f"{row.loss:.4f}",
            *(f"{row.metrics[metric]:.4f}" if metric in row.metrics else "–" for metric in metrics),
            f"{row.images_per_second:,.1f}", f"{row.seconds:,.1f}", f"{row.batch_size}",
        ]
        for row in rows
    ]  # fmt: skip
    inside = table([text(cell) for cell in header], cells, "n" * len(header))
    return f"<details><summary>{counted(len(rows), 'epoch')}</summary>{inside}</details>"


def _changed(found: BeforeAfter | None, store: Store | None, room: Pictures) -> str:
    """Return the images whose prediction went from wrong to right, and the other way round."""
    if found is None or found.before is None or found.after is None:
        return ""
    ids, before, after, true = _paired(found.before, found.after)
    parts = []
    for label, rows in (
        ("right now, and wrong before", np.flatnonzero((before != true) & (after == true))),
        ("wrong now, and right before", np.flatnonzero((before == true) & (after != true))),
    ):
        items = []
        for row in _spread(rows).tolist():
            caption = f"<b>{name(after[row])}</b><br>was {name(before[row])}" + (
                "" if after[row] == true[row] else f"<br>is {name(true[row])}"
            )
            picture = room.tag(store, ids[row])
            below = f"<figcaption>{caption}<small>{text(ids[row])}</small></figcaption>"
            items.append(f"<li><figure>{picture}{below}</figure></li>")
        more = f"; {len(rows) - len(items):,} of them are not shown" if len(rows) > len(items) else ""
        parts.append(f"<h3>{counted(len(rows), 'image')} {label}{more}</h3><ol class=pictures>{''.join(items)}</ol>")
    return f"<h2>Examples that changed</h2>{''.join(parts)}"


def _spread(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return some of many rows, evenly from all over them: ids are sorted by class, mostly."""
    chosen: npt.NDArray[np.int64] = rows[:: max(1, -(-len(rows) // CHANGED))]
    return chosen


def _paired(before: Report, after: Report) -> tuple[list[str], list[str], list[str], list[str]]:
    """Return ids, and for each the classes that were predicted before and after, and the true one."""
    places = {id: row for row, id in enumerate(before.predictions["ids"].tolist())}
    ids = [id for id in after.predictions["ids"].tolist() if id in places]
    left = np.array([places[id] for id in ids], dtype=np.int64)
    right = np.array([row for row, id in enumerate(after.predictions["ids"].tolist()) if id in places], dtype=np.int64)

    def named(report: Report, kind: str, rows: Any) -> Any:
        return np.array(report.classes)[report.predictions[kind][rows].astype(np.int64)]

    return ids, named(before, "predicted", left), named(after, "predicted", right), named(after, "true", right)


def _details(account: Account, store: Store | None, room: Pictures) -> Iterator[str]:
    titles = {"before": "a linear probe on the frozen backbone", "after": "the trained network"}
    for label, report in reversed(list(account._reports())):
        value = report.headline[1]
        inside = cell_details(report, store, room)
        opened = " open" if label == "after" else ""
        title = f"{label.capitalize()}: {titles[label]}, top1 {value:.4f}"
        yield f"<details{opened}><summary>{title}</summary>{inside}</details>"


def _data(account: Account) -> str:
    images = account.images
    roles = [role for role in ("train", "val", "test") if isinstance(images.get(role), dict)]
    if len(roles) == 3 and images["test"]["split"] == images["val"]["split"]:
        roles.pop()
    classes = list(images["train"]["by_class"]) if roles else []
    rows = [["<b>all</b>", *(f"{images[role]['images']:,}" for role in roles)]]
    rows += [[name(one), *(f"{images[role]['by_class'].get(one, 0):,}" for role in roles)] for one in classes[:CLASSES]]
    left = f"<p class=soft>{len(classes) - CLASSES:,} classes are left out.</p>" if len(classes) > CLASSES else ""
    made = "The split was made here, by class, with copies on one side" if images.get("made") else "The split was given"
    lines = [f"{made}; split.csv records it.", f"{images.get('left_out', 0):,} images were left out."]
    for part, leaks in account.leaks.items():
        lines.append(f"{part}: {leaks.to_text(0).splitlines()[0]}.")
    if account.failures:
        lines.append(f"{counted(len(account.failures), 'image')} could not be read, such as {account.failures[0]}.")
    notes = "".join(f"<p class=soft>{text(line)}</p>" for line in lines)
    header = ["class", *(name(images[role]["split"]) for role in roles)]
    return f"<h2>Images</h2>{table(header, rows, 't' + 'n' * len(roles))}{left}{notes}"


def _settings(account: Account) -> str:
    """Return the recipe with what differs from its defaults in bold, the blocks, and how the run was made."""
    defaults, values = Recipe().to_dict(), account.recipe.to_dict()
    varied, plain = values.pop("augmentation"), defaults.pop("augmentation")
    rows = [_setting(key, value, defaults[key]) for key, value in values.items()]
    rows += [_setting(f"augmentation.{key}", value, plain[key]) for key, value in varied.items()]
    blocks = [
        [
            name(row["name"]),
            f"{row['frozen']:,}",
            f"{row['trainable']:,}",
            str(row["from_epoch"] or _NEVER.get(row["name"], "never")),
        ]
        for row in account.parameters
    ]
    facts = {**{f"{stage} took": f"{seconds:,.1f} s" for stage, seconds in account.seconds.items()}}
    facts |= {f"parent's {key.replace('_', ' ')}": str(value) for key, value in account.parent.items()}
    facts |= {key: str(value) for key, value in {**account.warmup, **account.circumstances}.items()}
    items = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in facts.items())
    return (
        f"<h2>How it was run</h2><dl>{items}</dl>"
        f"<details><summary>Settings</summary>{table(['setting', 'value'], rows, 'tt')}</details>"
        "<details><summary>Frozen and trainable parameters</summary>"
        f"{table(['block', 'frozen', 'trainable', 'from epoch'], blocks, 'tnnn')}</details>"
    )


def _setting(key: str, value: Any, default: Any) -> list[str]:
    shown = text(json.dumps(value))
    return [text(key), f"<b>{shown}</b>" if value != default else shown]
