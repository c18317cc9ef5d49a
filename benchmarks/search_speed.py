"""Searches side by side, in one run on the same vectors: recall@10 against queries a second, build time, memory.

    python benchmarks/search_speed.py --gallery train.h5 --queries val.h5 [--python autofaiss=VENV/bin/python]

Run it alone on the machine. embedkit (exact, and what `recall=0.99` chose) stands beside faiss used directly, hnswlib,
usearch, autofaiss and scikit-learn, each as its defaults build it and over a sweep of its search parameter. There are
two galleries: the embeddings of a store, with queries from another one of the same spec, and a million synthetic
clustered vectors. hnswlib, usearch, autofaiss and matplotlib are for this benchmark alone; a peer that is not installed
is left out with a line that says so, and `--python` gives a peer an interpreter of its own.

Every peer has a process of its own. Builds come one after the other; then the peers take turns at searching, and the
best of the rounds counts. Recall is by distance: a row counts that is as near as the tenth nearest. Writes a table, a
picture and all points to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from search_peers import PEERS, K, Rows, Vectors
from search_report import write_report

import embedkit
from embedkit import EmbeddingSpec, Store
from embedkit.store import StoreWriter

BLOCK = 50_000
SYNTHETIC = {"dim": 128, "clusters": 10_000}
COUNTS = (1, 10, 100, 1000, 5000)
HERE = Path(embedkit.__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", type=Path, help="store to search in; left out: synthetic vectors only")
    parser.add_argument("--queries", type=Path, help="store of the same spec whose rows are the queries")
    parser.add_argument("--synthetic", type=int, default=1_000_000, metavar="ROWS", help="0 for none")
    parser.add_argument("--count", type=int, default=5000, help="queries (default 5000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recall", type=float, default=0.99, help="what embedkit is asked for (default 0.99)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=f"of {[*PEERS]}")
    parser.add_argument("--python", nargs="+", default=[], metavar="PEER=PATH", help="interpreters, by a peer's name")
    parser.add_argument("--folder", type=Path, help="for the vectors, kept for the next run")
    parser.add_argument("--name", help="of the files in benchmarks/results/ (default search; search_quick)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds in which a peer has to build (1800)")
    parser.add_argument("--quick", action="store_true", help="10,000 rows and one round, to see that it works")
    arguments = parser.parse_args()
    if (arguments.gallery is None) != (arguments.queries is None):
        parser.error("--gallery and --queries go together")
    if arguments.quick:
        arguments.synthetic, arguments.count, arguments.rounds = min(arguments.synthetic, 10_000), 500, 1
    pythons = dict(item.split("=", 1) for item in arguments.python)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for gallery in prepare(folder, arguments):
            results.append(run(gallery, arguments, pythons))
    report = {"processor": processor(), "threads": arguments.threads, "rounds": arguments.rounds, "galleries": results}
    output = Path(__file__).parent / "results"
    write_report(report, output, arguments.name or ("search_quick" if arguments.quick else "search"))


def processor() -> str:
    """Return the processor's name, where the system says it."""
    names = [line.split(":")[1].strip() for line in lines_of("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def lines_of(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


# Galleries: a store, its rows of length 1 as a NumPy file, queries, and the score of each query's tenth nearest.


def prepare(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the galleries, writing what the folder does not hold yet."""
    if arguments.gallery is not None:
        rows = 10_000 if arguments.quick else None
        place = folder / f"{arguments.gallery.stem}_{rows or 'all'}"
        (place / "vectors").mkdir(parents=True, exist_ok=True)
        store = arguments.gallery.resolve()
        if rows is not None:
            store = place / "store.h5"
            if not store.exists():
                whole = Store.open(arguments.gallery)
                whole.select(store, np.linspace(0, len(whole) - 1, min(rows, len(whole))).astype(np.int64))
        gallery, queries = Store.open(store), Store.open(arguments.queries)
        gallery.spec.require_same(queries.spec, f"{arguments.queries} is of another spec")
        chosen = np.linspace(0, len(queries) - 1, min(arguments.count, len(queries))).astype(np.int64)
        yield finish(place, store, f"{len(gallery):,} embeddings of {arguments.gallery.name}", queries.rows(chosen))
    if arguments.synthetic:
        count = arguments.synthetic
        place = folder / f"synthetic_{count}"
        (place / "vectors").mkdir(parents=True, exist_ok=True)
        if not (place / "store.h5").exists():
            write_synthetic(place / "store.h5", count)
        title = f"{count:,} synthetic clustered vectors"
        yield finish(place, place / "store.h5", title, synthetic(arguments.count, seed=2))


def synthetic(count: int, seed: int) -> Vectors:
    """Return vectors around cluster centres, both with the falling spectrum that embeddings have, of length 1."""
    dim, clusters = SYNTHETIC["dim"], SYNTHETIC["clusters"]
    fixed = np.random.default_rng(0)
    spectrum = (np.arange(1, dim + 1) ** -0.8).astype(np.float32)
    centres = fixed.standard_normal((clusters, dim), dtype=np.float32)
    weights = fixed.lognormal(sigma=0.7, size=clusters)
    random = np.random.default_rng([1, seed])
    members = random.choice(clusters, size=count, p=weights / weights.sum())
    vectors = (centres[members] + 0.7 * random.standard_normal((count, dim), dtype=np.float32)) * spectrum
    return unit(vectors)


def write_synthetic(path: Path, count: int) -> None:
    spec = EmbeddingSpec(backbone="synthetic", weights_sha256="0" * 64, dim=SYNTHETIC["dim"])
    with StoreWriter(path, spec) as writer:
        for start in range(0, count, BLOCK):
            rows = range(start, min(count, start + BLOCK))
            writer.append(synthetic(len(rows), seed=3 + start), [f"{row:08}" for row in rows])
        writer.finalise()


def unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def finish(place: Path, store: Path, title: str, queries: Vectors) -> dict[str, Any]:
    """Write what the peers read, and compare everything with everything for the truth."""
    opened = Store.open(store)
    path = place / "vectors" / "0.npy"
    if not path.exists():
        part = place / "part.npy"
        vectors = np.lib.format.open_memmap(part, "w+", np.dtype(np.float32), (len(opened), opened.dim))
        for start, block in zip(range(0, len(opened), BLOCK), opened.iter_blocks(BLOCK), strict=True):
            vectors[start : start + len(block)] = unit(block)
        vectors.flush()
        part.rename(path)
    queries = unit(queries)
    np.save(place / "queries.npy", queries)
    vectors = np.load(path, mmap_mode="r")
    best = np.full((len(queries), K), -2, dtype=np.float32)
    for start in range(0, len(vectors), 8192):
        scores = np.hstack([best, queries @ vectors[start : start + 8192].T])
        best = -np.partition(-scores, K - 1, axis=1)[:, :K]
    return {"title": title, "place": place, "store": store, "vectors": path, "least": best.min(axis=1)}


def recall(gallery: dict[str, Any], found: Rows) -> float:
    """Return the share of the K that is as near as the tenth nearest; what was found twice counts once."""
    vectors = np.load(gallery["vectors"], mmap_mode="r")
    queries = np.load(gallery["place"] / "queries.npy", mmap_mode="r")
    near = 0
    for query, rows, least in zip(queries, found, gallery["least"], strict=False):
        near += int((vectors[np.unique(rows[rows >= 0])] @ query >= least - 1e-6).sum())
    return near / (len(found) * K)


# Peers, each a process.


class PeerError(Exception):
    """A peer's process has ended, with this as its last line, or takes too long."""


class Child:
    """A peer's process, and the most memory that it has held."""

    def __init__(self, name: str, python: str, gallery: dict[str, Any], threads: int, recall: float) -> None:
        self.name = name
        self.start = self.peak = {"RssAnon": 0, "VmHWM": 0}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        case = {"vectors": str(gallery["vectors"]), "store": str(gallery["store"]), "threads": threads}
        ours = PEERS[name].library == "embedkit"  # The same one as here, and in no other interpreter.
        limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("search_peers.py")), name, json.dumps(case | {"recall": recall}),
             str(gallery["place"] / "queries.npy")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=os.environ | dict.fromkeys(limits, str(threads)) | ({"PYTHONPATH": str(HERE)} if ours else {}),
        )  # fmt: skip

    def memory(self) -> dict[str, int]:
        """Return anonymous and highest resident memory in bytes; mapped files are only in the second."""
        pairs = (line.split(":") for line in lines_of(f"/proc/{self.process.pid}/status"))
        return {name: int(value.split()[0]) * 1024 for name, value in pairs if name in self.peak}

    def watch(self) -> None:
        """Note the memory that it holds now, if that is the most."""
        self.peak = {name: max(self.peak[name], value) for name, value in self.memory().items()} or self.peak

    def ask(self, limit: float = math.inf, **order: Any) -> Any:
        """Send an order and wait for its answer, `limit` seconds at most."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.read(limit)

    def read(self, limit: float = math.inf) -> Any:
        """Wait for an answer, watching the memory."""
        last = time.monotonic() + limit
        answers = self.process.stdout
        assert answers is not None
        while not select.select([answers], [], [], 0.05)[0]:
            self.watch()
            if time.monotonic() > last:
                raise PeerError(f"not built within {limit:.0f} s")
        self.watch()
        line = answers.readline()
        if not line:
            self.log.seek(0)
            raise PeerError(self.log.read().strip().rpartition("\n")[2] or f"exit {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.log.close()


def run(gallery: dict[str, Any], arguments: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    """Build every peer, then let them search in turns."""
    print(f"\n{gallery['title']}", flush=True)
    children: dict[str, Child] = {}
    peers: dict[str, Any] = {}
    skipped: list[str] = []
    products: list[dict[str, float]] = []

    def attempt(name: str, step: Callable[[Child], None]) -> None:
        try:
            step(children[name])
        except PeerError as error:
            children.pop(name).close()
            peers.pop(name, None)
            skipped.append(f"{name}: {error}")
            print(f"  {name} is left out: {error}", flush=True)

    def begin(child: Child) -> None:
        peers[child.name] = build(child, arguments.limit, 5 if arguments.quick else 1)

    try:
        for name in arguments.peers:
            python = pythons.get(name, pythons.get(PEERS[name].library, sys.executable))
            children[name] = Child(name, python, gallery, arguments.threads, arguments.recall)
            attempt(name, begin)
        for number in range(arguments.rounds):
            for name in list(children):
                attempt(name, lambda child, number=number: search(child, gallery, peers, arguments.count, number))
        for name in list(children):
            attempt(name, lambda child: weigh(child, peers))
        if exact := children.get("embedkit exact"):
            products = exact.ask(do="compare", counts=[count for count in COUNTS if count <= arguments.count])
    finally:
        for child in children.values():
            child.close()
    shape = np.load(gallery["vectors"], mmap_mode="r").shape
    return {
        "title": gallery["title"], "rows": shape[0], "dim": shape[1], "queries": len(gallery["least"]),
        "peers": peers, "skipped": skipped, "products": products,
    }  # fmt: skip


def build(child: Child, limit: float, step: int) -> dict[str, Any]:
    """Let a peer import its library and build, and return what that took; its points are every step-th value."""
    child.read()
    child.start = child.memory()
    built = child.ask(limit, do="build")
    held = child.memory()["RssAnon"] - child.start["RssAnon"]
    print(f"  {child.name:<18} built in {built['seconds']:6.0f} s, {held / 1e6:6.0f} MB ({built['note']})", flush=True)
    return {
        "build_seconds": built["seconds"], "held": held, "parameter": built["parameter"], "note": built["note"],
        "points": [{"value": value, "rates": [], "latencies": []} for value in built["values"][::step]],
    }  # fmt: skip


def weigh(child: Child, peers: dict[str, Any]) -> None:
    """Add the most memory that building and searching took, and the bytes of the index."""
    highest = child.memory()["VmHWM"] - child.start["VmHWM"]
    peers[child.name] |= {"peak": child.peak["RssAnon"] - child.start["RssAnon"], "peak_with_files": highest}
    peers[child.name]["bytes"] = child.ask(do="size")


def search(child: Child, gallery: dict[str, Any], peers: dict[str, Any], count: int, number: int) -> None:
    """Measure every point of a peer once more."""
    facts = peers[child.name]
    for point in facts["points"]:
        path = gallery["place"] / "rows.npy"
        asked = min(count, PEERS[child.name].queries or count)
        singles = 100 if PEERS[child.name].queries is None else 10
        found = child.ask(do="measure", value=point["value"], count=asked, singles=singles, rows=str(path))
        point["rates"].append(found["rate"])
        point["latencies"].append(found["latency"])
        point["recall"] = recall(gallery, np.load(path))
        print(f"  {number + 1}: {child.name:<18} {facts['parameter']:>9} {point['value'] or '':>4} recall "
              f"{point['recall']:.4f} {found['rate']:9.0f} queries/s {found['latency'] * 1e3:8.2f} ms",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
