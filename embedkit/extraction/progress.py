"""How far an extraction is, and where its time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from embedkit.backbones import Seconds
from embedkit.store import Changes

_RECENT = 5.0  # Seconds that "now" means.


@dataclass(frozen=True)
class Measured:
    """Where the time of a run goes.

    Attributes
    ----------
    seconds : float
        Since the first image.
    images_per_second, images_per_second_now : float
        Overall, and over the last five seconds.
    read, decode, forward, wait : float
        Shares of the worker threads' time, in [0, 1], where `wait` is the rest. On a GPU, `forward` is the share of the
        time in which it was fed, beside the others.
    commit : float
        Share of the run's time in which a part was being written, beside all that.
    """

    seconds: float = 0.0
    images_per_second: float = 0.0
    images_per_second_now: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    forward: float = 0.0
    wait: float = 0.0
    commit: float = 0.0


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
    measured : Measured
        Where the time went so far.
    """

    done: int
    total: int
    failed: int
    kept: int
    committed: int
    changes: Changes
    measured: Measured = field(default_factory=Measured)


@dataclass
class Timing:
    """Adds up what the workers measure."""

    workers: int  # Of each process.
    accelerator: bool = False
    processes: int = 1
    started: float = field(default_factory=time.perf_counter)
    seconds: Seconds = field(default_factory=Seconds)
    commit: float = 0.0
    images: int = 0
    _recent: list[tuple[float, int]] = field(default_factory=list)

    def add(self, seconds: Seconds, images: int) -> None:
        """Add what one batch took."""
        self.seconds.add(seconds)
        self.images += images
        now = time.perf_counter()
        self._recent = [(when, count) for when, count in self._recent if now - when < _RECENT] + [(now, self.images)]

    def measured(self) -> Measured:
        """Return the shares so far."""
        elapsed = max(1e-9, time.perf_counter() - self.started)
        whole = elapsed * self.workers * self.processes
        spent = self.seconds
        # An accelerator is fed by two threads, so that one of them may wait for it.
        forward = min(1.0, spent.forward / (elapsed * self.processes)) if self.accelerator else spent.forward / whole
        busy = (spent.read + spent.decode) / whole + (0 if self.accelerator else forward)
        oldest, then = self._recent[0] if self._recent else (0.0, 0)
        lately = (self.images - then) / (self._recent[-1][0] - oldest) if len(self._recent) > 1 else 0.0
        return Measured(
            elapsed, self.images / elapsed, lately, spent.read / whole, spent.decode / whole, forward,
            max(0.0, 1 - busy), self.commit / elapsed / self.processes,
        )  # fmt: skip
