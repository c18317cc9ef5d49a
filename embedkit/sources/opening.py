"""list_images: whatever people have, by what it looks like."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from embedkit.errors import ImageError
from embedkit.images import MAX_BYTES
from embedkit.sources.archives import ARCHIVE_SUFFIXES, list_archive
from embedkit.sources.choosing import choose, join, require_name, unite
from embedkit.sources.datasets import list_dataset, parse_dataset
from embedkit.sources.entries import Listing, have_folders
from embedkit.sources.failing import quoted
from embedkit.sources.filelists import list_files, list_named
from embedkit.sources.folders import SUFFIXES, find_files, images_of, is_called, without_images
from embedkit.sources.kinds import DATASET, KINDS, kind_of
from embedkit.sources.patterns import expand
from embedkit.sources.remote import is_remote, list_remote, public_url
from embedkit.sources.tables import TABLES, list_manifest
from embedkit.sources.videos import VIDEO_SUFFIXES, list_video, list_videos
from embedkit.sources.videos.rates import Rate
from embedkit.text import counted

log = logging.getLogger("embedkit")

# What an option of `list_images` is for, in words and as kinds of sources.
_APPLIES: dict[str, tuple[str, set[str]]] = {
    "columns": ("tables", {"table"}),
    "root": ("tables and lists of files", {"table", "list"}),
    "split": ("tables and datasets", {"table", "dataset"}),
    "box_format": ("tables", {"table"}),
    "fps": ("videos and folders of them", {"video", "folder"}),
}


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

    def require_use(self, kinds: set[str], source: str) -> None:
        """Raise when something is said that is for other kinds of sources than these."""
        if self.fps is not None:
            Rate.of(self.fps)
        for option, (words, applies) in _APPLIES.items():
            value = getattr(self, option)
            if value is not None and value != {} and not kinds & applies:
                what = f"this is {KINDS[min(kinds)]}" if len(kinds) == 1 else "none of the sources is one"
                reason = f"--{option.replace('_', '-')} applies to {words}, and {what}"
                raise ImageError(source, reason, "refused")


@dataclass(frozen=True)
class _Source:
    """One source: what its ids begin with if that is said, where it is, what it is, and the pattern it is one of."""

    name: str | None
    path: str
    kind: str
    pattern: _Pattern | None

    @property
    def shown(self) -> str:
        """Return where it is without what is secret in a URL."""
        return public_url(self.path) if is_remote(self.path) else self.path


@dataclass(frozen=True)
class _Pattern:
    """What stands for several sources."""

    text: str
    count: int

    def narrowed(self, error: ImageError) -> ImageError:
        """Return the failure of a source that is missing with what may be done about the pattern."""
        text = self.text.partition("=")[2] if _is_named(self.text) else self.text
        what = quoted(public_url(text) if is_remote(text) else text)
        hint = f"it is one of the {self.count:,} names that {what} stands for; narrow that to those that are there"
        return ImageError(error.id, f"{error.reason}; {hint}", error.kind)


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
        Of tables; see `embedkit.sources.list_manifest`. `split` is that of datasets, too, and `root` that of image
        files one by one, whose ids are relative to the deepest folder that holds all of them otherwise.
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
        Naming the source that cannot be listed or has no images, or what is said and applies to no source.
    MissingExtraError
        When a kind of source needs a package that is not installed.

    Examples
    --------
    >>> import embedkit as ek
    >>> ek.list_images("spring/", "autumn.zip", exclude=["*.gif"], sample=1000)  # doctest: +SKIP
    """
    how = _How(columns, root, split, box_format, fps, follow_links, max_bytes)
    if files_from is not None:
        if sources:
            raise ImageError(os.fspath(files_from), "name sources, or a list of files, but not both", "refused")
        how.require_use({"list"}, os.fspath(files_from))
        listing = list_named(files_from, root=root, max_bytes=max_bytes)
    elif not sources:
        reason = "none is named; name a folder, an archive, a table or a URL"
        raise ImageError("the sources", reason, "missing")
    else:
        listing = _listed(_parsed(sources), how)
    return choose(listing, include=include, exclude=exclude, limit=limit, sample=sample, seed=seed, shard=shard)


def _parsed(sources: Sequence[str | os.PathLike[str]]) -> list[_Source]:
    """Return the sources that names and patterns stand for; all of this machine are there."""
    found: list[_Source] = []
    for source in sources:
        text = os.fspath(source)
        names = expand(text)
        pattern = None if names == [text] else _Pattern(text, len(names))
        for called in names:
            name, path = called.split("=", 1) if _is_named(called) else (None, called)
            try:
                found.append(_Source(name, path, kind_of(path), pattern))
            except ImageError as error:
                if pattern is None or error.kind != "missing":
                    raise
                raise pattern.narrowed(error) from error
    return found


