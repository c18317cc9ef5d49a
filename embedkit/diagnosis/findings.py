"""What an examination finds."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = STATES = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
        What.
    state : {"ok", "warn", "fail"}
        "warn" costs speed, comfort or an option; with "fail" embedkit does not work.
    found : str
        How it is, in one line.
    advice : str
        What to do about it; empty where there is nothing to do.
    """

    name: str
    state: str
    found: str
    advice: str = ""


def gigabytes(count: float) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:.1f} GB"
