"""extract: a folder of images and a backbone become a store."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.backbones import Backbone, Batch, stream
from embedkit.errors import ImageError
from embedkit.images import ImageFile, Listing, list_images, read_bytes
from embedkit.store import Store, StoreWriter, refuse_existing


@dataclass(frozen=True)
class Progress:
    """How far an extraction is: images embedded or failed so far, all there are, and how many of them failed."""

    done: int
    total: int
    failed: int


def extract(
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    backbone: Backbone | str,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Store:
    """Embed every image below a folder into a store.

    An image that cannot be read is recorded with its reason in ``store.failures`` and takes no other image along. The
    store appears at `output` when it is whole, and not before.

    Parameters
    ----------
    images : path-like
        The folder, searched recursively. When no image lies in the folder itself, the first folder below it is each
        image's class.
    output : path-like
        The store to make.
    backbone : Backbone or str
        What embeds; a name is loaded with its defaults.
    batch_size : int, default 32
        Images a forward pass. Larger ones gain nothing on a processor and need memory.
    workers : int, optional
        Decoding threads; by default one for each usable processor.
    overwrite : bool, default False
        Whether a store that exists at `output` may be replaced.
    progress : callable, optional
        Called with a `Progress` after every batch.

    Returns
    -------
    Store
        Opened.

    Raises
    ------
    ImageError
        When there is no such folder, no image in it, or none that can be read.
    StoreExistsError
        When `output` exists and `overwrite` is false.
    BackboneError
        When the backbone cannot be loaded.

    Examples
    --------
    >>> import embedkit as ek
    >>> store = ek.extract("photos/", "photos.h5", "resnet18.a1_in1k")  # doctest: +SKIP
    >>> store.embeddings.shape  # doctest: +SKIP
    (1200, 512)
    """
    refuse_existing(output, overwrite)
    listing = list_images(images)
    if isinstance(backbone, str):
        backbone = Backbone.load(backbone)
    information = _information(listing, backbone)
    with StoreWriter(output, backbone.spec, information=information, overwrite=overwrite) as writer:
        for id, reason in listing.failures:
            writer.fail(id, reason)
        total = len(listing.files) + len(listing.failures)
        done = failed = len(listing.failures)
        first = next((f"{id}: {reason}" for id, reason in listing.failures), "")
        for batch in _batches(listing.files, backbone, batch_size, workers):
            _record(batch, writer)
            done += len(batch.items) + len(batch.failures)
            failed += len(batch.failures)
            first = first or next((str(error) for _, error in batch.failures), "")
            if progress is not None:
                progress(Progress(done, total, failed))
        if failed == total:
            raise ImageError(os.fspath(images), f"none of its {total} images could be read; the first: {first}")
        writer.finalise()
    return Store.open(output)


@dataclass
class _Reading:
    """One image on its way through the pipeline, with what was seen of its file while it was read."""

    file: ImageFile
    size: int = 0
    mtime_ns: int = 0
    sha256: bytes = bytes(32)


def _batches(
    files: list[ImageFile], backbone: Backbone, batch_size: int, workers: int | None
) -> Iterator[Batch[_Reading]]:
    def pixels(reading: _Reading) -> npt.NDArray[np.uint8]:
        path, id = reading.file.path, reading.file.id
        data = read_bytes(path, id)
        status = os.stat(path)
        reading.size, reading.mtime_ns = status.st_size, status.st_mtime_ns
        reading.sha256 = hashlib.sha256(data).digest()
        return backbone.pixels(data, id=id)

    readings = (_Reading(file) for file in files)
    return stream(readings, pixels, backbone.embed_pixels, batch_size=batch_size, workers=workers)


def _record(batch: Batch[_Reading], writer: StoreWriter) -> None:
    if batch.items:
        writer.append(
            batch.embeddings,
            [item.file.id for item in batch.items],
            sizes=[item.size for item in batch.items],
            mtimes_ns=[item.mtime_ns for item in batch.items],
            content_sha256=[item.sha256 for item in batch.items],
            labels=[item.file.label for item in batch.items],
        )
    for item, error in batch.failures:
        writer.fail(item.file.id, error.reason, size=item.size, mtime_ns=item.mtime_ns)


def _information(listing: Listing, backbone: Backbone) -> dict[str, Any]:
    """Return what explains a run without deciding its numbers."""
    return {
        "root": os.path.abspath(listing.root),
        "recipe": backbone.recipe,
        "device": str(backbone.device),
        "host": platform.node(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


_PACKAGES = ("embedkit", "timm", "torch", "torchvision", "pillow", "numpy", "h5py")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


__all__ = ["Progress", "extract"]
