"""Text for people: file names and class names may hold anything, and one image is not images."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return text with control characters, line breaks and undecodable bytes written as escapes.

    Examples
    --------
    >>> from embedkit.text import printable
    >>> print(printable("two" + chr(10) + "lines.jpg"))
    two\nlines.jpg
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def counted(count: int, noun: str) -> str:
    """Return a number of things.

    Examples
    --------
    >>> from embedkit.text import counted
    >>> counted(1, "class"), counted(1200, "class"), counted(0, "image")
    ('1 class', '1,200 classes', '0 images')
    """
    plural = noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {plural}"


def say_nothing(*news: object) -> None:
    """Take news of progress, where nobody asked for any."""
