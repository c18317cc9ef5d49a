"""What search_speed.py compares: each peer builds and searches in a process of its own, which this file runs.

A peer's process reads orders from its standard input and writes answers to its standard output, one JSON line each;
what libraries print goes to standard error. Of this file a peer's interpreter needs NumPy and the peer itself.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
K = 10
BREADTHS = (16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768)  # ef of graphs
PROBES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384)  # lists of inverted files
PRODUCT_BLOCK = 8192


@dataclass(frozen=True)
class Case:
    """What to build from: rows of length 1 as a NumPy file, the same embeddings as a store, and how."""

    vectors: str
    store: str
    threads: int
    recall: float = 0.99

    def load(self) -> Vectors:
        """Return the rows, mapped from their file."""
        return np.load(self.vectors, mmap_mode="r")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Engine:
    """What a peer has built.

    `search` returns rows of shape (q, k), `tune` sets the parameter that trades recall for speed, to one of `values`;
    None is what the peer chose by itself. `size` returns bytes as written to a folder.
    """

    search: Callable[[Vectors, int], Rows]
    size: Callable[[Path], int]
    parameter: str = ""
    values: tuple[int | None, ...] = (None,)
    tune: Callable[[int], None] | None = None
    note: str = ""


@dataclass(frozen=True)
class Peer:
    """A peer: its library, the module that it needs, how it is built, and how many queries it is asked (None: all)."""

    library: str
    module: str
    build: Callable[[Case], Engine]
    queries: int | None = None


def embedkit(exact: bool) -> Callable[[Case], Engine]:
    def build(case: Case) -> Engine:
        import faiss

        from embedkit import Index, Store

        faiss.omp_set_num_threads(case.threads)
        store = Store.open(case.store)
        index: Any = Index.build(store) if exact else Index.build(store, recall=case.recall)

        def size(folder: Path) -> int:
            if exact:
                return 0
            index.save(folder / "index")
            return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

        note = "searches the store itself"
        if (chosen := index.chosen) is not None:
            note = (
                f"{chosen.factory}, effort {chosen.effort}, refine {chosen.refine}; held out: {chosen.ann_recall:.4f}"
            )
        return Engine(lambda queries, k: index.search(queries, k).rows, size, note=note)

    return build


def faiss_engine(index: Any, parameter: str = "", values: tuple[int | None, ...] = (None,), note: str = "") -> Engine:
    import faiss

    def size(folder: Path) -> int:
        faiss.write_index(index, str(folder / "faiss"))
        return (folder / "faiss").stat().st_size

    def tune(value: int) -> None:
        faiss.ParameterSpace().set_index_parameter(index, parameter, value)

    return Engine(lambda queries, k: index.search(queries, k)[1], size, parameter, values, tune, note)


def faiss_factory(key: str, parameter: str = "", values: tuple[int | None, ...] = (None,)) -> Callable[[Case], Engine]:
    def build(case: Case) -> Engine:
        import faiss

        faiss.omp_set_num_threads(case.threads)
        vectors = case.load()
        count, dim = vectors.shape
        factory = key.format(lists=int(4 * count**0.5))
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        return faiss_engine(index, parameter, values, factory)

    return build


def hnswlib(links: int) -> Callable[[Case], Engine]:
    def build(case: Case) -> Engine:
        import hnswlib as library

        vectors = case.load()
        index = library.Index(space="ip", dim=vectors.shape[1])
        index.init_index(max_elements=len(vectors), M=links)
        index.set_num_threads(case.threads)
        index.add_items(vectors)

        def size(folder: Path) -> int:
            index.save_index(str(folder / "hnswlib"))
            return (folder / "hnswlib").stat().st_size

        return Engine(
            lambda queries, k: index.knn_query(queries, k)[0].astype(np.int64), size, "ef", BREADTHS, index.set_ef,
            f"ef_construction {index.ef_construction}",
        )  # fmt: skip

    return build


def usearch(dtype: str) -> Callable[[Case], Engine]:
    def build(case: Case) -> Engine:
        from usearch.index import Index

        vectors = case.load()
        index = Index(ndim=vectors.shape[1], metric="cos", dtype=dtype)
        index.add(np.arange(len(vectors)), vectors, threads=case.threads)

        def tune(value: int) -> None:
            index.expansion_search = value

        def search(queries: Vectors, k: int) -> Rows:
            keys: Any = index.search(queries, k, threads=case.threads).keys
            return keys.astype(np.int64).reshape(len(queries), -1)

        note = f"connectivity {index.connectivity}, {index.hardware_acceleration}"
        return Engine(search, lambda _: index.serialized_length, "expansion", BREADTHS, tune, note)

    return build


def scikit_learn(case: Case) -> Engine:
    from sklearn.neighbors import NearestNeighbors

    vectors = case.load()
    index = NearestNeighbors(algorithm="brute", metric="cosine", n_jobs=case.threads).fit(vectors)
    return Engine(
        lambda queries, k: index.kneighbors(queries, k, return_distance=False), lambda _: vectors.nbytes, note="brute"
    )


def autofaiss(share: float | None) -> Callable[[Case], Engine]:
    """Let autofaiss choose, with its defaults, or with memory for a share of the vectors, so that it quantises."""

    def build(case: Case) -> Engine:
        import faiss
        from autofaiss import build_index

        faiss.omp_set_num_threads(case.threads)
        vectors = case.load()
        limit = {} if share is None else {"max_index_memory_usage": f"{int(vectors.nbytes * share / 2**20)}M"}
        index, facts = build_index(
            str(Path(case.vectors).parent), save_on_disk=False, metric_type="ip", nb_cores=case.threads, **limit
        )
        faiss.omp_set_num_threads(case.threads)
        parameter = "efSearch" if "HNSW" in facts["index_key"] else "nprobe"
        values = BREADTHS if parameter == "efSearch" else PROBES
        return faiss_engine(index, parameter, (None, *values), f"{facts['index_key']}; {facts['index_param']}")

    return build


PEERS = {
    "embedkit exact": Peer("embedkit", "embedkit.index", embedkit(exact=True), 1000),
    "embedkit recall": Peer("embedkit", "embedkit.index", embedkit(exact=False)),
    "faiss flat": Peer("faiss", "faiss", faiss_factory("Flat"), 1000),
    "faiss IVF": Peer("faiss", "faiss", faiss_factory("IVF{lists},Flat", "nprobe", PROBES)),
    "faiss HNSW32": Peer("faiss", "faiss", faiss_factory("HNSW32", "efSearch", BREADTHS)),
    "hnswlib M=16": Peer("hnswlib", "hnswlib", hnswlib(16)),
    "hnswlib M=32": Peer("hnswlib", "hnswlib", hnswlib(32)),
    "usearch f32": Peer("usearch", "usearch.index", usearch("f32")),
    "usearch bf16": Peer("usearch", "usearch.index", usearch("bf16")),
    "usearch i8": Peer("usearch", "usearch.index", usearch("i8")),
    "autofaiss": Peer("autofaiss", "autofaiss", autofaiss(None)),
    "autofaiss quarter": Peer("autofaiss", "autofaiss", autofaiss(0.25)),
    "scikit-learn": Peer("scikit-learn", "sklearn.neighbors", scikit_learn, 200),
}


def measure(engine: Engine, queries: Vectors, order: dict[str, Any]) -> dict[str, Any]:
    """Search for all queries at once, then for one after the other; write the rows where they are wanted."""
    if order["value"] is not None and engine.tune is not None:
        engine.tune(order["value"])
    queries = np.array(queries[: order["count"]])
    engine.search(queries[:50], K)
    started = time.perf_counter()
    rows = engine.search(queries, K)
    seconds = time.perf_counter() - started
    singles = []
    for number in range(min(order["singles"], len(queries))):
        started = time.perf_counter()
        engine.search(queries[number : number + 1], K)
        singles.append(time.perf_counter() - started)
    np.save(order["rows"], np.asarray(rows, dtype=np.int64))
    return {"rate": len(queries) / seconds, "latency": statistics.median(singles)}


def compare_with_product(engine: Engine, queries: Vectors, case: Case, counts: list[int]) -> list[dict[str, float]]:
    """Time exact search beside the matrix product alone, over the same mapped store, the two taking turns."""
    from embedkit import Store

    gallery = Store.open(case.store).embeddings
    products = np.empty((max(counts), PRODUCT_BLOCK), dtype=np.float32)

    def multiply(some: Vectors) -> None:
        for start in range(0, len(gallery), PRODUCT_BLOCK):
            block = gallery[start : start + PRODUCT_BLOCK]
            out = products.reshape(-1)[: len(some) * len(block)].reshape(len(some), len(block))
            np.matmul(some, block.T, out=out)

    found = []
    for count in counts:
        some = np.array(queries[:count])
        times: tuple[list[float], list[float]] = ([], [])
        while len(times[0]) < 3 or (sum(map(sum, times)) < 3 and len(times[0]) < 50):
            for side, taken in zip((lambda some: engine.search(some, K), multiply), times, strict=True):
                started = time.perf_counter()
                side(some)
                taken.append(time.perf_counter() - started)
        found.append({"queries": count, "embedkit": min(times[0]), "product": min(times[1])})
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    peer, case = PEERS[sys.argv[1]], Case(**json.loads(sys.argv[2]))
    importlib.import_module(peer.module)
    queries: Vectors = np.load(sys.argv[3], mmap_mode="r")
    answer({})
    engine: Engine | None = None
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "build":
            started = time.perf_counter()
            engine = peer.build(case)
            seconds = time.perf_counter() - started
            answer({"seconds": seconds, "parameter": engine.parameter, "values": engine.values, "note": engine.note})
            continue
        assert engine is not None
        if order["do"] == "measure":
            answer(measure(engine, queries, order))
        elif order["do"] == "size":
            with tempfile.TemporaryDirectory() as folder:
                answer(engine.size(Path(folder)))
        else:
            answer(compare_with_product(engine, queries, case, order["counts"]))


if __name__ == "__main__":
    main()
