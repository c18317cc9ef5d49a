"""extract: a folder of images and a backbone become a store."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.backbones import Backbone, Batch, in_batches, stream
from embedkit.errors import BackboneError, ImageError
from embedkit.images import ImageFile, Listing, list_images, read_bytes
from embedkit.store import Changes, Failures, Images, Inventory, Rows, Run, Store, Update

MAX_LAYERS = 32
SECONDS_A_PART = 2.0
MAX_PART_ROWS = 4096
MAX_PART_BYTES = 64 << 20

log = logging.getLogger("embedkit")


@dataclass(frozen=True)
class Progress:
    """How far an extraction is.

    Attributes
    ----------
    done, total : int
        Images that are settled, and all there are.
    failed : int
        Those of `done` that could not be read.
    kept : int
        Those of `done` that were settled when this run began.
    committed : int
        Those of `done` that would survive a power cut now.
    changes : Changes
        What there was to do.
    """

    done: int
    total: int
    failed: int
    kept: int
    committed: int
    changes: Changes


def extract(
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    backbone: Backbone | str,
    *,
    layers: Sequence[str] = (),
    batch_size: int = 32,
    part_size: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    checksum: bool = False,
    retry_failed: bool = False,
    repair: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Store:
    """Embed every image below a folder into a store, or bring a store up to date with the folder.

    An image that cannot be read is recorded with its reason in ``store.failures`` and takes no other image along. What
    is computed is written to ``OUTPUT.parts`` every two seconds or so and survives a kill or a power cut; the same call
    goes on from there. The store appears at `output` when it is whole, and not before.

    Of a store that exists, the rows of unchanged images are kept without reading them (same id, size and modification
    time), and those of moved, copied or touched images are kept because their content is known. Changed and new images
    are computed, and the rows of images that are gone are dropped. The result equals that of a new extraction.

    Parameters
    ----------
    images : path-like
        The folder, searched recursively. When no image lies in the folder itself, the first folder below it is each
        image's class.
    output : path-like
        The store to make or update.
    backbone : Backbone or str
        What embeds; a name is loaded with its defaults.
    layers : sequence of str, optional
        More embeddings from the same forward pass, such as ``("avg", "layer3:avg")``; see ``Backbone.load(pool=)``.
        `Store.open` has them by their names.
    batch_size : int, default 32
        Images a forward pass. Larger ones gain nothing on a processor and need memory.
    part_size : int, optional
        Images that are written at a time, rounded down to whole batches. By default as many as take two seconds, for
        that is what a kill costs. The store does not depend on it.
    workers : int, optional
        Decoding threads; by default one for each usable processor.
    overwrite : bool, default False
        Whether a store that exists at `output` is replaced instead of updated.
    checksum : bool, default False
        Whether every image is read to see whether its content changed, for tools that keep modification times.
    retry_failed : bool, default False
        Whether images that failed before are tried again.
    repair : bool, default False
        Whether rows of the store that do not match their checksums are computed again.
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
    StoreBusyError
        When another process is writing the store.
    SpecMismatchError
        When the store, or an unfinished run for it, was made otherwise.
    StoreFormatError
        When the store is damaged.
    StoreExistsError
        When none of the images of the store, or of an unfinished run, is in the folder: it was made from another one.
    BackboneError
        When the backbone cannot be loaded, or has no such layer.

    Examples
    --------
    >>> import embedkit as ek
    >>> store = ek.extract("photos/", "photos.h5", "resnet18.a1_in1k")  # doctest: +SKIP
    >>> store.embeddings.shape  # doctest: +SKIP
    (1200, 512)
    """
    listing = list_images(images)
    if isinstance(backbone, str):
        backbone = Backbone.load(backbone)
    specs = {layer: backbone.layer_spec(layer) for layer in _checked_layers(layers)}
    information = _information(listing, backbone)
    run = Run(output, backbone.spec, layers=specs, information=information, overwrite=overwrite, repair=repair)
    with run:
        update = run.prepare(
            _inventory(listing),
            lambda numbers: _hashes(listing.files, numbers, workers),
            part_size=lambda count: part_size or _part_size(backbone, tuple(specs), batch_size, count),
            batch_size=batch_size,
            checksum=checksum,
            retry_failed=retry_failed,
        )
        try:
            failed, reason = _compute(run, update, listing, backbone, tuple(specs), workers, progress)
            if failed == len(listing.files) + len(listing.failures):
                run.abandon()
                raise ImageError(os.fspath(images), f"none of its {failed} images could be read; the first: {reason}")
            run.finalise(update)
        except (OSError, KeyboardInterrupt):
            log.warning("what is computed is kept in %s: the same command goes on from there", run.folder)
            raise
    return Store.open(output)


@dataclass
class _Reading:
    """One image on its way through the pipeline, with what was seen of its file when it was read."""

    file: ImageFile
    size: int = 0
    mtime_ns: int = 0
    sha256: bytes = bytes(32)


def _compute(
    run: Run,
    update: Update,
    listing: Listing,
    backbone: Backbone,
    layers: tuple[str, ...],
    workers: int | None,
    progress: Callable[[Progress], None] | None,
) -> tuple[int, str]:
    """Compute the parts that are to do, in their order, and return how many images failed in all, and a reason."""
    total = len(listing.files) + len(listing.failures)
    waiting = sum(len(update.plan.part(number)) for number in update.todo)
    done = kept = committed = total - waiting
    before = [*listing.failures, *update.failures]
    failed, reason = len(before), next((f"{id}: {why}" for id, why in before), "")

    def report() -> None:
        if progress is not None:
            progress(Progress(done, total, failed, kept, committed, update.changes))

    report()
    with ThreadPoolExecutor(1, thread_name_prefix="embedkit-commit") as writer:
        commits: deque[tuple[Future[None], int]] = deque()
        rows: list[Batch[_Reading, dict[str, npt.NDArray[np.float32]]]] = []
        for number, ends, batch in _batches(update, listing, backbone, layers, workers):
            rows.append(batch)
            done += len(batch.items) + len(batch.failures)
            failed += len(batch.failures)
            reason = reason or next((str(error) for _, error in batch.failures), "")
            if ends:
                count = sum(len(batch.items) + len(batch.failures) for batch in rows)
                commits.append((writer.submit(run.write, number, _rows(rows)), count))
                rows = []
            while commits and (commits[0][0].done() or len(commits) > 2):
                commit, count = commits.popleft()
                commit.result()
                committed += count
            report()
        for commit, count in commits:
            commit.result()
            committed += count
    report()
    return failed, reason


def _batches(
    update: Update, listing: Listing, backbone: Backbone, layers: tuple[str, ...], workers: int | None
) -> Iterator[tuple[int, bool, Batch[_Reading, dict[str, npt.NDArray[np.float32]]]]]:
    """Yield part, whether the part ends, and what became of the batch; the pipeline flows across the parts."""
    files = {os.fsencode(file.id): file for file in listing.files} if update.todo else {}

    def pixels(reading: _Reading) -> npt.NDArray[np.uint8]:
        path, id = reading.file.path, reading.file.id
        # Looked at before it is read: when somebody writes to it meanwhile, the next run sees another time.
        reading.size, reading.mtime_ns = _status(path)
        data = read_bytes(path, id)
        reading.sha256 = hashlib.sha256(data).digest()
        return backbone.pixels(data, id=id)

    def planned() -> Iterator[tuple[int, bool, list[_Reading]]]:
        for number in update.todo:
            ids = update.plan.part(number).tolist()
            for start in range(0, len(ids), update.plan.batch_size):
                batch = ids[start : start + update.plan.batch_size]
                yield number, start + len(batch) == len(ids), [_Reading(files[id]) for id in batch]

    plan, copy = itertools.tee(planned())
    batches = stream(
        (batch for _, _, batch in copy), pixels, lambda crops: backbone.embed_layers(crops, layers), workers=workers
    )
    for (number, ends, _), batch in zip(plan, batches, strict=True):
        yield number, ends, batch


def _rows(batches: Sequence[Batch[_Reading, dict[str, npt.NDArray[np.float32]]]]) -> Rows:
    good = [reading for batch in batches for reading in batch.items]
    bad = [(reading, error.reason) for batch in batches for reading, error in batch.failures]
    images = Images.of(
        [reading.file.id for reading in good], [reading.size for reading in good],
        [reading.mtime_ns for reading in good], [reading.sha256 for reading in good],
    )  # fmt: skip
    failures = Failures.of(
        [reading.file.id for reading, _ in bad], [reason for _, reason in bad],
        [reading.size for reading, _ in bad], [reading.mtime_ns for reading, _ in bad],
    )  # fmt: skip
    names = batches[0].embeddings
    return Rows(
        images, failures, {name: np.concatenate([batch.embeddings[name] for batch in batches]) for name in names}
    )


def _inventory(listing: Listing) -> Inventory:
    status = np.array([_status(file.path) for file in listing.files], dtype=np.int64).reshape(-1, 2)
    codes = {name: code for code, name in enumerate(listing.classes)}
    labels = [-1 if file.label is None else codes[file.label] for file in listing.files]
    return Inventory(
        ids=np.array([os.fsencode(file.id) for file in listing.files] or np.empty(0, dtype="S1")),
        sizes=status[:, 0],
        mtimes_ns=status[:, 1],
        labels=np.array(labels, dtype=np.int32) if listing.classes else None,
        classes=listing.classes,
        failures=listing.failures,
    )


def _status(path: str) -> tuple[int, int]:
    """Return size and modification time in nanoseconds; of a file that is gone, what no file has."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, -1
    return status.st_size, status.st_mtime_ns


