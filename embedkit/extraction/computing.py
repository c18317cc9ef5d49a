"""The parts of a plan, computed one after the other and written while the next one is on its way."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedkit.backbones import Backbone, Batch, Engine, Steps, stream
from embedkit.errors import ImageError
from embedkit.extraction.progress import Progress, Timing
from embedkit.images import Data
from embedkit.sources import Entry, Listing, content_sha256
from embedkit.store import Failures, Images, Rows, Run, Update
from embedkit.store.tables import lookup


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
        Worker threads, and threads of each one's forward pass.
    """

    backbone: Backbone
    layers: tuple[str, ...]
    engine: Engine
    workers: int
    threads: int


@dataclass
class _Reading:
    """One image on its way through the pipeline, with what was seen of its file when it was read."""

    entry: Entry
    size: int = 0
    mtime_ns: int = 0
    sha256: bytes = bytes(32)


_Computed = Batch[_Reading, dict[str, npt.NDArray[np.float32]]]


def compute(
    run: Run,
    update: Update,
    listing: Listing,
    job: Job | None,
    progress: Callable[[Progress], None] | None,
    max_failures: int | float | None,
) -> tuple[Progress, ImageError | None]:
    """Compute the parts that are to do, in their order, and return how it ended, and one failure if there was any."""
    tally = _Tally(len(listing.files) + len(listing.failures), update, job, progress, max_failures)
    tally.fail([*listing.failures, *update.failures])
    state = tally.report()
    if job is None:
        return state, tally.first
    with ThreadPoolExecutor(1, thread_name_prefix="embedkit-commit") as writer:
        commits: deque[tuple[Future[float], int]] = deque()
        rows: list[_Computed] = []
        with closing(_batches(update, listing, job)) as batches:  # Whatever happens here, the workers end.
            for number, ends, batch in batches:
                rows.append(batch)
                tally.add(batch)
                if ends:
                    count = sum(len(batch.items) + len(batch.failures) for batch in rows)
                    commits.append((writer.submit(_commit, run, number, rows), count))
                    rows = []
                while commits and (commits[0][0].done() or len(commits) > 2):
                    tally.commit(*commits.popleft())
                tally.fail([error for _, error in batch.failures])
                tally.report()
        for commit, count in commits:
            tally.commit(commit, count)
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
        self.timing = Timing(job.workers if job else 1, job is not None and job.backbone.device.type != "cpu")

    def add(self, batch: _Computed) -> None:
        """Count a batch, before its failures."""
        count = len(batch.items) + len(batch.failures)
        self.done += count
        self.timing.add(batch.seconds, count)

    def commit(self, commit: Future[float], images: int) -> None:
        """Count what is written durably."""
        self.timing.commit += commit.result()
        self.committed += images

    def fail(self, errors: Sequence[ImageError]) -> None:
        """Count failures."""
        self.failed += len(errors)
        self.first = self.first or next(iter(errors), None)
        if self.failed > self.allowed:
            last = errors[-1]
            raise ImageError(
                last.id,
                f"{last.reason}; with it {self.failed:,} of {self.total:,} images have failed, and "
                f"{int(self.allowed):,} may; what is computed is kept",
                last.kind,
            )

    def report(self) -> Progress:
        """Tell whoever listens how far the run is."""
        state = Progress(
            self.done, self.total, self.failed, self.kept, self.committed, self.changes, self.timing.measured()
        )
        if self.progress is not None:
            self.progress(state)
        return state


def _commit(run: Run, number: int, rows: Sequence[_Computed]) -> float:
    started = time.perf_counter()
    run.write(number, _rows(rows))
    return time.perf_counter() - started


def _batches(update: Update, listing: Listing, job: Job) -> Generator[tuple[int, bool, _Computed], None, None]:
    """Yield part, whether the part ends, and what became of the batch; the pipeline flows across the parts."""

    def read(reading: _Reading) -> Data:
        # Looked at before it is read: when somebody writes to it meanwhile, the next run sees another time.
        reading.size, reading.mtime_ns = reading.entry.status()
        data = reading.entry.read()
        reading.sha256 = content_sha256(data)
        return data

    def planned() -> Iterator[tuple[int, bool, list[_Reading]]]:
        for number in update.todo:
            rows = lookup(update.inventory.ids, update.plan.part(number)).tolist()
            for start in range(0, len(rows), update.plan.batch_size):
                batch = rows[start : start + update.plan.batch_size]
                yield number, start + len(batch) == len(rows), [_Reading(listing.files[row]) for row in batch]

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
