"""Choosing an index by measurement: on rows of the store that it does not hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from embedkit.errors import EvaluationError
from embedkit.index.coarse import Coarse, effort_limit, effort_name, expected_bytes, extend, is_lossless, train
from embedkit.index.exact import Gallery, Rows, Vectors
from embedkit.index.families import EFFORTS, EXACT, REFINEMENTS, list_factories
from embedkit.index.searching import found_rows

K = 10
RECALL = 0.99
QUERIES = 2000
SCREENED = 20_000  # Rows on which all families are tried before the best of them are built in full.
PRODUCTS = 4e12  # Multiplications of the exact search that measures: half a minute of two cores.
SINGLES = 50
ROUNDS = 3
FEWEST = 20  # Rows, of which two can be held out.
FINALISTS = 3
FEW = 1000  # Rows that are compared before any index has begun.

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measurement:
    """What a way to search was measured to do, on held-out rows of the store.

    Attributes
    ----------
    factory : str
        FAISS's name of it; "Flat" is the exact search.
    effort : int or None
        ``nprobe`` of an inverted file, ``efSearch`` of a graph.
    refine : int
        How many candidates are compared exactly, as a multiple of k.
    ann_recall : float
        Share of the exact ten neighbours that it found, by score, so that ties count.
    queries_per_second : float
        Of a batch.
    seconds : float
        Of a single query, the median.
    bytes_per_row, build_seconds : float
        What the index takes beside the store, and how long it took to build.
    rows, queries : int
        How many rows it held, and how many queries it was measured with.
    """

    factory: str
    effort: int | None
    refine: int
    ann_recall: float
    queries_per_second: float
    seconds: float
    bytes_per_row: float
    build_seconds: float
    rows: int
    queries: int


@dataclass(frozen=True)
class Wish:
    """What an index has to keep to: a recall, and at most so many bytes and seconds a query."""

    recall: float | None = None
    max_memory: int | None = None
    max_latency: float | None = None


@dataclass(frozen=True, eq=False)
class _Exam:
    """Queries that an index does not hold, and the score of each one's tenth neighbour."""

    placed: Vectors
    least: npt.NDArray[np.float32]

    def part(self, which: slice) -> _Exam:
        return _Exam(self.placed[which], self.least[which])


def choose(
    gallery: Gallery, factory: str | None, wish: Wish, *, seed: int, say: Say
) -> tuple[Coarse | None, Measurement | None, list[Measurement]]:
    """Build the fastest index that keeps to a wish.

    A part of the rows is held out as queries, and an index never holds those that it is measured with. Its settings are
    chosen on one half of them, with a margin: the recall less 1.64 standard errors has to reach the wish. What is
    reported comes from the other half, and if that falls short, the settings are raised. The held-out rows are added in
    the end. A large gallery tries all families on a sample of its rows, and builds the fastest graph and the fastest of
    the others in full.

    Parameters
    ----------
    gallery : Gallery
        What to search in.
    factory : str, optional
        A FAISS factory string, to build this one and no other.
    wish : Wish
        What it has to keep to. Without a recall, FAISS's own settings are kept for a factory that is named; for others
        it is 0.99, since an index that is small or quick and finds little is of no use.
    seed : int
        Draws the held-out rows and the sample.
    say : callable
        Called with a line of text at each step.

    Returns
    -------
    coarse : Coarse or None
        The index, of all rows; None when exact search is what keeps to the wish.
    chosen : Measurement or None
        What it was measured to do; None for a factory over so few rows that none can be held out.
    tried : list of Measurement
        Everything that was measured in full, the exact search first.

    Raises
    ------
    EvaluationError
        When nothing keeps to the wish, with what came nearest.
    """
    if factory is None and wish.recall is None:
        wish = replace(wish, recall=RECALL)
    if factory is None and len(gallery) < FEW:
        exact = _measured_exactly(gallery, np.arange(len(gallery)))
        if not _keeps(exact, wish, len(gallery)):
            raise EvaluationError(_unkept(gallery, wish, [exact]))
        return None, exact, [exact]
    if factory is not None and wish == Wish() and len(gallery) < FEWEST:
        say(f"{len(gallery):,} rows are too few to hold some out: {factory} is not measured")
        return _built(gallery, factory, np.arange(len(gallery)), seed, say)[0], None, []
    random = np.random.default_rng(seed)
    rows, exam_rows = _held_out(gallery, random)
    say(f"exact search of {len(exam_rows):,} held-out rows, to measure against")
    exam = _exam(gallery, rows, exam_rows)
    tried = [_measured_exactly(gallery, exam_rows)]
    factories = [factory] if factory is not None else _screened(gallery, rows, wish, random, seed, say)
    options: list[tuple[Coarse, Measurement]] = []
    for name in factories:
        try:
            built, seconds = _built(gallery, name, rows, seed, say)
        except ValueError as error:
            if factory is not None:
                raise
            say(f"{error}: left out")
            continue
        found = _tuned(built, gallery, exam, seconds, wish)
        say(describe(found))
        tried.append(found)
        options.append((built, found))
    keeping = [one for one in options if _keeps(one[1], wish, len(gallery))]
    if factory is None and _keeps(tried[0], wish, len(gallery)):
        keeping = [one for one in keeping if one[1].queries_per_second > tried[0].queries_per_second]
        if not keeping:
            return None, tried[0], tried
    if not keeping:
        raise EvaluationError(_unkept(gallery, wish, tried))
    coarse, chosen = max(keeping, key=lambda one: one[1].queries_per_second)
    return extend(coarse, gallery, exam_rows), chosen, tried


