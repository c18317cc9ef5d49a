"""Untrusted text made fit to print: file names and class names may hold anything."""

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
