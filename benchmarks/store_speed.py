"""Times the store beside numpy's own files, in one run: write, read, scan, slices, random rows, ids, opening.

Run it alone on the machine: ``python benchmarks/store_speed.py [--rows 100000] [--dim 384] [--folder DIR]``. Every
figure is the best of several, with the two sides taking turns; a ratio below 1 means that the store is faster.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedkit import EmbeddingSpec, Store
from embedkit.store import Failures, Images, Inventory, Rows, Run, StoreWriter, verify

SPECS = {"backbone": "benchmark", "weights_sha256": "0" * 64}


def best(repeat: int, *sides: Callable[[], object]) -> list[float]:
    """Return the best time of each side in seconds, the sides taking turns."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeat):
        for side, taken in zip(sides, times, strict=True):
            started = time.perf_counter()
            side()
            taken.append(time.perf_counter() - started)
    return [min(taken) for taken in times]


def drop_from_cache(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def compare(name: str, size: int, repeat: int, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    store, npy = best(repeat, ours, theirs)
    print(f"  {name:<34}{size / store / 1e9:8.2f} GB/s {size / npy / 1e9:8.2f} GB/s npy {store / npy:8.2f}x")


def write_npy(path: Path, embeddings: npt.NDArray[np.float32]) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        np.save(file, embeddings)
        file.flush()
        os.fsync(file.fileno())


def write_store(path: Path, embeddings: npt.NDArray[np.float32], ids: list[str]) -> None:
    with StoreWriter(path, EmbeddingSpec(dim=embeddings.shape[1], **SPECS), overwrite=True) as writer:
        writer.append(embeddings, ids)
        writer.finalise()


def run(folder: Path, embeddings: npt.NDArray[np.float32], ids: list[str], part: int) -> tuple[float, float]:
    """Return the seconds of processor time that committing takes, and the seconds that finalising takes."""
    count, dim = embeddings.shape
    images = Images.of(ids, [1] * count, [1] * count, [bytes(32)] * count)
    inventory = Inventory(images.ids, np.ones(count, dtype=np.int64), np.ones(count, dtype=np.int64))
    with Run(folder / "run.h5", EmbeddingSpec(dim=dim, **SPECS)) as current:
        update = current.prepare(inventory, lambda numbers: [], part_size=lambda _: part, batch_size=32)
        used = time.process_time()
        for number in update.todo:
            rows = np.arange(number * part, min(count, (number + 1) * part))
            current.write(number, Rows(images.take(rows), Failures.empty(), {"": embeddings[rows]}))
        used = time.process_time() - used
        started = time.perf_counter()
        current.finalise(update)
        return used, time.perf_counter() - started


def measure(folder: Path, count: int, dim: int) -> None:
    random = np.random.default_rng(0)
    embeddings = random.standard_normal((count, dim), dtype=np.float32)
    ids = [f"class_{number // 1000:04}/image_{number:08}.jpg" for number in range(count)]
    npy, path, size = folder / "x.npy", folder / "x.h5", embeddings.nbytes
    repeat = 5 if size < 1e9 else 3
    print(f"{count:,} x {dim} float32, {size / 1e9:.2f} GB")
    compare("write durably (store: twice, sorted)", size, 2, lambda: write_store(path, embeddings, ids),
            lambda: write_npy(npy, embeddings))  # fmt: skip
    store, out = Store.open(path), np.empty_like(embeddings)
    mapped = np.load(npy, mmap_mode="r")
    compare("read all", size, repeat, store.load, lambda: np.load(npy))

    def read_npy() -> None:
        with npy.open("rb") as file:
            file.seek(128)
            file.readinto(out.reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]

    compare("read all into an array", size, repeat, lambda: store.load(out=out), read_npy)
    compare("scan the map", size, repeat, lambda: store.embeddings.max(), lambda: mapped.max())
    starts = range(0, count - 4096, 4096)
    compare("slices of 4,096 rows", size, repeat, lambda: [np.array(store.embeddings[i : i + 4096]) for i in starts],
            lambda: [np.array(mapped[i : i + 4096]) for i in starts])  # fmt: skip
    rows = random.integers(0, count, 1000)
    warm, warm_npy = best(repeat, lambda: store.rows(rows), lambda: np.array(mapped[rows]))
    cold, cold_npy = [], []
    for _ in range(3):
        del mapped
        store = Store.open(path)
        mapped = np.load(npy, mmap_mode="r")
        for file in (path, npy):
            drop_from_cache(file)
        rows = random.integers(0, count, 1000)
        cold += best(1, lambda rows=rows, store=store: store.rows(rows))
        cold_npy += best(1, lambda rows=rows, mapped=mapped: np.array(mapped[rows]))
    print(f"  1,000 random rows, warm           {warm * 1e3:8.2f} ms   {warm_npy * 1e3:8.2f} ms npy memmap")
    print(f"  1,000 random rows, cold           {min(cold) * 1e3:8.2f} ms   {min(cold_npy) * 1e3:8.2f} ms npy memmap")
    opening, opening_npy = best(20, lambda: Store.open(path).embeddings, lambda: np.load(npy, mmap_mode="r"))
    print(f"  open and map                      {opening * 1e3:8.2f} ms   {opening_npy * 1e3:8.2f} ms npy")
    (decoding,) = best(3, lambda: Store.open(path).ids)
    print(f"  ids as text                       {decoding:8.3f} s    ({decoding / count * 1e6:.2f} s per million)")
    (verifying,) = best(2, lambda: verify(path))
    print(f"  verify                            {size / verifying / 1e9:8.2f} GB/s")
    for part in (256, 4096):
        runs = []
        for _ in range(repeat):
            runs.append(run(folder, embeddings, ids, part))
            (folder / "run.h5").unlink()
        used, finalising = (min(times) for times in zip(*runs, strict=True))
        print(f"  commit in parts of {part:<5}          {used / count * 5000:8.1%} of a core at 5,000 rows/s; "
              f"finalise {size / finalising / 1e9:.2f} GB/s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    for count in arguments.rows:
        for dim in arguments.dim:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                measure(Path(folder), count, dim)


if __name__ == "__main__":
    main()
