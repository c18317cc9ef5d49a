"""What failures of a source are called, and how they show the texts of strangers."""

from __future__ import annotations

import os

from embedkit.text import printable

MAX_TEXT_BYTES = 4096  # Of an id or a class.


def harmless(name: str) -> str:
    """Return a name as an id that stays below its root, for a store keeps the ids of failures too.

    What leads out is written as in URLs, and so is what no name of a file holds.

    Examples
    --------
    >>> from embedkit.sources.failing import harmless
    >>> harmless("cat/1.jpg"), harmless("/etc/x.jpg"), harmless("../x.jpg")
    ('cat/1.jpg', '%2Fetc/x.jpg', '%2E%2E/x.jpg')
    """
    if not is_encodable(name):
        name = name.encode("utf-8", "backslashreplace").decode()
    name = name.replace("\0", "%00")
    if name.startswith("/"):
        name = "%2F" + name[1:]
    if ".." in name:
        name = "/".join("%2E%2E" if part == ".." else part for part in name.split("/"))
    return name or "%"


def is_encodable(text: str) -> bool:
    r"""Return whether a text has bytes: those of a file's name do, a half of a pair of surrogates has none.

    Examples
    --------
    >>> from embedkit.sources.failing import is_encodable
    >>> is_encodable("caf\udce9.jpg"), is_encodable("\ud83c.jpg")
    (True, False)
    """
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def find_flaw(text: str, what: str) -> str | None:
    r"""Return why a store cannot hold a text, None when it can.

    Parameters
    ----------
    text : str
        From a stranger.
    what : str
        What it is: "name", "class".

    Examples
    --------
    >>> from embedkit.sources.failing import find_flaw
    >>> print(find_flaw("rose", "class"), find_flaw("ro" + chr(0) + "se", "class"), sep=chr(10))
    None
    a class has no NUL: 'ro\x00se'
    """
    if not is_encodable(text):
        return f"{quoted(text)} is no text that a {what} can have"
    if "\0" in text:
        return f"a {what} has no NUL: {quoted(text)}"
    if len(os.fsencode(text)) > MAX_TEXT_BYTES:
        return f"a {what} has at most {MAX_TEXT_BYTES:,} bytes: {quoted(text)}"
    return None


def quoted(text: str, most: int = 200) -> str:
    r"""Return a text as a message shows it: in quotation marks, in one line, and cut.

    Examples
    --------
    >>> from embedkit.sources.failing import quoted
    >>> print(quoted("two" + chr(10) + "lines"), quoted("rosa canina", 4))
    'two\nlines' 'rosa'...
    """
    return f"'{printable(text[:most])}'" + ("..." if len(text) > most else "")
