"""list_images: whatever people have, by what it looks like."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from embedkit.errors import ImageError
from embedkit.images import MAX_BYTES
from embedkit.sources.archives import ARCHIVE_SUFFIXES, list_archive
from embedkit.sources.choosing import choose, join, unite
from embedkit.sources.datasets import is_dataset_folder, list_dataset, parse_dataset
from embedkit.sources.entries import Listing, have_folders
from embedkit.sources.filelists import list_files, list_named
from embedkit.sources.folders import SUFFIXES, find_files, is_called, list_folder
from embedkit.sources.patterns import expand
from embedkit.sources.remote import is_remote, list_remote, public_url
from embedkit.sources.tables import TABLES, list_manifest
from embedkit.sources.videos import VIDEO_SUFFIXES, list_video, list_videos


@dataclass(frozen=True)
class _How:
    """What is said of all sources."""

    columns: Mapping[str, str] | None
    root: str | os.PathLike[str] | None
    split: str | None
    box_format: str | None
    fps: float | str | None
    follow_links: bool
    max_bytes: int


def list_images(
    *sources: str | os.PathLike[str],
    files_from: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    box_format: str | None = None,
    fps: float | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    shard: tuple[int, int] | None = None,
    follow_links: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Listing:
    """List the images of one or more sources without opening any.

    Of several sources, every id begins with the source's name, which is that of its file or folder without the suffix
    of an archive, or another one that is given as ``NAME=SOURCE``. An image keeps the class that it has in its own.

    Parameters
    ----------
    *sources : path-like
        Folders; tar and zip archives; tables (.csv, .tsv, .jsonl, .parquet) with a row for each image; URLs of all of
        these that fsspec knows, such as ``s3://bucket/photos`` and ``https://host/photos.tar``; Hugging Face datasets,
        as a folder that ``save_to_disk`` wrote or as ``dataset:NAME``; videos, with `fps`. ``shards/{000..099}.tar``
        stands for a hundred sources. Or image files one by one.
    files_from : path-like, optional
        A file that names images, one a line or with NUL between them, instead of sources; ``-`` is standard input.
    columns, root, split, box_format
        Of tables; see `embedkit.sources.list_manifest`. `split` is that of datasets, too.
    fps : number or str, optional
        Take so many frames a second of videos, which are left out of folders otherwise.
    include, exclude, limit, sample, seed, shard
        Which images to take; see `embedkit.sources.choose`.
    follow_links : bool, default False
        Whether symbolic links that lead out of a folder are followed.
    max_bytes : int, default 536870910
        The largest file that is read: what the largest image that is decoded takes without compression.

    Returns
    -------
    Listing
        For `embedkit.extract`.

    Raises
    ------
    ImageError
        Naming the source that cannot be listed or has no images.
    MissingExtraError
        When a kind of source needs a package that is not installed.

    Examples
    --------
    >>> import embedkit as ek
    >>> ek.list_images("spring/", "autumn.zip", exclude=["*.gif"], sample=1000)  # doctest: +SKIP
    """
    names = [name for source in sources for name in expand(source)]
    how = _How(columns, root, split, box_format, fps, follow_links, max_bytes)
    if files_from is not None:
        if names:
            raise ImageError(os.fspath(files_from), "name sources, or a list of files, but not both", "refused")
        listing = list_named(files_from, max_bytes=max_bytes)
    elif not names:
        raise ImageError("the sources", "none is named", "missing")
    elif all(is_called(name, SUFFIXES) and os.path.isfile(name) for name in names):
        listing = list_files(names, max_bytes=max_bytes)
    elif len(names) == 1 and names[0] == os.fspath(sources[0]) and not _is_named(names[0]):
        listing = _listed(names[0], how)
    else:
        listing = join(_named(names, how))
    return choose(listing, include=include, exclude=exclude, limit=limit, sample=sample, seed=seed, shard=shard)


def _listed(source: str, how: _How) -> Listing:
    """Return the listing of one source, by what it looks like."""
    if source.startswith("dataset:"):
        name, config = parse_dataset(source)
        return list_dataset(name, split=how.split, config=config, max_bytes=how.max_bytes)
    called = public_url(source) if is_remote(source) else source
    if is_remote(source) and not is_called(called, (*ARCHIVE_SUFFIXES, *TABLES)):
        return list_remote(source, max_bytes=how.max_bytes)
    if is_dataset_folder(source):
        return list_dataset(source, split=how.split, max_bytes=how.max_bytes)
    if os.path.isdir(source):
        return _folder(source, how)
    if is_called(called, TABLES):
        return list_manifest(
            source, root=how.root, columns=how.columns, split=how.split, box_format=how.box_format,
            follow_links=how.follow_links, max_bytes=how.max_bytes,
        )  # fmt: skip
    if is_called(called, ARCHIVE_SUFFIXES):
        return list_archive(source, max_bytes=how.max_bytes)
    if is_called(source, VIDEO_SUFFIXES):
        if how.fps is None:
            raise ImageError(source, "a video: say how many frames a second to take, with --fps 1", "unsupported")
        return list_video(source, how.fps)
    if is_called(source, SUFFIXES) and os.path.isfile(source):
        return list_files([source], max_bytes=how.max_bytes)
    return list_folder(source)  # Which says what is wrong with it.


def _folder(source: str, how: _How) -> Listing:
    """Return the images in a folder and, where they are wanted, the frames of the videos in it."""
    videos = find_files(source, VIDEO_SUFFIXES, follow_links=how.follow_links).ids if how.fps is not None else []
    try:
        images = list_folder(source, follow_links=how.follow_links, max_bytes=how.max_bytes)
    except ImageError:
        if not videos:
            raise
        return list_videos(source, videos, how.fps or 1, shaped=have_folders(videos))
    if not videos:
        return images
    shaped = have_folders(videos) and (bool(images.classes) or not images.files)
    return unite([images, list_videos(source, videos, how.fps or 1, shaped=shaped)])


def _named(sources: Sequence[str], how: _How) -> dict[str, Listing]:
    """Return the listing of each source by what its ids begin with."""
    listings: dict[str, Listing] = {}
    for source in sources:
        name, path = source.split("=", 1) if _is_named(source) else (_name_of(source), source)
        if name in listings:
            raise ImageError(source, f"two sources are called {name}; call one otherwise: NAME={path}", "refused")
        listings[name] = _listed(path, how)
    return listings


def _is_named(source: str) -> bool:
    """Return whether a source is given as NAME=SOURCE; a file or folder of that very name comes first."""
    name, equals, _ = source.partition("=")
    return bool(name and equals) and "/" not in name and not os.path.exists(source)


def _name_of(source: str) -> str:
    """Return what the ids of a source among others begin with."""
    path = source.partition("?")[0].rstrip("/") if is_remote(source) else os.path.abspath(source)
    name = os.path.basename(path.removeprefix("dataset:")) or "root"
    suffix = max((suffix for suffix in ARCHIVE_SUFFIXES if is_called(name, (suffix,))), key=len, default="")
    return name[: -len(suffix)] if 0 < len(suffix) < len(name) else name
