"""In which order an epoch sees its images, and in which batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace

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


def class_batches(
    codes: Rows,
    batch_size: int,
    *,
    images_a_class: int = 4,
    balance: bool = False,
    processes: int = 1,
    seed: int = 0,
    epoch: int = 1,
) -> list[Rows]:
    """Return the rows of each step of an epoch, in which every class that comes has several and meets another.

    A loss that compares pictures learns nothing from a class that is in its batch once, and nothing from a batch of
    one class. So rows come in groups of a class, each class's groups are spread evenly over the epoch, and where rare
    classes have too few to be company for a frequent one, some of them come again. Within a step two rows of a class
    follow two of another, so that its parts have company too: the shares of processes, and what memory holds at once.

    Parameters
    ----------
    codes : array of shape (n,)
        Class code of every row.
    batch_size : int
        Rows that each process has in a step, at most: as many groups as fit, and at least two.
    images_a_class : int, default 4
        Rows of a group, at most.
    balance : bool, default False
        Whether all classes have equally many groups in an epoch: those of rare classes come several times, and of
        frequent classes only some come. Otherwise every row comes once at least.
    processes : int, default 1
        How many there are to share a step.
    seed, epoch : int
        Draw it; nothing else does.

    Returns
    -------
    list of arrays of shape (b,)
        int64; as many in every epoch.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit.finetuning.feeding.ordering import class_batches
    >>> codes = np.repeat([0, 1], [24, 4])
    >>> [np.bincount(codes[rows]).tolist() for rows in class_batches(codes, 16)]
    [[12, 4], [12, 4]]
    """
    if not len(codes):
        return []
    random = np.random.default_rng([seed, epoch])
    order = np.argsort(codes, kind="stable")
    classes = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    groups = [np.array_split(random.permutation(rows), -(-len(rows) // images_a_class)) for rows in classes]
    counts = np.array([len(each) for each in groups], dtype=np.int64)
    if balance:
        counts[:] = max(1, round(counts.sum() / len(counts)))
    counts, steps = _with_company(counts, max(2, batch_size // images_a_class), processes, random)
    batches: list[list[Rows]] = [[] for _ in range(steps)]
    for found, places in zip(groups, _dealt(counts, steps, random), strict=True):
        # One after the other: no row is twice in a step that its class has enough rows for.
        taken = np.flatnonzero(np.diff(places, prepend=-1)).tolist()
        for start, stop in zip(taken, [*taken[1:], len(places)], strict=True):
            rows = [found[turn % len(found)] for turn in range(start, stop)]
            batches[places[start]].append(np.concatenate(rows))
    return [_interleaved(parts, random) for parts in batches]


def _with_company(counts: Rows, together: int, processes: int, random: np.random.Generator) -> tuple[Rows, int]:
    """Return how many groups each class has in an epoch, and in how many steps.

    In every step there is, for each process, a group that is not of the most frequent class, and two groups in all.
    """
    counts, most = counts.copy(), int(counts.argmax())
    steps = -(-int(counts.sum()) // (together * processes))
    if len(counts) == 1:
        return counts, steps
    steps = max(steps, -(-int(counts[most]) // ((together - 1) * processes)))
    others = [place for place in range(len(counts)) if place != most]
    _repeat_rarest(counts, others, steps * processes - int(counts[others].sum()), random)
    _repeat_rarest(counts, range(len(counts)), 2 * steps * processes - int(counts.sum()), random)
    return counts, steps


def _repeat_rarest(counts: Rows, places: Sequence[int], more: int, random: np.random.Generator) -> None:
    """Have so many groups more, each of a class that has the fewest then."""
    draw = random.permutation(len(places)).tolist()  # Which of those that have equally few.
    queue = [(int(counts[place]), turn, place) for turn, place in zip(draw, places, strict=True)]
    heapify(queue)
    for _ in range(more):
        count, turn, place = queue[0]
        heapreplace(queue, (count + 1, turn, place))
        counts[place] += 1


def _dealt(counts: Rows, steps: int, random: np.random.Generator) -> list[Rows]:
    """Return, for each class, the sorted steps that its groups come in.

    Neither does one step have two groups more than another, nor two more of one class. The most frequent class comes
    last, so that the others' groups, where they are as many as steps, are in all of them.
    """
    dealt, queue = [np.empty(0, dtype=np.int64)] * len(counts), np.empty(0, dtype=np.int64)
    order = random.permutation(len(counts))
    for place in order[np.argsort(counts[order] == counts.max(), kind="stable")].tolist():
        laps, rest = divmod(int(counts[place]), steps)
        found, queue = queue[:rest], queue[rest:]
        if len(found) < rest:
            fresh = random.permutation(steps)
            had = np.isin(fresh, found)
            fresh, missing = np.concatenate([fresh[~had], fresh[had]]), rest - len(found)
            found, queue = np.concatenate([found, fresh[:missing]]), fresh[missing:]
        dealt[place] = np.sort(np.concatenate([np.repeat(np.arange(steps), laps), found]))
    return dealt


def _interleaved(parts: Sequence[Rows], random: np.random.Generator) -> Rows:
    """Return the rows of several classes two by two, those of each evenly among all."""
    pairs = [np.split(parts[place], range(2, len(parts[place]), 2)) for place in random.permutation(len(parts))]
    shares = np.array([len(each) for each in pairs])
    waiting, found = np.zeros_like(shares), []
    for _ in range(int(shares.sum())):
        waiting += shares
        place = int(waiting.argmax())
        waiting[place] -= shares.sum()
        found.append(pairs[place].pop(0))
    return np.concatenate(found)
