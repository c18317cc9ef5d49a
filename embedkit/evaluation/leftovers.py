"""Leftovers: files and folders in the making, and what becomes of those whose process was killed."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedkit.store.durable import ASIDE, aside_name

_NAME = re.compile(rf"{re.escape(ASIDE)}{re.escape(socket.gethostname())}-(\d{{1,10}})-[0-9a-f]{{12}}")


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """Yield a new folder for files in the making, and remove it on the way out."""
    path = folder / aside_name()
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what processes of this machine have left aside in a folder that are not there any more.

    Parameters
    ----------
    folder : Path
        Only what lies in it by a name of `embedkit.store.durable.aside_name` is looked at.

    Returns
    -------
    list of str
        The names of what was removed.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from embedkit.evaluation.leftovers import folder_aside, remove_leftovers
    >>> place = tempfile.TemporaryDirectory()
    >>> with folder_aside(Path(place.name)):
    ...     remove_leftovers(Path(place.name))
    []
    >>> place.cleanup()
    """
    removed = []
    for path in sorted(folder.glob(f"{ASIDE}*")):
        found = _NAME.fullmatch(path.name)
        if found is None or _is_running(int(found[1])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed


def _is_running(pid: int) -> bool:
    """Return whether a process of this number may be there; True where the system is not asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