def _listed(sources: Sequence[_Source], how: _How) -> Listing:
    """Return the listing of one source, or of several as one."""
    kinds, alone = {source.kind for source in sources}, len(sources) == 1
    if kinds == {"image"} and all(source.name is None for source in sources):
        kinds = {"list"}
    how.require_use(kinds, sources[0].shown if alone else "the sources")
    if kinds == {"list"}:
        return list_files([source.path for source in sources], root=how.root, max_bytes=how.max_bytes)
    if alone and sources[0].name is None and sources[0].pattern is None:
        return _list_one(sources[0], how)
    return join(_list_each(sources, how))


def _list_each(sources: Sequence[_Source], how: _How) -> dict[str, Listing]:
    """Return the listing of each source by what its ids begin with."""
    named: dict[str, _Source] = {}
    for source in sources:
        name = require_name(source.name or _name_of(source.path), source.shown)
        if name in named:
            reason = f"two sources are called {name}; call one otherwise: NAME={source.shown}"
            raise ImageError(source.shown, reason, "refused")
        named[name] = source
    listings: dict[str, Listing] = {}
    for name, source in named.items():
        try:
            listings[name] = _list_one(source, how)
        except ImageError as error:
            if source.pattern is None or error.kind != "missing" or not is_remote(source.path):
                raise
            raise source.pattern.narrowed(error) from error
    return listings


def _list_one(source: _Source, how: _How) -> Listing:
    """Return the listing of one source by its kind."""
    path, kind = source.path, source.kind
    if kind == "folder":
        return _list_folder(path, how)
    if kind == "table":
        return list_manifest(
            path, root=how.root, columns=how.columns, split=how.split, box_format=how.box_format,
            follow_links=how.follow_links, max_bytes=how.max_bytes,
        )  # fmt: skip
    if kind == "archive":
        return list_archive(path, max_bytes=how.max_bytes)
    if kind == "URL":
        return list_remote(path, max_bytes=how.max_bytes)
    if kind == "dataset":
        name, config = parse_dataset(path) if path.startswith(DATASET) else (path, None)
        return list_dataset(name, split=how.split, config=config, max_bytes=how.max_bytes)
    if kind == "video":
        if how.fps is None:
            raise ImageError(path, "a video: say how many frames a second to take, with --fps 1", "unsupported")
        return list_video(path, how.fps)
    return list_files([path], max_bytes=how.max_bytes)


def _list_folder(root: str, how: _How) -> Listing:
    """Return the images in a folder and, where they are wanted, the frames of the videos in it."""
    wanted = SUFFIXES if how.fps is None else (*SUFFIXES, *VIDEO_SUFFIXES)
    others = (*VIDEO_SUFFIXES, *ARCHIVE_SUFFIXES, *TABLES)
    found = find_files(root, wanted, note=others, follow_links=how.follow_links)
    if not found.ids and not found.failures:
        raise without_images(root, found, *_hints(root, found.noted))
    if how.fps is None:
        videos = sum(is_called(id, VIDEO_SUFFIXES) for id in found.noted)
        if videos:
            are = "is" if videos == 1 else "are"
            log.info("%s: %s %s left out; --fps 1 takes frames", root, counted(videos, "video"), are)
        return images_of(root, found.ids, found, how.max_bytes)
    videos_in_it = [id for id in found.ids if is_called(id, VIDEO_SUFFIXES)]
    images = images_of(root, [id for id in found.ids if not is_called(id, VIDEO_SUFFIXES)], found, how.max_bytes)
    if not videos_in_it:
        return images
    shaped = have_folders(videos_in_it) and (bool(images.classes) or not images.files)
    return unite([images, list_videos(root, videos_in_it, how.fps, shaped=shaped)])


def _hints(root: str, others: Sequence[str]) -> Iterator[str]:
    """Yield what else can be taken of a folder without images."""
    if videos := sum(is_called(id, VIDEO_SUFFIXES) for id in others):
        yield f"it holds {counted(videos, 'video')}: --fps 1 takes frames"
    for what, suffixes in (("archive", ARCHIVE_SUFFIXES), ("table", TABLES)):
        if some := [id for id in others if is_called(id, suffixes)]:
            them = "it" if len(some) == 1 else "them"
            example = quoted(os.path.join(root, min(some)))
            yield f"it holds {counted(len(some), what)}: name {them}, such as {example}"


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