def _held_out(gallery: Gallery, random: np.random.Generator) -> tuple[Rows, Rows]:
    """Return the rows to index first, and those to search with."""
    n = len(gallery)
    count = int(min(QUERIES, n // 10, max(200, PRODUCTS / max(1, n * gallery.store.dim))))
    if n < FEWEST:
        raise EvaluationError(f"{gallery.store.path} has {n} rows: too few to measure an index on; search it exactly")
    exam = np.zeros(n, dtype=np.bool_)
    exam[random.choice(n, count, replace=False)] = True
    return np.flatnonzero(~exam), random.permutation(np.flatnonzero(exam))


def _exam(gallery: Gallery, rows: Rows, exam_rows: Rows) -> _Exam:
    keep = np.zeros(len(gallery), dtype=np.bool_)
    keep[rows] = True
    placed = gallery.placed(gallery.store.rows(exam_rows))
    scores, _ = gallery.search_placed(placed, min(K, len(rows)), keep=keep)
    return _Exam(placed, scores[:, -1])


def _measured_exactly(gallery: Gallery, exam_rows: Rows) -> Measurement:
    placed = gallery.placed(gallery.store.rows(exam_rows[: (len(exam_rows) + 1) // 2]))
    if not len(placed):
        return Measurement(EXACT, None, 1, 1.0, 0.0, 0.0, 0.0, 0.0, 0, 0)
    started = time.perf_counter()
    gallery.search_placed(placed, K)
    rate = len(placed) / (time.perf_counter() - started)
    seconds = _median_seconds(lambda query: gallery.search_placed(query, K), placed[:5])
    return Measurement(EXACT, None, 1, 1.0, rate, seconds, 0.0, 0.0, len(gallery), len(placed))


def _screened(gallery: Gallery, rows: Rows, wish: Wish, random: np.random.Generator, seed: int, say: Say) -> list[str]:
    """Return the factories to build in full: all for a small gallery, else those that did best on a part of it."""
    if len(rows) <= 2 * SCREENED:
        return list_factories(len(rows), gallery.store.dim, gallery.metric)
    sample = random.choice(rows, SCREENED + 500, replace=False)
    part, exam_rows = np.sort(sample[500:]), sample[:500]
    exam = _exam(gallery, part, exam_rows)
    scores: dict[str, float] = {}
    small, large = (list_factories(count, gallery.store.dim, gallery.metric) for count in (len(part), len(rows)))
    for name, full in zip(small, large, strict=True):
        built, seconds = _built(gallery, name, part, seed, lambda line: None)
        found = _tuned(built, gallery, exam, seconds, wish)
        within = wish.max_memory is None or found.bytes_per_row * len(gallery) <= wish.max_memory
        if found.ann_recall >= (wish.recall or 0) and within:
            scores[full] = found.queries_per_second
        say(f"on a sample of {len(part):,} rows: {describe(found)}{'' if full in scores else ': left out'}")
    # The best graph and the best of the others, since their time grows otherwise with the number of rows.
    best_first = sorted(scores, key=scores.__getitem__, reverse=True)
    kinds = {"HNSW" in name: name for name in reversed(best_first)}
    return [name for name in best_first if name in kinds.values()]


def _built(gallery: Gallery, factory: str, rows: Rows, seed: int, say: Say) -> tuple[Coarse, float]:
    size, most = (f"{count / 1e6:,.0f} MB" for count in expected_bytes(gallery, factory, len(rows)))
    say(f"building {factory} of {len(rows):,} rows: about {size} of memory, and {most} at most while it is built")
    started = time.perf_counter()
    built = extend(train(gallery, factory, rows, seed=seed), gallery, rows)
    return built, time.perf_counter() - started


def _tuned(coarse: Coarse, gallery: Gallery, exam: _Exam, build_seconds: float, wish: Wish) -> Measurement:
    """Return the fastest settings that reach the recall on one half of the exam, as measured on the other."""
    half = len(exam.least) // 2
    chosen, judged = exam.part(slice(half)), exam.part(slice(half, None))
    facts = (coarse.count_bytes() / max(1, len(coarse)), build_seconds, len(coarse))

    def measured(effort: int | None, refine: int) -> Measurement:
        rounds = [_recalls(coarse, gallery, judged, effort, refine) for _ in range(ROUNDS)]
        recalls, rate = rounds[0][0], max(one[1] for one in rounds)
        seconds = _median_seconds(lambda query: found_rows(coarse, gallery, query, K, effort, refine), judged.placed)
        return Measurement(
            coarse.factory, effort, refine, float(recalls.mean()), rate, seconds, *facts, len(judged.least)
        )

    if wish.recall is None:
        return measured(None, 1)
    efforts = _efforts(coarse)
    fastest_first = sorted(_sufficient(coarse, gallery, chosen, wish.recall), key=lambda one: -one[2])
    found = [measured(effort, refine) for effort, refine, _ in fastest_first[:FINALISTS]]
    enough = [one for one in found if one.ann_recall >= wish.recall]
    further = [(effort, refine) for effort, refine, _ in fastest_first[FINALISTS:]]
    # What is enough for one half may fall short of the other: then with more effort than any so far.
    most = max((one.effort or 0 for one in found), default=efforts[-1] or 0)
    further += [(effort, max(REFINEMENTS)) for effort in efforts if effort is not None and effort > most]
    for effort, refine in [] if enough else further:
        found.append(measured(effort, refine))
        if found[-1].ann_recall >= wish.recall:
            return found[-1]
    if not found:
        found = [measured(efforts[-1], max(REFINEMENTS))]
    quick = [one for one in enough if wish.max_latency is None or one.seconds <= wish.max_latency]
    if enough:
        return max(quick or enough, key=lambda one: one.queries_per_second)
    return max(found, key=lambda one: one.ann_recall)


def _efforts(coarse: Coarse) -> Sequence[int | None]:
    """Return the efforts that an index may take, rising; None alone where it knows none."""
    if effort_name(coarse.index) is None:
        return [None]
    limit = min(effort_limit(coarse.index), EFFORTS[-1])
    return [*(effort for effort in EFFORTS if effort < limit), limit]


def _sufficient(
    coarse: Coarse, gallery: Gallery, exam: _Exam, recall: float
) -> Iterator[tuple[int | None, int, float]]:
    """Yield settings that reach a recall with a margin, and their queries a second."""
    efforts = _efforts(coarse)
    fastest, at = 0.0, 0
    refinements = [1] if is_lossless(coarse.index) else sorted(REFINEMENTS)
    # Along the edge of what is enough: less comparing as long as it is, more effort as soon as it is not.
    while at < len(efforts) and refinements:
        recalls, rate = _recalls(coarse, gallery, exam, efforts[at], refinements[-1])
        margin = 1.64 * float(recalls.std()) / np.sqrt(len(recalls))
        if float(recalls.mean()) - margin >= recall:
            yield efforts[at], refinements.pop(), rate
            fastest = max(fastest, rate)
        elif rate < fastest / 2:
            return  # More effort is slower still.
        else:
            at += 1


def _recalls(
    coarse: Coarse, gallery: Gallery, exam: _Exam, effort: int | None, refine: int
) -> tuple[npt.NDArray[np.float64], float]:
    """Return the recall of each query, and queries a second."""
    started = time.perf_counter()
    scores, _ = found_rows(coarse, gallery, exam.placed, K, effort, refine)
    rate = len(scores) / (time.perf_counter() - started)
    least = exam.least[:, None]
    near = scores <= least if gallery.metric == "l2" else scores >= least
    return near.sum(axis=1) / min(K, len(coarse)), rate


def _median_seconds(search: Callable[[Vectors], object], placed: Vectors) -> float:
    seconds = []
    for query in placed[:SINGLES]:
        started = time.perf_counter()
        search(query[None])
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def _keeps(found: Measurement, wish: Wish, n: int) -> bool:
    return (
        (wish.recall is None or found.ann_recall >= wish.recall)
        and (wish.max_memory is None or found.bytes_per_row * n <= wish.max_memory)
        and (wish.max_latency is None or found.seconds <= wish.max_latency)
    )


def _unkept(gallery: Gallery, wish: Wish, tried: Sequence[Measurement]) -> str:
    wanted = [] if wish.recall is None else [f"a recall of {wish.recall:g}"]
    wanted += [] if wish.max_memory is None else [f"{wish.max_memory:,} bytes"]
    wanted += [] if wish.max_latency is None else [f"{1000 * wish.max_latency:g} ms a query"]
    lines = "".join(f"\n  {describe(found)}" for found in tried)
    return f"no index of {gallery.store.path} keeps to {' and '.join(wanted)}; measured:{lines}"


def describe(found: Measurement) -> str:
    """Return a measurement as one line."""
    effort = "" if found.effort is None else f" effort {found.effort}"
    return (
        f"{found.factory}{effort} refine {found.refine}: recall@{K} {found.ann_recall:.4f}, "
        f"{found.queries_per_second:,.0f} queries/s, {1000 * found.seconds:.2f} ms alone, "
        f"{found.bytes_per_row:,.0f} bytes a row, built in {found.build_seconds:.1f} s"
    )
