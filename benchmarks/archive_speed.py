"""Times the listing of archives, and shows that its memory does not grow with their bytes.

Run it alone on the machine: ``python benchmarks/archive_speed.py [--members 1000000] [--gigabytes 10] [--folder DIR]``.
Every listing runs in a process of its own, whose largest memory is given beside that of one that only imports embedkit.
The large tar archive has holes for contents, so that it takes no room on most file systems.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from embedkit.sources.archives.listing import list_archive

PICTURE_BYTES = 10 << 20


def head(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = size, 1_700_000_000
    return member.tobuf(tarfile.GNU_FORMAT)


def write_large(path: Path, gigabytes: float) -> None:
    with path.open("wb") as file:
        for number in range(int(gigabytes * (1 << 30)) // PICTURE_BYTES):
            file.write(head(f"photos/{number % 10}/{number:06}.tif", PICTURE_BYTES))
            file.seek(PICTURE_BYTES, os.SEEK_CUR)
        file.write(bytes(1024))


def write_many(path: Path, count: int) -> None:
    data = b"x".ljust(512, b"\0")
    with path.open("wb", buffering=1 << 20) as file:
        for number in range(count):
            file.write(head(f"photos/{number % 1000:03}/{number:08}.jpg", 1) + data)
        file.write(bytes(1024))


def write_samples(path: Path, count: int) -> None:
    picture, label = b"x".ljust(512, b"\0"), b"7".ljust(512, b"\0")
    with path.open("wb", buffering=1 << 20) as file:
        for number in range(count // 2):
            file.write(head(f"{number:08}.cls", 1) + label + head(f"{number:08}.jpg", 1) + picture)
        file.write(bytes(1024))


def write_zip(path: Path, count: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            archive.writestr(zipfile.ZipInfo(f"photos/{number % 1000:03}/{number:08}.jpg"), b"x")


def list_and_sample(path: str) -> str:
    started = time.perf_counter()
    listing = list_archive(path)
    listed = time.perf_counter() - started
    megabytes = largest_memory()
    started = time.perf_counter()
    np.array([file.status() for file in listing.files])
    statuses = time.perf_counter() - started
    started = time.perf_counter()
    size = sum(len(file.read()) for file in random.Random(0).sample(listing.files, min(100, len(listing.files))))
    read = time.perf_counter() - started
    return (
        f"{len(listing.files):>9,} images in {listed:6.2f} s and {megabytes:.0f} MiB; all statuses {statuses:5.2f} s; "
        f"100 read ({size / 1e6:,.1f} MB) {read:5.2f} s"
    )


def with_tarfile(path: str) -> str:
    started = time.perf_counter()
    with tarfile.open(path) as archive:
        count = sum(1 for _ in archive)
    return f"{count:>9,} members in {time.perf_counter() - started:5.2f} s"


def with_zipfile(path: str) -> str:
    started = time.perf_counter()
    with zipfile.ZipFile(path) as archive:
        count = len(archive.infolist())
    return f"{count:>9,} members in {time.perf_counter() - started:5.2f} s"


def nothing(path: str) -> str:
    return ""


def largest_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _told(connection: multiprocessing.connection.Connection, task: Callable[[str], str], path: str) -> None:
    text = task(path)
    connection.send((text, largest_memory()))


def measure(name: str, task: Callable[[str], str], path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_told, args=(theirs, task, str(path)))
    process.start()
    text, megabytes = ours.recv()
    process.join()
    print(f"  {name:<28}{megabytes:7.0f} MiB  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1_000_000)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder, "archive")
        measure("importing embedkit alone", nothing, path)
        write_large(path, arguments.gigabytes)
        measure(f"a tar of {arguments.gigabytes:g} GB", list_and_sample, path)
        path.unlink()
        for name, write, peer in (
            ("tar", write_many, with_tarfile),
            ("tar with labels", write_samples, with_tarfile),
            ("zip", write_zip, with_zipfile),
        ):
            write(path, arguments.members)
            measure(f"a {name} of {arguments.members:,}", list_and_sample, path)
            measure(f"  {peer.__name__.replace('_', ' ')}", peer, path)
            path.unlink()


if __name__ == "__main__":
    main()
