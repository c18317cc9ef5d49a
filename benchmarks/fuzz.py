"""Damages images in every way that networks, disks and enemies do, and reads what is left of them.

    python benchmarks/fuzz.py [FOLDER ...] [--mutants 20000] [--seed 0] [--save fuzz-findings]

The corpus is made by Pillow, in every format and mode that it writes; folders add files of their own, such as Pillow's
Tests/images and libjpeg-turbo's testimages. Each mutant is read in a child process with a time limit. What must never
happen is saved: a crash, a hang, an exception that is no ImageError, a crop of the wrong shape, or a crop of a file
that Pillow itself cannot decode. Exit code 1 when any of it did.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from embedkit import ImageError, Preprocessing
from embedkit.images import DECODERS, read_crop

LARGEST = 300_000  # Larger files take their time and find nothing that smaller ones do not.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
FORMATS: dict[str, list[dict[str, Any]]] = {
    "JPEG": [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}],
    "PNG": [{}, {"compress_level": 0}], "GIF": [{}, {"interlace": 0}], "BMP": [{}], "DIB": [{}],
    "TIFF": [{}, *({"compression": name} for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"))],
    "WEBP": [{}, {"lossless": True}], "AVIF": [{}], "JPEG2000": [{}, {"irreversible": True}], "PPM": [{}], "QOI": [{}],
    "ICO": [{}, {"bitmap_format": "bmp"}], "ICNS": [{}], "DDS": [{}, {"pixel_format": "DXT1"}], "PCX": [{}],
    "SGI": [{}], "TGA": [{}, {"compression": "tga_rle"}], "MSP": [{}], "XBM": [{}], "BLP": [{}], "MPO": [{}],
    "HEIF": [{}], "JXL": [{}, {"lossless": True}],
}  # fmt: skip


@dataclass
class Findings:
    """What became of the mutants."""

    kinds: Counter[str] = field(default_factory=Counter)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    peak: tuple[int, str] = (0, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="that reading one may take")
    parser.add_argument("--max-pixels", type=int, default=25_000_000)
    parser.add_argument("--save", type=Path, default=Path("fuzz-findings"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    findings = run(arguments)
    elapsed = time.perf_counter() - started
    print(f"{arguments.mutants:,} mutants of {len(corpus(arguments.folders)):,} files in {elapsed:.0f} s")
    print("\n".join(f"  {kind:14} {count:,}" for kind, count in findings.kinds.most_common()))
    print("slowest:", *(f"  {seconds:.2f} s  {name}" for seconds, name in sorted(findings.slowest)[:-6:-1]), sep="\n")
    print(f"peak memory of the reading process: {findings.peak[0] / 1024:.0f} MB, first at {findings.peak[1]}")
    print(f"crashes, hangs and the like: {len(findings.bugs)}", *findings.bugs, sep="\n  ")
    sys.exit(1 if findings.bugs else 0)


def run(arguments: argparse.Namespace) -> Findings:
    """Read every mutant, starting a new child whenever one is lost."""
    findings, context = Findings(), multiprocessing.get_context("spawn")
    number, last = arguments.first, arguments.first + arguments.mutants
    while number < last:
        parent, child = context.Pipe()
        reader = context.Process(target=read_mutants, args=(arguments, number, last, child), daemon=True)
        reader.start()
        child.close()
        number = _listen(parent, reader, findings, arguments, number, last)
        reader.kill()
        reader.join()
    return findings


def _listen(
    parent: Connection, reader: Any, findings: Findings, arguments: argparse.Namespace, number: int, last: int
) -> int:
    """Take the child's reports until it is done or lost; return the number of the next mutant."""
    patience = 120.0  # Until the corpus is made.
    while number < last:
        lost = ""
        try:
            if parent.poll(patience):
                number, kind, seconds, memory, name, bug = parent.recv()
                findings.kinds[kind] += 1
                findings.peak = max(findings.peak, (memory, name), key=lambda peak: peak[0])
                findings.slowest = sorted([*findings.slowest, (seconds, name)])[-5:]
                if bug:
                    findings.bugs.append(f"{name}: {bug}")
            else:
                lost = f"no answer after {patience:.0f} s"
        except EOFError:
            reader.join()
            lost = f"its process ended with exit code {reader.exitcode}"
        if lost:
            findings.bugs.append(f"mutant {number}: {lost}")
            findings.kinds["crash or hang"] += 1
            files = corpus(arguments.folders)
            _save(arguments.save, number, mutant(files, arguments.seed, number)[1])
            return number + 1
        number, patience = number + 1, arguments.seconds + 20
    return number


