"""Devices that heads may be fitted on, and the threads that they get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from embedkit.errors import EvaluationError

ALONE = 2e8  # Multiplications, of a few milliseconds, that one thread does best by itself.


def require_device(device: str) -> None:
    """Raise unless torch can compute on a device.

    Raises
    ------
    EvaluationError
        When there is no such device; only a caller may choose another.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvaluationError(f"heads cannot be fitted on the device {device!r}: {reason}; the CPU is 'cpu'") from error


@contextmanager
def threads_for(multiplications: float) -> Iterator[None]:
    """Let torch use one thread for products that are small, all that it has for others.

    Where other programs keep the processors busy, threads spin for one another longer than a small product takes:
    two of them were seen to need ten times as long as one.
    """
    import torch

    threads = torch.get_num_threads()
    if multiplications > ALONE or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
