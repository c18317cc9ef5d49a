"""The page of a distillation: who taught whom, on what, and how it went."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from embedkit.evaluation.bench_page import page_style
from embedkit.evaluation.cell_details import table, text
from embedkit.evaluation.charts import COLOURS, Line, line_chart
from embedkit.finetuning.distillation.judging import FOLDS, ROLES
from embedkit.finetuning.training.history import EpochRow, History
from embedkit.text import counted

_UNITS = {"images": "{:,}", "held_out": "{:,}", "views": "{:,}", "seconds": "{:,.0f} s"}


def distillation_page(account: Mapping[str, Any]) -> str:
    """Return a distillation as one page.

    Parameters
    ----------
    account : mapping
        As ``report.json`` has it.

    Returns
    -------
    str
        HTML that needs no other file and asks no network, light and dark.
    """
    title, history = account.get("title", account["student"]["name"]), _history(account["history"])
    teachers = ", ".join(teacher["name"] for teacher in account["teachers"])
    parts = [
        _backbones(account), _judgement(account.get("judgement")), _training(history, len(account["teachers"])),
        _facts(account),
    ]  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">\n<title>{text(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<style>{page_style()}</style>\n<header><h1>{text(title)}</h1>"
        f"<p class=soft>{text(f'taught by {teachers}')}</p></header>\n"
        + "\n".join(part for part in parts if part)
        + "\n</html>\n"
    )


def _history(values: Mapping[str, Any]) -> History:
    """Return the epochs of a report, where null stands for a metric that was no number."""
    rows = [
        {**row, "metrics": {name: math.nan if value is None else value for name, value in row["metrics"].items()}}
        for row in values["epochs"]
    ]
    return History.from_dict({**values, "epochs": rows})


def _backbones(account: Mapping[str, Any]) -> str:
    begun = account["began_with"]
    everyone = [("student", account["student"]), *([("began as", begun)] if begun else [])]
    everyone += [("teacher", teacher) for teacher in account["teachers"]]
    rows = [
        [text(role), text(one["name"]), f"{one['dim']:,}", " x ".join(map(str, one["img_size"])),
         text(one["digest"][:16])]
        for role, one in everyone
    ]  # fmt: skip
    return f"<h2>Backbones</h2>{table(['', 'architecture', 'width', 'pixels', 'digest'], rows, 'ttnnt')}"


def _judgement(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    rows = [
        [text(role), text(one["name"]), f"{one['dim']:,}", f"{one['linear_top1']:.3f}", f"{one['knn_top1']:.3f}"]
        for role, one in ((role, found[role]) for role in ROLES)
    ]
    how = f"split by {found['split']}" if found["split"] else f"{FOLDS} folds"
    note = f"On the {counted(found['images'], 'image')} of {found['store']}, {how}."
    header = ["", "architecture", "width", "linear top1", "k-NN top1"]
    return f"<h2>Judgement</h2>{table(header, rows, 'ttnnn')}<p class=soft>{text(note)}</p>"


def _training(history: History, teachers: int) -> str:
    rows = history.epochs
    if not rows:
        return "<h2>Training</h2><p>No epoch was trained.</p>"
    best = float(history.best_epoch) if history.best_epoch else None
    losses = [Line("training loss", [(row.epoch, row.loss) for row in rows], 0)]
    charts = [_figure("training loss", losses, "loss", best)]
    names = [name for name in rows[-1].metrics if name.startswith("cosine")]
    if names:
        lines = [
            Line(
                name, [(row.epoch, row.metrics[name]) for row in rows if _is_number(row.metrics.get(name))], 1 + number
            )
            for number, name in enumerate(names)
        ]
        caption = "cosine with the teachers on images held out" if teachers > 1 else "cosine with the teacher"
        charts.append(_figure(caption, lines, "cosine", best))
    note = f"Dashed: epoch {history.best_epoch}, the {'best' if history.judged else 'last'}." if best else ""
    stopped = f" Stopped early: {history.stopped}." if history.stopped else ""
    return (
        f"<h2>Training</h2><div class=charts>{''.join(charts)}</div><p class=soft>{text(note + stopped)}</p>"
        f"<details><summary>{counted(len(rows), 'epoch')}</summary>{_epochs(rows, names)}</details>"
    )


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _figure(caption: str, lines: Sequence[Line], label: str, mark: float | None) -> str:
    shown = " ".join(f'<span class="c{line.colour % COLOURS}">● {text(line.name)}</span>' for line in lines)
    return (
        f"<figure><figcaption>{text(caption)}: {shown}</figcaption>{line_chart(lines, 'epoch', label, mark=mark)}"
        "</figure>"
    )


def _epochs(rows: Sequence[EpochRow], names: Sequence[str]) -> str:
    cells = [
        [
            str(row.epoch), f"{row.loss:.4f}", *(f"{row.metrics.get(name, float('nan')):.4f}" for name in names),
            f"{row.images_per_second:,.1f}", f"{row.seconds:,.1f}", f"{max(row.rates.values(), default=0.0):.3g}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["epoch", "loss", *names, "images/s", "seconds", "highest rate"]
    return table([text(name) for name in header], cells, "n" * len(header))


def _facts(account: Mapping[str, Any]) -> str:
    facts = {key: _UNITS.get(key, "{}").format(value) for key, value in account["facts"].items()}
    items = "".join(f"<dt>{text(key.replace('_', ' '))}</dt><dd>{text(value)}</dd>" for key, value in facts.items())
    recipe = {**account["settings"], **account["recipe"]}
    rows = [[text(key), text(json.dumps(value))] for key, value in recipe.items()]
    settings = table(["setting", "value"], rows, "tt")
    failed = account.get("failed", 0)
    note = f"{counted(failed, 'image')} could not be read, such as {account['failures'][0]}." if failed else ""
    left_out = f"<p class=soft>{text(note)}</p>" if note else ""
    return f"<h2>How it was run</h2><dl>{items}</dl>{left_out}<details><summary>Settings</summary>{settings}</details>"
