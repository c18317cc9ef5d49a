"""In which order an epoch sees its images, and in which batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def epoch_order(codes: Rows, random: np.random.Generator, *, balance: bool = False) -> Rows:
    """Return the rows of an epoch in the order in which they are seen.

    Parameters
    ----------
    codes : array of shape (n,)
        int64.
    random : numpy Generator
        What the order is drawn from.
    balance : bool, default False
        Whether every class is seen as often as any other: rows of rare classes come several times, none of them twice
        before all of its class have come once, and of frequent classes only some come.

    Returns
    -------
    array of shape (n,)
        int64.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.finetuning.feeding.ordering import epoch_order
    >>> codes = np.array([0, 0, 0, 0, 0, 1])
    >>> order = epoch_order(codes, np.random.default_rng(0), balance=True)
    >>> np.bincount(codes[order])
    array([3, 3])
    """
    if not balance:
        return random.permutation(len(codes))
    classes = random.permutation(np.unique(codes))  # Who gets one more, where they cannot all get as many.
    chosen = []
    for number, code in enumerate(classes):
        slots = len(codes) // len(classes) + (number < len(codes) % len(classes))
        rows = np.flatnonzero(codes == code)
        rounds = [random.permutation(rows) for _ in range(-(-slots // len(rows)))]
        chosen.append(np.concatenate(rounds)[:slots] if rounds else rows[:0])
    return random.permutation(np.concatenate(chosen))


def count_steps(count: int, batch_size: int, world: int = 1) -> int:
    """Return how many steps an epoch of so many images has, in `world` processes with batches of their own."""
    return -(-count // (batch_size * world))


def in_steps(order: Rows, batch_size: int, world: int = 1) -> Iterator[Rows]:
    """Yield the rows of every step of an epoch, those of all processes together.

    Batches differ by one image at most: the last one is no remainder that would weigh as much as the others.
    """
    steps = count_steps(len(order), batch_size, world)
    for step in range(steps):
        yield order[step * len(order) // steps : (step + 1) * len(order) // steps]


def shard_of(rows: Rows, rank: int, world: int) -> Rows:
    """Return the part of some rows that falls to one of several processes."""
    return rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
