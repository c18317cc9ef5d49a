"""Patterns that stand for many names, as shards of a data set have them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from embedkit.errors import ImageError

MOST_NAMES = 1_000_000

_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})(?:\.\.(-?[0-9]{1,18}))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])")


def expand(pattern: str | os.PathLike[str]) -> list[str]:
    """Return the names that a pattern with braces stands for, in its order.

    ``{000..099}`` counts with as many digits as are written, ``{0..100..10}`` in steps, and ``{a..e}`` through letters;
    ``{train,val}`` lists. Several stand for all combinations. Braces within braces, and braces that hold neither, are
    part of the name.

    Parameters
    ----------
    pattern : path-like
        A path or a URL. A file that is called so literally is meant itself.

    Returns
    -------
    list of str

    Raises
    ------
    ImageError
        When it stands for more than a million names.

    Examples
    --------
    >>> from embedkit.sources import expand
    >>> expand("{train,val}-{08..10}.tar")[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    text = os.fspath(pattern)
    if "{" not in text or os.path.lexists(text):
        return [text]
    choices: list[Sequence[str]] = []
    count = 1
    for number, part in enumerate(_BRACES.split(text)):
        choice = _choices(part) if number % 2 else [part]
        count *= len(choice)
        if count > MOST_NAMES:
            raise ImageError(text, f"stands for more than {MOST_NAMES:,} names", "refused")
        choices.append(choice)
    return ["".join(names) for names in itertools.product(*choices)]


@dataclass(frozen=True)
class _Counted(Sequence[str]):
    """Numbers as they are written, made as they are asked for."""

    numbers: range
    width: int

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> str: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...

    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if isinstance(at, slice):
            return _Counted(self.numbers[at], self.width)
        return f"{self.numbers[at]:0{self.width}d}"


def _choices(inner: str) -> Sequence[str]:
    if found := _NUMBERS.fullmatch(inner):
        width = max(map(len, found.group(1, 2))) if any(map(_is_padded, found.group(1, 2))) else 1
        return _Counted(_range(int(found[1]), int(found[2]), abs(int(found[3] or 1)) or 1), width)
    if found := _LETTERS.fullmatch(inner):
        return [chr(code) for code in _range(ord(found[1]), ord(found[2]), 1)]
    return inner.split(",") if "," in inner else [f"{{{inner}}}"]


def _range(first: int, last: int, step: int) -> range:
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)


def _is_padded(number: str) -> bool:
    digits = number.lstrip("-")
    return len(digits) > 1 and digits.startswith("0")
