"""list_images: whatever people have, by what it looks like."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from embedkit.errors import ImageError
from embedkit.sources.choosing import choose, join
from embedkit.sources.entries import Listing
from embedkit.sources.filelists import list_files
from embedkit.sources.folders import SUFFIXES, is_called, list_folder


def list_images(
    *sources: str | os.PathLike[str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    shard: tuple[int, int] | None = None,
    follow_links: bool = False,
) -> Listing:
    """List the images of one or more sources without opening any.

    Parameters
    ----------
    *sources : path-like
        Folders, or image files one by one. Of several folders, every id begins with the folder's name, or with
        another that is given as ``NAME=FOLDER``; an image keeps the class that it has in its own folder.
    include, exclude, limit, sample, seed, shard
        Which images to take; see `choose`.
    follow_links : bool, default False
        Whether symbolic links that lead out of a folder are followed.

    Returns
    -------
    Listing
        For `embedkit.extract`.

    Raises
    ------
    ImageError
        Naming the source that cannot be listed or has no images.

    Examples
    --------
    >>> import embedkit as ek
    >>> ek.list_images("spring/", "autumn/", exclude=["*.gif"], sample=1000)  # doctest: +SKIP
    """
    if not sources:
        raise ImageError("the sources", "none is named", "missing")
    names = [os.fspath(source) for source in sources]
    if all(is_called(name, SUFFIXES) and os.path.isfile(name) for name in names):
        listing = list_files(names)
    elif len(names) == 1 and not _is_named(names[0]):
        listing = _listed(names[0], follow_links=follow_links)
    else:
        listing = join(_named(names, follow_links=follow_links))
    return choose(listing, include=include, exclude=exclude, limit=limit, sample=sample, seed=seed, shard=shard)


def _listed(source: str, **options: Any) -> Listing:
    return list_folder(source, follow_links=options["follow_links"])


def _named(sources: Sequence[str], **options: Any) -> dict[str, Listing]:
    """Return the listing of each source by what its ids begin with."""
    listings: dict[str, Listing] = {}
    for source in sources:
        name, path = source.split("=", 1) if _is_named(source) else (_name_of(source), source)
        if name in listings:
            raise ImageError(source, f"two sources are called {name}; call one otherwise: NAME={path}", "refused")
        listings[name] = _listed(path, **options)
    return listings


def _is_named(source: str) -> bool:
    """Return whether a source is given as NAME=SOURCE; a file or folder of that very name comes first."""
    name, equals, _ = source.partition("=")
    return bool(name and equals) and "/" not in name and not os.path.exists(source)


def _name_of(source: str) -> str:
    return os.path.basename(os.path.abspath(source)) or "root"
