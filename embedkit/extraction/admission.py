"""Which ids of a listing a store can hold: a run must not find out at its end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace

from embedkit.errors import ImageError
from embedkit.sources import Listing
from embedkit.store.tables import is_id

# Ids are stored at the length of the longest, so that one of a megabyte would cost a megabyte for every image.
MAX_ID_BYTES = 1024


def admitted(listing: Listing) -> Listing:
    """Return a listing of which a store can hold every image and every failure.

    An image whose id cannot be held becomes a failure. The ids of failures may come from names that are no ids, such as
    ``../x.jpg``: they are escaped, cut and numbered until each is an id of its own.

    Raises
    ------
    ImageError
        When two images have one id, or the ids are not sorted: whoever made the listing must mend that.
    """
    refused, before = [], b""
    for number, entry in enumerate(listing.files):
        id = _encoded(entry.id)
        if id <= before and number:
            what = "two images have this id" if id == before else "the ids are not sorted by their bytes"
            raise ImageError(entry.id, what, "refused")
        before = id
        if not is_id(id) or len(id) > MAX_ID_BYTES:
            refused.append(number)
    if not refused and not listing.failures:
        return listing
    failures = list(listing.failures)
    if refused:
        failures += [_refusal(listing.files[number].id) for number in refused]
        without = set(refused)
        listing = replace(listing, files=[file for number, file in enumerate(listing.files) if number not in without])
    return replace(listing, failures=_told_apart(failures, listing))


def _refusal(id: str) -> ImageError:
    length = len(_encoded(id))
    if length > MAX_ID_BYTES:
        return ImageError(id, f"its id has {length:,} bytes, and an id has at most {MAX_ID_BYTES:,}", "refused")
    return ImageError(id, "a store cannot hold this id: it is no relative path", "refused")


def _encoded(id: str) -> bytes:
    """Return the bytes of an id; signs that no name on a disk has are escaped, and sort after all others do."""
    try:
        return os.fsencode(id)
    except UnicodeEncodeError:
        return id.encode("utf-8", "backslashreplace")


def _told_apart(failures: Sequence[ImageError], listing: Listing) -> list[ImageError]:
    """Return failures with ids that a store can hold, no two of which are one, and none an image's."""
    wanted = {_holdable(failure.id) for failure in failures}
    taken = {file.id for file in listing.files if file.id in wanted}
    named: dict[str, ImageError] = {}
    for failure in sorted(failures, key=lambda failure: _encoded(failure.id)):
        first = id = _holdable(failure.id)
        number = 2
        while id in named or id in taken:
            id, number = f"{first}#{number}", number + 1
        named[id] = failure if id == failure.id else ImageError(id, failure.reason, failure.kind)
    return sorted(named.values(), key=lambda failure: os.fsencode(failure.id))


def _holdable(id: str) -> str:
    """Return an id, or where a store cannot hold it what is most like it."""
    data = _encoded(id).replace(b"\0", b"%00")
    if data.startswith(b"/"):
        data = b"%2F" + data[1:]
    data = b"/".join(b"%2E%2E" if part == b".." else part for part in data.split(b"/")) or b"%"
    if len(data) > MAX_ID_BYTES - 16:
        data = data[: MAX_ID_BYTES - 80] + b"..." + hashlib.sha256(data).hexdigest()[:16].encode()
    return os.fsdecode(data)
