"""The parts of a plan, computed one after the other and written while the next one is on its way."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from embedkit.backbones import Backbone, Batch, Engine, Seconds, Steps, in_batches, stream
from embedkit.errors import EmbedkitError, ImageError
from embedkit.extraction.progress import Progress, Timing
from embedkit.images import Data
from embedkit.sources import Entry, Listing, content_sha256
from embedkit.store import Failures, Images, PartWriter, Rows, Run, Update
from embedkit.store.tables import lookup

_SAMPLE = 16

log = logging.getLogger("embedkit")


@dataclass(frozen=True)
class Job:
    """How the images of a run are computed.

    Attributes
    ----------
    backbone : Backbone
    layers : tuple of str
    engine : Engine
        Chosen for these layers.
    workers, threads : int
        Worker threads of each process, and threads of each one's forward pass.
    devices : tuple of str
        Where there is a process for each; empty when this process computes.
    """

    backbone: Backbone
    layers: tuple[str, ...]
    engine: Engine
    workers: int
    threads: int
    devices: tuple[str, ...] = ()


@dataclass
class _Reading:
    """One image on its way through the pipeline, with what was seen of its file when it was read."""

    entry: Entry
    size: int = 0
    mtime_ns: int = 0
    sha256: bytes = bytes(32)


_Computed = Batch[_Reading, dict[str, npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class News:
    """What has happened since the last one.

    Attributes
    ----------
    part : int
        Whose images were computed.
    images : int
        How many there were; fewer than none when they were lost again.
    failures : tuple of ImageError
        Those of them that could not be read.
    seconds : Seconds
        What they took.
    written : tuple of int
        Parts that survive a power cut now.
    committed : int
        Images of these.
    commit_seconds : float
        What writing them took.
    forgotten : int
        Failures of images that were lost again.
    """

    part: int = -1
    images: int = 0
    failures: tuple[ImageError, ...] = ()
    seconds: Seconds = field(default_factory=Seconds)
    written: tuple[int, ...] = ()
    committed: int = 0
    commit_seconds: float = 0.0
    forgotten: int = 0


# A part of the plan: its number, and its images in their order.
NumberedPart: TypeAlias = tuple[int, Sequence[Entry]]
Work: TypeAlias = Callable[[Iterator[NumberedPart], Job, PartWriter], Generator[News, None, None]]


def compute(
    run: Run,
    update: Update,
    listing: Listing,
    job: Job | None,
    progress: Callable[[Progress], None] | None,
    max_failures: int | float | None,
    work: Work,
) -> tuple[Progress, ImageError | None]:
    """Compute the parts that are to do and return how it ended, and one failure if there was any.

    `work` is `compute_parts`, or what lets other processes do the same.
    """

    def parts() -> Iterator[NumberedPart]:
        for number in update.todo:
            rows = lookup(update.inventory.ids, update.plan.part(number)).tolist()
            yield number, [listing.files[row] for row in rows]

    tally = _Tally(len(listing.files) + len(listing.failures), update, job, progress, max_failures)
    tally.fail([*listing.failures, *update.failures])
    state = tally.report()
    if job is None:
        return state, tally.first
    with closing(work(parts(), job, run.writer)) as all_news:  # Whatever happens here, the workers end.
        for news in all_news:
            tally.add(news)
            if news.images:
                tally.report()
    return tally.report(), tally.first


class _Tally:
    """Counts what becomes of the images of a run, and ends it when too many fail."""

    def __init__(
        self, total: int, update: Update, job: Job | None, progress: Callable[[Progress], None] | None,
        max_failures: int | float | None,
    ) -> None:  # fmt: skip
        self.total, self.changes, self.progress = total, update.changes, progress
        self.done = self.kept = self.committed = total - update.waiting
        self.failed = 0
        self.first: ImageError | None = None
        self.allowed = total if max_failures is None else max_failures
        if isinstance(self.allowed, float) and self.allowed < 1:
            self.allowed *= total
        accelerated = job is not None and job.backbone.device.type != "cpu"
        self.timing = Timing(job.workers if job else 1, accelerated, max(1, len(job.devices)) if job else 1)

    def add(self, news: News) -> None:
        """Count what has happened."""
        self.done += news.images
        self.committed += news.committed
        self.timing.commit += news.commit_seconds
        if news.images:
            self.timing.add(news.seconds, news.images)
        self.failed -= news.forgotten
        self.fail(news.failures)

    def fail(self, errors: Sequence[ImageError]) -> None:
        """Count failures."""
        before, self.failed = self.failed, self.failed + len(errors)
        self.first = self.first or next(iter(errors), None)
        if errors and self.failed > self.allowed:
            crossing = max(0, int(self.allowed) - before)
            one = errors[crossing]
            raise ImageError(
                one.id,
                f"{one.reason}; with it {before + crossing + 1:,} of {self.total:,} images have failed, and "
                f"{int(self.allowed):,} may; the same command goes on from there when it is mended, or more may fail",
                one.kind,
            )

    def report(self) -> Progress:
        """Tell whoever listens how far the run is."""
        state = Progress(
            self.done, self.total, self.failed, self.kept, self.committed, self.changes, self.timing.measured()
        )
        if self.progress is not None:
            self.progress(state)
        return state


def compute_parts(parts: Iterator[NumberedPart], job: Job, write: PartWriter) -> Generator[News, None, None]:
    """Compute parts in their order, and write each while the next one is on its way."""
    with ThreadPoolExecutor(1, thread_name_prefix="embedkit-commit") as writer:
        commits: deque[tuple[Future[float], int, int]] = deque()
        rows: list[_Computed] = []
        with closing(_batches(parts, job)) as batches:
            for number, ends, batch in batches:
                rows.append(batch)
                if ends:
                    count = sum(len(batch.items) + len(batch.failures) for batch in rows)
                    commits.append((writer.submit(_commit, write, number, rows), number, count))
                    rows = []
                failures = tuple(error for _, error in batch.failures)
                yield News(number, len(batch.items) + len(failures), failures, batch.seconds, *_settled(commits, 2))
        yield News(-1, 0, (), Seconds(), *_settled(commits, 0))


def _commit(write: PartWriter, number: int, rows: Sequence[_Computed]) -> float:
    started = time.perf_counter()
    write(number, _rows(rows))
    return time.perf_counter() - started


def _settled(commits: deque[tuple[Future[float], int, int]], most: int) -> tuple[tuple[int, ...], int, float]:
    """Take away the commits that are done, and wait until no more than `most` are left: parts, images, seconds."""
    written, committed, seconds = [], 0, 0.0
    while commits and (commits[0][0].done() or len(commits) > most):
        commit, number, count = commits.popleft()
        seconds += commit.result()
        written.append(number)
        committed += count
    return tuple(written), committed, seconds


def _batches(parts: Iterator[NumberedPart], job: Job) -> Generator[tuple[int, bool, _Computed], None, None]:
    """Yield part, whether the part ends, and what became of the batch; the pipeline flows across the parts."""

    def read(reading: _Reading) -> Data:
        # Looked at before it is read: when somebody writes to it meanwhile, the next run sees another time.
        reading.size, reading.mtime_ns = reading.entry.status()
        data = read_entry(reading.entry)
        reading.sha256 = content_sha256(data)
        return data

    def planned() -> Iterator[tuple[int, bool, list[_Reading]]]:
        for number, entries in parts:
            for batch in in_batches(entries, job.engine.batch_size):
                yield number, batch[-1] is entries[-1], [_Reading(entry) for entry in batch]

    plan, copy = itertools.tee(planned())
    steps = Steps(
        read, lambda data, reading: job.backbone.pixels(data, id=reading.entry.id),
        lambda crops: job.backbone.run(job.engine, crops, job.layers),
    )  # fmt: skip
    batches = stream(
        (batch for _, _, batch in copy), steps, workers=job.workers, threads=job.threads,
        accelerator=job.backbone.device.type != "cpu",
    )  # fmt: skip
    with closing(batches):
        for (number, ends, _), batch in zip(plan, batches, strict=True):
            yield number, ends, batch


def read_entry(entry: Entry) -> Data:
    """Read an entry; whatever goes wrong there costs this image only.

    Raises
    ------
    ImageError
        Of the kind "unreadable", which the next run tries again, for what no source should raise.
    """
    try:
        return entry.read()
    except EmbedkitError:
        raise
    except Exception as error:
        log.debug("reading %s", entry.id, exc_info=True)
        text = " ".join(str(error).split())
        raise ImageError(entry.id, f"{type(error).__name__} while it was read: {text}", "unreadable") from error


def sample_crops(files: Sequence[Entry], backbone: Backbone) -> list[npt.NDArray[np.uint8]]:
    """Return some crops from all over a listing, at least one."""
    crops: list[npt.NDArray[np.uint8]] = []
    for number in np.linspace(0, len(files) - 1, min(4 * _SAMPLE, len(files))).astype(int).tolist():
        try:
            crops.append(backbone.pixels(read_entry(files[number]), id=files[number].id))
        except ImageError:
            continue  # Its reason is found, and kept, when its turn comes.
        if len(crops) == _SAMPLE:
            break
    # Noise will do where no image can be read.
    return crops or backbone.noise(_SAMPLE)


def _rows(batches: Sequence[Batch[_Reading, dict[str, npt.NDArray[np.float32]]]]) -> Rows:
    good = [reading for batch in batches for reading in batch.items]
    bad = [failure for batch in batches for failure in batch.failures]
    images = Images.of(
        [reading.entry.id for reading in good], [reading.size for reading in good],
        [reading.mtime_ns for reading in good], [reading.sha256 for reading in good],
    )  # fmt: skip
    failures = Failures.of(
        [ImageError(reading.entry.id, error.reason, error.kind) for reading, error in bad],
        [reading.size for reading, _ in bad], [reading.mtime_ns for reading, _ in bad],
    )  # fmt: skip
    names = batches[0].embeddings
    return Rows(
        images, failures, {name: np.concatenate([batch.embeddings[name] for batch in batches]) for name in names}
    )
