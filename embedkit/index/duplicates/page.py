"""One self-contained HTML page of duplicates, to look at before anything is removed."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

import numpy as np

from embedkit.index.duplicates.groups import Duplicates, Group, Member
from embedkit.index.duplicates.leaks import Leaks
from embedkit.index.page import picture_tag
from embedkit.index.pictures import read_picture
from embedkit.store import Store
from embedkit.text import counted, printable

GROUPS = 200
MEMBERS = 24

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --keep: #2a8a4a; --warn: #c2571a; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 .8rem; font-weight: 600; }
header p, .more { margin: .2rem 0 1.6rem; opacity: .7; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); padding: 1.2rem 0; }
ol { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); list-style: none;
  margin: 0; padding: 0; }
figure { margin: 0; }
img, .missing { width: 100%; aspect-ratio: 1; object-fit: contain; background: #8881; border-radius: 6px;
  box-sizing: border-box; border: 3px solid transparent; }
.keep img, .keep .missing { border-color: var(--keep); }
.missing { display: grid; place-items: center; font-size: .8rem; opacity: .7; text-align: center; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
figcaption b { font-variant-numeric: tabular-nums; }
.keep figcaption b { color: var(--keep); }
figcaption small { display: block; opacity: .7; }
.warn { color: var(--warn); font-weight: 600; }
"""


def duplicates_page(found: Duplicates | Leaks, *, groups: int = GROUPS, members: int = MEMBERS, size: int = 192) -> str:
    """Return a page of groups with their pictures.

    Parameters
    ----------
    found : Duplicates or Leaks
        Of leaks, a group is a row of the left store with what it resembles in the right one, the surest first.
    groups, members : int
        How many groups to show, and how many images of each; the page says how many there are.
    size : int, default 192
        Longest side of a thumbnail, in pixels.

    Returns
    -------
    str
        HTML that needs no other file and asks no network. An image that has gone since is shown as missing.
    """
    if isinstance(found, Leaks):
        count, of = len(found.leaked), found.left
        has = f"{counted(count, 'image')} of {_text(of.path.name)} {'has' if count == 1 else 'have'}"
        title = f"{has} duplicates or near ones in {_text(found.right.path.name)}"
        sections = _leak_sections(found, groups, members, size)
    else:
        count, of = len(found), found.store
        title = f"{counted(count, 'group')} of duplicates in {_text(of.path.name)}"
        sections = (_group_section(found[number], members, size) for number in range(min(groups, count)))
    body = "".join(sections)
    more = f'<p class="more">and {count - groups:,} more, which this page leaves out</p>' if count > groups else ""
    facts = f"{counted(len(of), 'image')}, {_text(of.spec.name_of(of.recipe))}, {_text(str(found.threshold))}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n'
        f"<header><h1>{title}</h1><p>{facts}</p></header>\n{body}{more}</html>\n"
    )


def _group_section(group: Group, members: int, size: int) -> str:
    shown = [group[number] for number in range(min(members, len(group)))]
    tiles = [_tile(group.store, shown[0], "keep", size, keep=True)]
    tiles += [_tile(group.store, member, _likeness(member), size) for member in shown[1:]]
    return _section(counted(len(group), "image"), group.labels, tiles, len(group) - len(shown))


def _leak_sections(found: Leaks, groups: int, members: int, size: int) -> Iterator[str]:
    firsts = found.left_rows.searchsorted(found.leaked)
    surest = np.lexsort((-found.scores[firsts], ~found.exact[firsts]))
    for row in found.leaked[surest[:groups]].tolist():
        at = slice(*found.left_rows.searchsorted([row, row + 1]))
        one = Group(found.left, found.left_rows[at][:1], found.scores[at][:1], found.exact[at][:1])[0]
        others = Group(found.right, found.right_rows[at], found.scores[at], found.exact[at])
        shown = [others[number] for number in range(min(members, len(others)))]
        tiles = [_tile(found.left, one, "leaked", size, keep=True)]
        tiles += [_tile(found.right, member, _likeness(member), size) for member in shown]
        labels = sorted({label for label in (one.label, *others.labels) if label is not None})
        yield _section(f"{counted(len(others), 'image')} like this", labels, tiles, len(others) - len(shown))


def _section(head: str, labels: Sequence[str], tiles: Sequence[str], left: int) -> str:
    differing = ", ".join(map(_text, labels[:5])) + (", ..." if len(labels) > 5 else "")
    warning = f' <span class="warn">labels disagree: {differing}</span>' if len(labels) > 1 else ""
    more = f'<p class="more">and {left:,} more</p>' if left else ""
    return f"<section><h2>{head}{warning}</h2><ol>{''.join(tiles)}</ol>{more}</section>\n"


def _likeness(member: Member) -> str:
    return "the same file content" if member.exact else f"{member.similarity:.4f}"


def _tile(store: Store, member: Member, likeness: str, size: int, *, keep: bool = False) -> str:
    label = f" {_text(member.label)}" if member.label is not None else ""
    picture = picture_tag(lambda: read_picture(store, member.id), size)
    kind = ' class="keep"' if keep else ""
    return (
        f"<li{kind}><figure>{picture}<figcaption><b>{_text(likeness)}</b>{label} {member.bytes:,} B"
        f"<small>{_text(member.id)}</small></figcaption></figure></li>"
    )


def _text(text: str) -> str:
    return html.escape(printable(text))
