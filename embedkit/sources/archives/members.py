"""Member: what an archive says about one of its files."""

from __future__ import annotations

from typing import NamedTuple

_MOST_SECONDS = 2**63 // 10**9 - 1


class Place(NamedTuple):
    """Where a member's bytes lie, and what is known about them.

    Attributes
    ----------
    offset, stored, size : int
        Where the archive has it, in how many bytes, and how many come of them.
    time_ns : int
        When it was modified; see `modified`.
    packed : bool
        Whether it is compressed.
    crc : int
        The checksum of its bytes, where the archive has one.
    """

    offset: int
    stored: int
    size: int
    time_ns: int
    packed: bool = False
    crc: int = 0


class Member(NamedTuple):
    """A member of an archive: a file, a hard link to one, a folder, or something that is not read.

    Attributes
    ----------
    name : bytes
        In UTF-8 as far as it is; as the archive has it. Nothing when it is about the archive itself.
    place : Place or None
        Of a file.
    target : bytes
        Of a hard link, the name of the file.
    folder : bool
        Whether it holds nothing that could be read.
    reason, kind : str
        Why it is not read.
    """

    name: bytes
    place: Place | None = None
    target: bytes = b""
    folder: bool = False
    reason: str = ""
    kind: str = ""

    @classmethod
    def fault(cls, name: bytes, reason: str, kind: str) -> Member:
        """Make what is not read."""
        return cls(name, reason=reason, kind=kind)


def modified(seconds: int, content: int) -> int:
    """Return a time in nanoseconds whose digits below the second stand for the content.

    An archive has its times in whole seconds, if not all the same. With a checksum in the digits that are free, another
    archive under the same name is noticed although its members have the sizes and times of before, and a member stays
    the same when others are appended.
    """
    return max(-_MOST_SECONDS, min(seconds, _MOST_SECONDS)) * 10**9 + content % 10**9