def read_mutants(arguments: argparse.Namespace, first: int, last: int, reports: Connection) -> None:
    """Read mutants, and report each. Runs in a child process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Decoders in C complain there of every second mutant.
    files = corpus(arguments.folders)
    plain = Preprocessing(decoder=DECODERS["standard"])
    ways = (plain, replace(plain, icc=True), replace(plain, truncated="pad"), replace(plain, decoder="pillow"))
    for number in range(first, last):
        name, data = mutant(files, arguments.seed, number)
        way, bug = ways[number % len(ways)], ""
        started = time.perf_counter()
        try:
            crop = read_crop(data, way, id=name, max_pixels=arguments.max_pixels)
            kind = "read"
            if crop.shape != (224, 224, 3) or crop.dtype != np.uint8:
                bug = f"a crop of shape {crop.shape}"
        except ImageError as error:
            kind = error.kind
        except BaseException as error:
            kind, bug = "other exception", repr(error)
        seconds = time.perf_counter() - started
        if seconds > arguments.seconds:
            bug = bug or f"took {seconds:.1f} s"
        if kind == "read" and way.truncated == "fail" and not _pillow_decodes(data):
            bug = bug or "read, though Pillow cannot decode it"
        if bug:
            _save(arguments.save, number, data)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reports.send((number, kind, seconds, memory, f"mutant {number} of {name}", bug))


def _pillow_decodes(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except UnidentifiedImageError:
        return data[4:8] == b"ftyp"  # embedkit looks at all of a file's brands, Pillow at the first.
    except Exception:
        return False
    return not ImageFile.LOAD_TRUNCATED_IMAGES


def _save(folder: Path, number: int, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number}.bin").write_bytes(data)


def corpus(folders: list[Path]) -> list[tuple[str, bytes]]:
    """Return names and bytes of the files that mutants are made of, the same every time."""
    files = list(made())
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and 0 < path.stat().st_size <= LARGEST:
                files.append((path.relative_to(folder).as_posix(), path.read_bytes()))
    return files


def made() -> Iterator[tuple[str, bytes]]:
    """Yield small files of every format and mode that can be written here."""
    for plugin in ("pillow_heif", "pillow_jxl"):
        try:
            module = __import__(plugin)
        except ImportError:
            continue
        if plugin == "pillow_heif":
            module.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in MODES:
        image = _picture(mode)
        for format, variants in FORMATS.items():
            for number, options in enumerate(variants):
                buffer = io.BytesIO()
                try:
                    image.save(buffer, format, exif=exif.tobytes(), **options)
                except Exception:  # Few formats take all modes, and none says which.
                    continue
                yield f"{format}-{mode}-{number}", buffer.getvalue()
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        _picture("RGB").save(buffer, format, save_all=True, append_images=[_picture("L").convert("RGB")])
        yield f"{format}-frames", buffer.getvalue()


def _picture(mode: str) -> Image.Image:
    rows, columns = np.mgrid[0:40, 0:48]
    levels = np.stack([rows * 6, columns * 5, (rows + columns) * 2], axis=-1).astype(np.uint8)
    if mode == "F":
        return Image.fromarray(levels[..., 0].astype(np.float32) / 255)
    if mode in ("I", "I;16"):
        wide = levels[..., 0].astype(np.uint16) * 257
        return Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32))
    image = Image.fromarray(levels)
    if mode == "PA":
        return image.convert("P").convert("PA")
    image = image.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(levels[..., 1]))
    return image


def mutant(files: list[tuple[str, bytes]], seed: int, number: int) -> tuple[str, bytes]:
    """Return the name of the file that a mutant is made of, and the mutant."""
    random = np.random.default_rng([seed, number])
    name, data = files[random.integers(len(files))]
    other = files[random.integers(len(files))][1]
    for _ in range(int(random.integers(1, 4))):
        if len(data) > 2:
            data = _WAYS[random.integers(len(_WAYS))](data, other, random)
    return name, data


def _truncate(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    return data[: int(random.integers(1, len(data)))]


def _flip_bits(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    mutated = bytearray(data)
    # Half of the time in the header, where it matters.
    end = len(data) if random.random() < 0.5 else min(len(data), 200)
    for _ in range(int(random.integers(1, 12))):
        mutated[int(random.integers(end))] ^= 1 << int(random.integers(8))
    return bytes(mutated)


def _splice(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    return data[: int(random.integers(1, len(data)))] + other[int(random.integers(len(other))) :]


def _overwrite_number(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """Put an extreme number where a length, an offset or a size may stand."""
    width = int(random.choice([1, 2, 4, 8]))
    at = int(random.integers(max(1, min(len(data), int(random.choice([64, 512, len(data)]))) - width)))
    values = [0, 1, 2**15, 2**16, 2**31 - 1, 2**32 - 1, 2**63 - 1, len(data), len(data) * 2]
    value = min(int(values[random.integers(len(values))]), 2 ** (8 * width) - 1)
    return data[:at] + value.to_bytes(width, str(random.choice(["big", "little"]))) + data[at + width :]


def _repeat(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    start, end = sorted(random.integers(0, len(data), 2).tolist())
    return (data[:end] + data[start:end] * int(random.integers(1, 20)) + data[end:])[: 4 * LARGEST]


def _zero(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    start, end = sorted(random.integers(0, len(data), 2).tolist())
    return data[:start] + bytes(end - start) + data[end:]


_WAYS = (_truncate, _flip_bits, _flip_bits, _splice, _overwrite_number, _overwrite_number, _repeat, _zero)

if __name__ == "__main__":
    main()
