"""Settings of a command as a YAML file, so that a run can be committed and repeated."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from embedkit.errors import FinetuneError

MAX_BYTES = 1 << 16

_PLACE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def read_settings(
    path: str | os.PathLike[str], known: Collection[str], *, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    r"""Read a YAML mapping of settings to plain values.

    Parameters
    ----------
    path : path-like
        The file, which may come from a stranger.
    known : collection of str
        Names that a setting may have; a dash and an underscore are one.

    environment : mapping of str to str, optional
        Where ``${DATA}`` in a text finds its place, as ``EMBEDKIT_DATA``; by default the process's.

    Returns
    -------
    dict
        Text, numbers, truth values, and lists of these, by names with underscores.

    Raises
    ------
    FinetuneError
        When the file cannot be read, is no such mapping, has a setting that is unknown or there twice, or a place that
        nobody says.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from embedkit.finetuning.recipe_file import read_settings
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name, "small.yaml")
    >>> _ = path.write_text("student: resnet10t\nimg-size: 96\n")
    >>> read_settings(path, {"student", "img_size"})
    {'student': 'resnet10t', 'img_size': 96}
    >>> folder.cleanup()
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise FinetuneError(f"{path} is larger than settings may be, {MAX_BYTES:,} bytes")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise FinetuneError(f"{path} has aliases (*name), which can make a small file endless; write them out")
        node = yaml.SafeLoader(text).get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise FinetuneError(f"{path} holds no settings; expected lines such as: epochs: 30")
        names = [str(key.value).replace("-", "_") for key, _ in node.value]
        values = yaml.safe_load(text)
    except OSError as error:
        raise FinetuneError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, FinetuneError):
            raise
        raise FinetuneError(f"{path} is not a YAML file: {error}") from error
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise FinetuneError(f"{path}: there is no setting {name!r}{f'; did you mean {close[0]}?' if close else ''}")
        if names.count(name) > 1:
            raise FinetuneError(f"{path}: {name} is there twice; keep one")
    found = dict(zip(names, values.values(), strict=True))
    places = os.environ if environment is None else environment
    for name, value in found.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str | int | float) for one in values):
            raise FinetuneError(
                f"{path}: {name} must be text, a number, true or false, or a list of these; got {value!r}"
            )
        placed = [_placed(one, places, path) if isinstance(one, str) else one for one in values]
        found[name] = placed if isinstance(value, list) else placed[0]
    return found


def _placed(text: str, places: Mapping[str, str], path: str | os.PathLike[str]) -> str:
    """Return a text with ``${NAME}`` replaced, as in the suites of `embedkit bench`."""

    def place(found: re.Match[str]) -> str:
        variable = f"EMBEDKIT_{found[1].upper()}"
        if variable not in places:
            raise FinetuneError(f"{path}: ${{{found[1]}}} is a place that nobody says; set the variable {variable}")
        return places[variable]

    return _PLACE.sub(place, text)
