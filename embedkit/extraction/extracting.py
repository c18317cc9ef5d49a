"""extract: a folder of images and a backbone become a store."""

from __future__ import annotations

import logging
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.backbones import Backbone, Choice, device_names, in_batches, log_differences, usable_processors
from embedkit.errors import BackboneError, ImageError
from embedkit.extraction.admission import admitted
from embedkit.extraction.computing import Job, compute, compute_parts, read_entry, sample_crops
from embedkit.extraction.devices import compute_on_devices
from embedkit.extraction.progress import Progress
from embedkit.extraction.reporting import engine_line, write_report
from embedkit.sources import Entry, Listing, content_sha256, list_images, list_memory
from embedkit.spec import BUNDLED
from embedkit.store import Inventory, Run, Store, Update
from embedkit.store.format import is_layer_name
from embedkit.text import counted

MAX_LAYERS = 32
SECONDS_A_PART = 2.0
MAX_PART_ROWS = 4096
MAX_PART_BYTES = 64 << 20

log = logging.getLogger("embedkit")


def extract(
    images: Any,
    output: str | os.PathLike[str],
    backbone: Backbone | str = BUNDLED,
    *,
    layers: Sequence[str] = (),
    batch_size: int | None = None,
    part_size: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    engine: str = "auto",
    devices: Sequence[str] = (),
    overwrite: bool = False,
    checksum: bool = False,
    retry_failed: bool = False,
    repair: bool = False,
    max_failures: int | float | None = None,
    progress: Callable[[Progress], None] | None = None,
    report: str | os.PathLike[str] | None = None,
    parent: Store | None = None,
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
    images : path-like, Listing, sequence, mapping, dataset or iterator
        A source of `list_images`, mostly a folder, which is searched recursively: when no image lies in the folder
        itself, the first folder below it is each image's class. Or what `list_images` returned. Or images that Python
        has, from a list of paths or arrays to a torch dataset; see `embedkit.sources.list_memory`.
    output : path-like
        The store to make or update.
    backbone : Backbone or str, default "nano"
        What embeds; a name is loaded with its defaults. "nano" comes with embedkit and needs no network; it is small,
        and most of `list_models` are stronger.
    layers : sequence of str, optional
        More embeddings from the same forward pass, such as ``("avg", "layer3:avg")``; see ``Backbone.load(pool=)``.
        `Store.open` has them by their names.
    batch_size : int, optional
        Images a forward pass; by default 8 on a processor, whose caches hold no more, and 256 on a GPU.
    part_size : int, optional
        Images that are written at a time, rounded down to whole batches. By default as many as take two seconds, for
        that is what a kill costs. The store does not depend on it.
    workers : int, optional
        Worker threads, of all devices; by default one for each usable processor. On a processor each takes its images
        through all steps, for a GPU they decode.
    threads : int, optional
        Threads that each worker's forward pass may use; by default one, which moves no bit whatever `workers` is.
    engine : str, default "auto"
        How the network is run. "auto" tries the ways that fit the device on the job's own images, when the job is long
        enough to pay for it, and takes the fastest whose numbers are those of eager float32. An update or a resumed run
        keeps the engine of before, so that its result equals that of a new extraction in every bit, unless it computes
        more than the store holds. Otherwise one of eager, graph, openvino and compile.
    devices : sequence of str, optional
        A process for each computes parts of the store, such as ``("cuda:0", "cuda:1")``, or ``("cuda:all",)`` for every
        GPU. They are of the kind that `backbone` is on, and share `workers` out. By default this process computes,
        where `backbone` is. The store does not depend on it.
    overwrite : bool, default False
        Whether a store that exists at `output` is replaced instead of updated.
    checksum : bool, default False
        Whether every image is read to see whether its content changed, for tools that keep modification times.
    retry_failed : bool, default False
        Whether images that failed before are tried again.
    repair : bool, default False
        Whether rows of the store that do not match their checksums are computed again.
    max_failures : int or float, optional
        How many images may fail, or below 1 which share of all of them; with one more the run ends, and what is
        computed is kept. 0 ends it at the first. By default any number may.
    progress : callable, optional
        Called with a `Progress` after every batch. What it raises ends the run; what was computed is kept.
    report : path-like, optional
        Where to write, as JSON, what was chosen and where the time went.
    parent : Store, optional
        The store of the backbone that this one was adapted from. The new store says which one that is.

    Returns
    -------
    Store
        Opened.

    Raises
    ------
    ImageError
        When there is no such folder, no image in it, none that can be read, or more that cannot than `max_failures`.
    StoreBusyError
        When another process is writing the store.
    SpecMismatchError
        When the store, or an unfinished run for it, was made otherwise.
    StoreFormatError
        When the store is damaged.
    StoreExistsError
        When none of the images of the store, or of an unfinished run, is in the folder: it was made from another one.
    BackboneError
        When the backbone cannot be loaded, or has no such layer, or a device is not there or dies.

    Examples
    --------
    >>> import embedkit as ek
    >>> store = ek.extract("photos/", "photos.h5", "resnet18.a1_in1k")  # doctest: +SKIP
    >>> store.embeddings.shape  # doctest: +SKIP
    (1200, 512)
    """
    listing = listed(images)
    devices = device_names(tuple(devices)) if devices else ()
    if isinstance(backbone, str):
        backbone = Backbone.load(backbone, device=devices[0] if devices else "auto")
    _require_kind(backbone, devices)
    _require_sendable(listing, devices)
    log_differences(backbone.spec, backbone.recipe)
    names = tuple(checked_layers(backbone, layers))
    specs = {layer: backbone.layer_spec(layer) for layer in names}
    information = _information(listing, backbone) | _lineage(parent)
    run = Run(output, backbone.spec, layers=specs, information=information, overwrite=overwrite, repair=repair)
    settling = _Settling(run, listing, backbone, names, engine, batch_size, workers, threads, devices)
    if report is not None:
        open(report, "a", encoding="utf-8").close()  # Rather now than after hours.
    cpu_seconds = _cpu_seconds()
    with run:
        settling.remember_earlier()
        update = run.prepare(
            inventory_of(listing),
            lambda numbers: _hashes(listing.files, numbers, workers),
            part_size=lambda count: part_size or settling.part_size(count),
            batch_size=batch_size or backbone.batch_size,
            checksum=checksum,
            retry_failed=retry_failed,
        )
        _warn_about_dropped(run, update)
        try:
            job = settling.job(update.waiting, update.plan.batch_size)
            work = compute_on_devices if devices else compute_parts
            end, first = compute(run, update, listing, job, progress, max_failures, work)
            if end.failed == end.total:
                run.abandon()
                raise ImageError(
                    _absolute(listing.root),
                    f"none of its {counted(end.failed, 'image')} could be read; the first: {first}",
                    "damaged" if first is None else first.kind,
                )
            run.finalise(update)
        except (OSError, KeyboardInterrupt):
            found = Store.status(run.path)
            log.warning(
                "%s of %s images are safe in %s: the same command goes on from there",
                f"{found.committed:,}", f"{found.planned:,}", run.folder,
            )  # fmt: skip
            raise
    if report is not None:
        write_report(report, end, job, settling.choice, _cpu_seconds() - cpu_seconds)
    return Store.open(output)


def listed(images: Any) -> Listing:
    """Return the listing of what `extract` takes."""
    if isinstance(images, Listing):
        return admitted(images)
    return admitted(list_images(images) if isinstance(images, str | os.PathLike) else list_memory(images))


class _Settling:
    """Settles how the images of a run are computed: once, and only when there are any."""

    def __init__(
        self, run: Run, listing: Listing, backbone: Backbone, layers: tuple[str, ...], engine: str,
        batch_size: int | None, workers: int | None, threads: int | None, devices: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.run, self.listing, self.backbone, self.layers, self.engine = run, listing, backbone, layers, engine
        self.batch_size = batch_size or backbone.batch_size
        self.devices, self.processes = devices, max(1, len(devices))
        self.workers = max(1, (workers or usable_processors()) // self.processes)
        self.threads = threads or 1
        self.choice: Choice | None = None
        self._seconds = 0.0
        self._engine, self._rows = "auto", 0

    def job(self, count: int, batch_size: int) -> Job | None:
        """Return how to compute this many images."""
        if count == 0:
            return None
        if self.choice is None:
            self.batch_size = batch_size  # That of the run that is resumed.
            self._choose(count)
        assert self.choice is not None
        job = Job(self.backbone, self.layers, self.choice.engine, self.workers, self.threads, self.devices)
        log.info("%s", engine_line(self.choice, job))
        return job

    def part_size(self, count: int) -> int:
        """Return how many images take about two seconds; a kill costs no more than that."""
        if count <= 4 * self.batch_size:
            return self.batch_size
        self._choose(count)
        assert self.choice is not None
        # Decoding and the forward pass of one image in one worker.
        seconds = max(1e-6, self._seconds + self.choice.trial.seconds / self.batch_size)
        width = 4 * (self.backbone.dim + sum(self.backbone.layer_spec(layer).dim for layer in self.layers))
        rows = min(int(SECONDS_A_PART * self.workers / seconds), MAX_PART_ROWS, MAX_PART_BYTES // width)
        return max(self.batch_size, rows)

    def remember_earlier(self) -> None:
        """Carry on the engine of a store that is updated: its rows stay, whatever else is computed; and its parent."""
        information, self._rows = self.run.earlier
        if "parent" in information and "parent" not in self.run.header.information:
            self.run.remember({"parent": information["parent"]})
        self._engine = str(information.get("engine", "auto"))
        if str(information.get("device", "")).partition(":")[0] != self.backbone.device.type:
            self._engine = "auto"
        elif self._engine != "auto":
            self.run.remember({"engine": self._engine})

    def _choose(self, count: int) -> None:
        # The engine of before, unless what it computed is little beside what is to come.
        wanted = self._engine if self.engine == "auto" and count <= self._rows else self.engine
        short = count <= 4 * self.batch_size and self.backbone.spec.precision == "float32"
        crops = [] if short and wanted in ("auto", "eager") else self._sample()
        try:
            self.choice = self._chosen(crops, count, wanted)
        except BackboneError as error:
            if wanted == self.engine:
                raise
            log.warning("%s; the rows of this store agree to rounding only", error)
            self.choice = self._chosen(crops, count, "auto")
        self.run.remember({"engine": self.choice.engine.name})

    def _chosen(self, crops: list[npt.NDArray[np.uint8]], count: int, engine: str) -> Choice:
        return self.backbone.choose_engine(
            crops, count // self.processes, layers=self.layers, engine=engine, batch_size=self.batch_size,
            workers=self.workers, threads=self.threads,
        )  # fmt: skip

    def _sample(self) -> list[npt.NDArray[np.uint8]]:
        """Return some crops from all over the listing, and keep what reading one takes."""
        started = time.perf_counter()
        crops = sample_crops(self.listing.files, self.backbone)
        self._seconds = (time.perf_counter() - started) / len(crops)
        return crops


def _warn_about_dropped(run: Run, update: Update) -> None:
    dropped, rows = update.changes.deleted, 0 if run.base is None else len(run.base)
    if 2 * dropped > rows:
        log.warning(
            "%s of the store's %s rows are dropped: their images are not among these", f"{dropped:,}", f"{rows:,}"
        )


def _require_sendable(listing: Listing, devices: Sequence[str]) -> None:
    """Find out before anything is started that the images of a listing cannot go to other processes."""
    if devices and len(listing.files):
        try:
            pickle.dumps(listing.files[0])
        except Exception as error:
            raise BackboneError(f"the images of {listing.root} cannot be sent to several devices: {error}") from error


def _require_kind(backbone: Backbone, devices: Sequence[str]) -> None:
    if devices and devices[0].partition(":")[0] != backbone.device.type:
        raise BackboneError(
            f"this backbone is on {backbone.device}, and the devices are {', '.join(devices)}; load it on the first"
        )


def _cpu_seconds() -> float:
    """Return the processor time of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])