def _hashes(files: Sequence[ImageFile], numbers: list[int], workers: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield the SHA-256 of some files, without those that cannot be read."""

    def sha256(number: int) -> bytes | None:
        try:
            return hashlib.sha256(read_bytes(files[number].path, files[number].id)).digest()
        except ImageError:
            return None

    if numbers:
        log.info("comparing the content of %s images", f"{len(numbers):,}")
    with ThreadPoolExecutor(workers or 2, thread_name_prefix="embedkit-hash") as pool:
        for batch in in_batches(numbers, 1024):  # The pool would otherwise queue millions of tasks.
            for number, found in zip(batch, pool.map(sha256, batch), strict=True):
                if found is not None:
                    yield number, found


def _part_size(backbone: Backbone, layers: tuple[str, ...], batch_size: int, count: int) -> int:
    """Return how many images take about two seconds; a kill costs no more than that."""
    if count <= 4 * batch_size:
        return batch_size
    started = time.perf_counter()
    zeros = np.zeros((*backbone.preprocessing.img_size, 3), dtype=np.uint8)
    backbone.embed_layers([zeros] * batch_size, layers)
    rate = batch_size / (time.perf_counter() - started)
    width = 4 * (backbone.dim + sum(backbone.layer_spec(layer).dim for layer in layers))
    return max(batch_size, min(int(SECONDS_A_PART * rate), MAX_PART_ROWS, MAX_PART_BYTES // width))


def _checked_layers(layers: Iterable[str]) -> list[str]:
    names = list(layers)
    if isinstance(layers, str) or len(names) > MAX_LAYERS or len(set(names)) < len(names):
        raise BackboneError(f"layers are at most {MAX_LAYERS} different names, got {layers!r}")
    for name in names:
        if not name or "/" in name or len(name.encode()) > 64:
            raise BackboneError(f"{name!r} is not the name of a layer: 1 to 64 bytes, without a slash")
    return names


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
