"""Columns of a manifest: which one says what."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from embedkit.errors import ImageError
from embedkit.sources.failing import quoted
from embedkit.sources.tables.boxes import COLUMN_NAMES, CORNER_NAMES
from embedkit.sources.tables.rows import Table, wrong

# What columns are usually called, without case, spaces, dashes and underscores.
USUAL_NAMES = {
    "path": ("path", "image", "imagepath", "file", "filename", "filepath", "img", "imgpath"),
    "id": ("id", "imageid", "key"),
    "label": ("label", "class", "category", "target", "classname", "labelname", "categoryname", "species"),
    "split": ("split", "set", "subset", "partition"),
}
# Where there is no other, of tables in which an image may have several.
_PLURALS = ("labels", "classes", "categories", "targets", "classnames", "labelnames", "categorynames", "tags")
# Of tables of images on the web, in which other columns may name files, too.
_URL_NAMES = ("url", "imageurl", "uri")
_SEPARATORS = re.compile(r"[\s_-]+")


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read.

    Attributes
    ----------
    names : list of str
        What they are called; the first is that of the paths.
    id, label, split : int or None
        Where they are among `names`.
    box : list of int
        Where the one column of boxes is, or the four; empty when there is none.
    box_format : {"xyxy", "xywh"}
    """

    names: list[str]
    id: int | None
    label: int | None
    split: int | None
    box: list[int]
    box_format: str

    def at(self, role: str) -> int:
        """Return where the column of a path, id, label or split is."""
        return {"id": self.id, "label": self.label, "split": self.split}.get(role) or 0


def choose_columns(table: Table, named: Mapping[str, str], box_format: str | None, *, split: bool | None) -> Columns:
    """Choose the columns of a table: those that are named, else those of a usual name.

    A column of splits is needed where `split` is true, and read where there is one where it is None.

    Raises
    ------
    ImageError
        When a column that is needed or named is not there, or several have usual names.
    """
    if not table.columns:
        raise wrong(table.path, "is empty; its first line names its columns", "empty")
    if unknown := named.keys() - {*USUAL_NAMES, "box"}:
        roles = ", ".join((*USUAL_NAMES, "box"))
        raise wrong(table.path, f"--columns names columns for {roles}, not for {', '.join(sorted(unknown))}", "refused")
    path = _named(table, named, "path")
    if path is None and "path" not in named:
        path = next((name for name in table.columns if _plain(name) in _URL_NAMES), None)
    if path is None:
        raise _missing(table, "path")
    part = None if split is False else _named(table, named, "split")
    if split and part is None:
        raise _missing(table, "split")
    id, label = _named(table, named, "id"), _named(table, named, "label")
    boxes, usual_format = _boxes(table, named.get("box"))
    names = list(dict.fromkeys(name for name in (path, id, label, part, *boxes) if name is not None))
    for name in names:
        if table.columns.count(name) > 1:
            raise wrong(table.path, f"two columns are called {quoted(name)}; rename one")

    def at(name: str | None) -> int | None:
        return None if name is None else names.index(name)

    return Columns(
        names, at(id), at(label), at(part), [names.index(name) for name in boxes], box_format or usual_format
    )


def _named(table: Table, named: Mapping[str, str], role: str) -> str | None:
    """Return the column of a role, None when there is none."""
    if role in named:
        name = named[role]
        if name and name not in table.columns:
            raise _absent(table, role, name)
        return name or None
    found = [name for name in dict.fromkeys(table.columns) if _plain(name) in USUAL_NAMES[role]]
    if not found and role == "label":
        found = [name for name in dict.fromkeys(table.columns) if _plain(name) in _PLURALS]
    if len(found) > 1:
        raise _doubtful(table, role, found)
    return next(iter(found), None)


def _boxes(table: Table, named: str | None) -> tuple[list[str], str]:
    """Return the column of boxes, or the four, and the format that their names tell."""
    if named == "":
        return [], "xyxy"
    if named is not None:
        names = [named] if named in table.columns else [name.strip() for name in named.split(",")]
        for name in names:
            if name not in table.columns:
                raise _absent(table, "box", name)
        if len(names) not in (1, 4):
            raise wrong(table.path, f"a box has one column or four, not {len(names)}: {_shown(names)}")
        return names, _format_of(names)
    plain = {_plain(name): name for name in table.columns}
    found = [[plain[name]] for names in COLUMN_NAMES.values() for name in names if name in plain]
    corners = [names for kind in CORNER_NAMES.values() for names in kind]
    found += [[plain[name] for name in names] for names in corners if plain.keys() >= {*names}]
    if len(found) > 1:
        raise _doubtful(table, "box", [",".join(names) for names in found])
    return (found[0], _format_of(found[0])) if found else ([], "xyxy")


def _format_of(names: list[str]) -> str:
    plain = tuple(map(_plain, names))
    is_xywh = plain in CORNER_NAMES["xywh"] or (len(plain) == 1 and plain[0] in COLUMN_NAMES["xywh"])
    return "xywh" if is_xywh else "xyxy"


def _plain(name: str) -> str:
    return _SEPARATORS.sub("", name).lower()


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(quoted(name, 100) for name in names[:20]) + (", ..." if len(names) > 20 else "")


def _doubtful(table: Table, role: str, found: list[str]) -> ImageError:
    reason = f"several columns could be the {role}: {_shown(found)}; choose one: --columns {role}={found[0]}"
    if role in ("id", "label", "box"):
        reason += f", or none: --columns {role}="
    return wrong(table.path, reason, "unsupported")


def _absent(table: Table, role: str, name: str) -> ImageError:
    reason = f"no column is called {quoted(name)}, named for the {role}; there are {_shown(table.columns)}"
    return wrong(table.path, reason, "unsupported")


def _missing(table: Table, role: str) -> ImageError:
    reason = f"no column is called like a {role} ({', '.join(USUAL_NAMES[role])}); there are {_shown(table.columns)}"
    return wrong(table.path, f"{reason}; name one: --columns {role}=COLUMN", "unsupported")