def inventory_of(listing: Listing) -> Inventory:
    """Return what a store of a listing should hold."""
    numbers = (number for file in listing.files for number in file.status())
    status = np.fromiter(numbers, dtype=np.int64, count=2 * len(listing.files)).reshape(-1, 2)
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


def _hashes(files: Sequence[Entry], numbers: list[int], workers: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield the SHA-256 of some files, without those that cannot be read."""

    def sha256(number: int) -> bytes | None:
        try:
            return content_sha256(read_entry(files[number]))
        except ImageError:
            return None

    if numbers:
        log.info("comparing the content of %s", counted(len(numbers), "image"))
    with ThreadPoolExecutor(workers or 2, thread_name_prefix="embedkit-hash") as pool:
        for batch in in_batches(numbers, 1024):  # The pool would otherwise queue millions of tasks.
            for number, found in zip(batch, pool.map(sha256, batch), strict=True):
                if found is not None:
                    yield number, found


def checked_layers(backbone: Backbone, layers: Iterable[str]) -> list[str]:
    """Return the whole names of layers, which must be ones that can be extracted together."""
    if isinstance(layers, str):
        raise BackboneError(f"layers are several names, got {layers!r}")
    names = [backbone.whole_name(layer) for layer in layers]
    if len(names) > MAX_LAYERS or len({backbone.spec.pool, *names}) <= len(names):
        raise BackboneError(
            f"layers are at most {MAX_LAYERS} different ones, and others than the pooling {backbone.spec.pool}; got "
            f"{', '.join(names)}"
        )
    for name in names:
        if not is_layer_name(name):
            raise BackboneError(f"{name!r} is not the name of a layer: 1 to 64 printable bytes, without a slash")
    return names


def _information(listing: Listing, backbone: Backbone) -> dict[str, Any]:
    """Return what explains a run without deciding its numbers."""
    return {
        "root": _absolute(listing.root),
        **_places(listing),
        "recipe": backbone.recipe,
        "device": str(backbone.device),
        "host": platform.node(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


def _lineage(parent: Store | None) -> dict[str, Any]:
    """Return which store this one descends from."""
    if parent is None:
        return {}
    return {"parent": {"path": os.fspath(parent.path), "content_id": parent.content_id, "digest": parent.digest}}


def _places(listing: Listing) -> dict[str, Any]:
    """Return where images are found again, when it is not below the root by their ids."""
    if listing.has_paths:
        return {}
    return {"sources": {name: _absolute(root) for name, root in listing.sources.items()}}


def _absolute(root: str | os.PathLike[str]) -> str:
    """Return a path as the next run may find it, and the name of anything else as it is."""
    return os.path.abspath(root) if isinstance(root, os.PathLike) else root


_PACKAGES = ("embedkit", "timm", "torch", "torchvision", "pillow", "simplejpeg", "openvino", "numpy", "h5py")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
