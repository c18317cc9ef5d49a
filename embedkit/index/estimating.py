"""How long it takes to compare everything with everything, said before it starts."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

import numpy as np

LONG_SECONDS = 10.0  # What is shorter needs no announcement.
SAMPLE = (512, 4096)

log = logging.getLogger("embedkit")


def announce(q: int, g: int, d: int, memory_bytes: int) -> None:
    """Log how long it takes to compare q rows with g of width d, and how much memory, where it is long.

    The time is that of a small product of matrices, measured here, times the work that there is.
    """
    if q * g * d < 1e10:
        return
    left, right = (np.ones((rows, d), dtype=np.float32) for rows in SAMPLE)
    left @ right.T  # The first product also starts the threads.
    started = time.perf_counter()
    left @ right.T
    seconds = (time.perf_counter() - started) * q * g / (SAMPLE[0] * SAMPLE[1])
    if seconds >= LONG_SECONDS:
        log.info(
            "comparing %s rows with %s: about %s, about %s MB of memory",
            f"{q:,}", f"{g:,}", timedelta(seconds=round(seconds)), f"{memory_bytes / 1e6:,.0f}",
        )  # fmt: skip
