"""The command that finds images which are there more than once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedkit.cli import printing
from embedkit.cli.options import FILE, json_option, layer_option, quiet_option
from embedkit.text import counted, printable

if TYPE_CHECKING:
    from embedkit.index.duplicates.groups import Duplicates, Group, Member
    from embedkit.index.duplicates.leaks import Leaks

SHOWN_MEMBERS = 20


class _Similarity(click.ParamType):  # type: ignore[type-arg]
    """auto, or a cosine similarity."""

    name = "auto|similarity"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "auto" or isinstance(value, float):
            return value  # type: ignore[no-any-return]
        try:
            number = float(value)
        except ValueError:
            number = -1
        if not 0 < number <= 1:
            self.fail(f"{value!r} is neither auto nor a similarity above 0 and at most 1, such as 0.97", param, ctx)
        return number


@click.command()
@click.argument("store", type=FILE)
@click.option(
    "--threshold", type=_Similarity(), default="auto", show_default=True, metavar="SIMILARITY",
    help="Least cosine similarity of near duplicates, such as 0.97; auto chooses it from the store.",
)  # fmt: skip
@click.option("--against", type=FILE, metavar="OTHER", help="Find what of STORE is in this store too, such as a leak.")
@layer_option
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, one image a line.")
@click.option("-p", "--plain", is_flag=True, help="Print the paths of the files that can go, one a line.")
@click.option("--html", "page", type=FILE, metavar="PAGE", help="Write one self-contained page with pictures.")
@quiet_option
def dedupe(
    store: Path,
    threshold: float | str,
    against: Path | None,
    layer: str | None,
    as_json: bool,
    as_csv: bool,
    plain: bool,
    page: Path | None,
    quiet: bool,
) -> None:
    """Find the images of STORE that are there more than once, the same or nearly.

    Exact duplicates have the same content, near ones a cosine similarity of at least --threshold; groups are what such
    pairs connect. In each group the largest file is to be kept, of equal ones the oldest. No file is ever removed:
    --plain prints which ones can go. With --against, the images of STORE that are in another store too are found, with
    at most ten of those for each. Groups in which labels disagree are marked.
    """
    from embedkit.index.duplicates.groups import find_duplicates
    from embedkit.index.duplicates.leaks import Leaks, find_leaks
    from embedkit.index.duplicates.page import duplicates_page
    from embedkit.store import Store

    if as_json + as_csv + plain > 1:
        raise click.UsageError("--json, --csv and --plain exclude one another")
    opened = Store.open(store, layer=layer)
    found: Duplicates | Leaks
    with printing.RowBar(quiet) as bar:
        if against is not None:
            if os.path.exists(against) and os.path.samefile(store, against):
                raise click.UsageError("--against names STORE itself; without it, duplicates within STORE are found")
            other = Store.open(against, layer=layer)
            found = find_leaks(opened, other, threshold=threshold, progress=bar.update)
        else:
            found = find_duplicates(opened, threshold=threshold, progress=bar.update)
    printing.notice(str(found.threshold), quiet)
    if plain:
        _print_paths(found, quiet)
    elif isinstance(found, Leaks):
        _print_leaks(found, as_json=as_json, as_csv=as_csv, quiet=quiet)
    else:
        _print_groups(found, as_json=as_json, as_csv=as_csv, quiet=quiet)
    if page is not None:
        with printing.saying_when_long("reading pictures for the page", quiet):
            text = duplicates_page(found)
        page.write_text(text, encoding="utf-8")
        printing.notice(f"page: {page}", quiet)


def _print_paths(found: Duplicates | Leaks, quiet: bool) -> None:
    from embedkit.index.duplicates.removal import removable

    removal = removable(found)
    for path in removal.paths:  # As bytes: a path is printed as it is, whatever it holds.
        click.echo(os.fsencode(path))
    for count, why in (
        (
            removal.parts,
            "is no file of its own (a box, a frame, a member of an archive), or its file is gone or not known",
        ),
        (removal.changed, "changed since the store was made; bring the store up to date with embedkit extract"),
        (removal.kept, "is the very file to keep, by a link"),
        (removal.unprintable, "has a line break in its path"),
    ):
        if count:
            printing.notice(f"left out, because each {why}: {count:,}", quiet)


def _print_groups(found: Duplicates, *, as_json: bool, as_csv: bool, quiet: bool) -> None:
    if as_csv:
        printing.print_csv(
            ["id", "group", "keep", "similarity", "exact", "path", "bytes"],
            (
                [member.id, number, "true" if place == 0 else "false", *_csv_facts(member), member.bytes]
                for number, group in enumerate(found)
                for place, member in enumerate(group)
            ),
        )
        return
    for number, group in enumerate(found):
        if as_json:
            members = [_values(member) for member in group]
            values = {"group": number, "keep": members[0]["id"], "labels_disagree": len(group.labels) > 1}
            click.echo(json.dumps({**values, "labels": group.labels, "members": members}))
        else:
            _print_table(number, group)
    rows, going = len(found.rows), len(found.superfluous)
    disagreeing = sum(len(group.labels) > 1 for group in found)
    line = f"{counted(len(found), 'group')} of {counted(rows, 'image')}, {going:,} of which can go"
    printing.notice(line + (f"; labels disagree in {disagreeing:,}" if disagreeing else ""), quiet)


def _print_table(number: int, group: Group) -> None:
    disagree = f", labels disagree: {', '.join(map(printable, group.labels))}" if len(group.labels) > 1 else ""
    click.echo(f"group {number}: {counted(len(group), 'image')}{disagree}")
    for place in range(min(SHOWN_MEMBERS, len(group))):
        member = group[place]
        likeness = "keep" if place == 0 else "exact" if member.exact else f"{member.similarity:.4f}"
        click.echo(f"  {likeness:<6}  {member.bytes:>12,}  {printable(member.id)}")
    if len(group) > SHOWN_MEMBERS:
        click.echo(f"  ... and {len(group) - SHOWN_MEMBERS:,} more (--json and --csv have all)")


def _print_leaks(found: Leaks, *, as_json: bool, as_csv: bool, quiet: bool) -> None:
    from embedkit.index.duplicates.groups import Group

    lefts = Group(found.left, found.left_rows, found.scores, found.exact)
    rights = Group(found.right, found.right_rows, found.scores, found.exact)
    if as_csv:
        printing.print_csv(
            ["id", "other", "similarity", "exact", "path", "bytes"],
            (
                [
                    left.id,
                    right.id,
                    f"{right.similarity:.6f}",
                    "true" if right.exact else "false",
                    left.path or "",
                    left.bytes,
                ]
                for left, right in zip(lefts, rights, strict=True)
            ),
        )
    else:
        before = -1
        for left, right in zip(lefts, rights, strict=True):
            if as_json:
                click.echo(json.dumps({"id": left.id, "label": left.label, "other": _values(right)}))
                continue
            if left.row != before:
                click.echo(printable(left.id))
            before = left.row
            likeness = "exact" if right.exact else f"{right.similarity:.4f}"
            differs = f"  (labels disagree: {left.label}, {right.label})" if _differ(left, right) else ""
            click.echo(printable(f"  {likeness:<6}  {right.id}{differs}"))
    leaked, exactly = len(found.leaked), len(set(found.left_rows[found.exact].tolist()))
    names = printable(found.left.path.name), printable(found.right.path.name)
    line = f"{leaked:,} of the {len(found.left):,} images of {names[0]} have duplicates or near ones in {names[1]}"
    printing.notice(f"{line}, {exactly:,} of them exact ones", quiet)


def _differ(left: Member, right: Member) -> bool:
    return left.label is not None and right.label is not None and left.label != right.label


def _values(member: Member) -> dict[str, Any]:
    path = None if member.path is None else os.fspath(member.path)
    return {
        "id": member.id, "label": member.label, "similarity": round(member.similarity, 6), "exact": member.exact,
        "bytes": member.bytes, "path": path,
    }  # fmt: skip


def _csv_facts(member: Member) -> list[object]:
    return [f"{member.similarity:.6f}", "true" if member.exact else "false", member.path or ""]
