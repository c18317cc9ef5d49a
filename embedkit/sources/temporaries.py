"""Room for temporary files, whose sizes strangers decide."""

from __future__ import annotations

import shutil
import tempfile

from embedkit.errors import ImageError

FREE_BYTES = 256 << 20  # What is left to others.
LOOK_EVERY = 64 << 20  # Bytes that may be written before the disk is looked at again.
MOST_UNKNOWN = 1 << 30  # What is taken from a stranger who does not say how much it will be.


def require_room(name: str, size: int, doing: str) -> None:
    """Raise when the disk of temporary files has no room for so many bytes more.

    Parameters
    ----------
    name : str
        What the failure names.
    size : int
        In bytes.
    doing : str
        What the room is for, such as "unpack".

    Raises
    ------
    ImageError

    Examples
    --------
    >>> from embedkit.sources.temporaries import require_room
    >>> require_room("photos.tar", 0, "download")
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES + size:
        reason = f"no room to {doing} it in {folder} ({free:,} bytes free); TMPDIR names another folder"
        raise ImageError(name, reason, "unreadable")
