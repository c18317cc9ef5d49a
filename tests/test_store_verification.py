"""Damage and malice: every flipped bit is found, and nothing in a file hangs or crashes the reader."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from embedkit import EmbeddingSpec, EmbedkitError, Store, StoreFormatError, StoreNotFoundError
from embedkit.store import StoreWriter, verify
from embedkit.store.hdf5 import LayoutError, lookup3, read_layout

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "s.h5"
    random = np.random.default_rng(0)
    with StoreWriter(path, SPEC, information={"root": "/photos"}) as writer:
        ids = [f"{number:04}.jpg" for number in range(5000)]
        hashes = [random.bytes(32) for _ in ids]
        labels = [f"class {number % 3}" for number in range(5000)]
        writer.append(
            random.standard_normal((5000, 3)), ids, sizes=[7] * 5000, mtimes_ns=[9] * 5000, content_sha256=hashes,
            labels=labels,
        )  # fmt: skip
        writer.fail("bad.jpg", "truncated")
        writer.finalise()
    return path


def flipped(store: Path, copy: Path, bit: int) -> Path:
    data = bytearray(store.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    copy.write_bytes(data)
    return copy


def test_a_whole_store_has_no_problems(store: Path) -> None:
    assert verify(store) == [] and Store.open(store).verify() == []
    seen: list[tuple[int, int]] = []
    verify(store, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 5000 * 12


def test_every_metadata_byte_and_every_gap_is_covered(store: Path, tmp_path: Path) -> None:
    data = store.read_bytes()
    layout = read_layout(lambda offset, length: data[offset : offset + length], len(data))
    raw = [(found.offset, found.offset + found.nbytes) for found in layout.datasets.values()]
    outside = [byte for byte in range(len(data)) if not any(start <= byte < stop for start, stop in raw)]
    step = 1 if os.environ.get("EMBEDKIT_ALL_BITS") else 7
    for byte in outside[::step]:
        assert verify(flipped(store, tmp_path / "s.h5", 8 * byte + byte % 8)), byte
    assert len(outside) > 5000


def test_random_flips_are_found_and_embeddings_named_by_rows(store: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    whole = Store.open(store)
    start, row_bytes = whole.matrices[""].offset, whole.matrices[""].row_bytes
    for bit in random.integers(0, 8 * store.stat().st_size, 200).tolist():
        problems = verify(flipped(store, tmp_path / "s.h5", bit))
        assert problems
        row = (bit // 8 - start) // row_bytes
        if 0 <= row < 5000:
            expected = (0, 4096) if row < 4096 else (4096, 5000)
            assert [(problem.where, problem.rows) for problem in problems] == [("embeddings", expected)]
            assert str(problems[0]).startswith(f"embeddings rows {expected[0]}:{expected[1]}: ")


def test_truncated_and_extended_files_are_found(store: Path, tmp_path: Path) -> None:
    data = store.read_bytes()
    for length in [0, 7, 8, 47, 48, 100, len(data) // 2, len(data) - 1]:
        (tmp_path / "s.h5").write_bytes(data[:length])
        assert verify(tmp_path / "s.h5")
        with pytest.raises(StoreFormatError):
            Store.open(tmp_path / "s.h5")
    (tmp_path / "s.h5").write_bytes(data + b"\0")
    assert "appended" in str(verify(tmp_path / "s.h5")[0])
    with pytest.raises(StoreNotFoundError):
        verify(tmp_path / "missing.h5")


def test_no_damage_makes_the_reader_do_anything_but_refuse_or_work(store: Path, tmp_path: Path) -> None:
    data = bytearray(store.read_bytes())
    layout = read_layout(lambda offset, length: bytes(data[offset : offset + length]), len(data))
    random = np.random.default_rng(1)
    blocks = list(layout.blocks)
    for number in range(1500):
        damaged = bytearray(data)
        for _ in range(random.integers(1, 4)):
            start, stop = blocks[random.integers(len(blocks))]
            at = int(random.integers(start, stop))
            value = (0, 0xFF, int(random.integers(256)), damaged[at] ^ 1 << int(random.integers(8)))[number % 4]
            length = int(random.integers(1, 9))
            damaged[at : at + length] = bytes([value]) * min(length, len(damaged) - at)
        (tmp_path / "s.h5").write_bytes(damaged)
        try:
            opened = Store.open(tmp_path / "s.h5")
            opened.summary(), opened.labels, opened.ids, opened.rows([0, -1])
        except (EmbedkitError, IndexError):
            pass


def test_a_file_that_points_into_itself_ends(store: Path) -> None:
    data = bytearray(store.read_bytes())
    at = data.index(b"OHDR")
    for offset in range(at, at + 400, 8):
        looped = bytearray(data)
        looped[offset : offset + 8] = at.to_bytes(8, "little")
        with contextlib.suppress(LayoutError):
            read_layout(lambda start, length, looped=looped: bytes(looped[start : start + length]), len(looped))


@pytest.mark.parametrize(
    "hostile",
    [
        lambda file: file.__setitem__("ids2", h5py.ExternalLink("/etc/passwd", "/")),
        lambda file: file.__setitem__("ids2", h5py.SoftLink("/ids")),
        lambda file: file.create_dataset("other", (100,), "u1", external=[("/etc/passwd", 0, 100)]),
        lambda file: file.create_dataset("other", (100,), "u1", compression="gzip"),
        lambda file: file.create_dataset("other", (2, 2), h5py.string_dtype()),
        lambda file: file.attrs.__setitem__("other", "a text of variable length"),
    ],
)
def test_what_could_lead_out_of_the_file_is_refused(store: Path, tmp_path: Path, hostile: object) -> None:
    (tmp_path / "s.h5").write_bytes(store.read_bytes())
    with h5py.File(tmp_path / "s.h5", "r+", libver=("v108", "v108")) as file:
        hostile(file)  # type: ignore[operator]
    with pytest.raises(StoreFormatError):
        Store.open(tmp_path / "s.h5")


def test_provenance_is_read_as_untrusted_text(store: Path, tmp_path: Path) -> None:
    for text in (b"[" * 50_000, b'{"identity": []}', b'{"identity": {"dim": "3"}}', b"\xff\xfe", b"null"):
        (tmp_path / "s.h5").write_bytes(store.read_bytes())
        with h5py.File(tmp_path / "s.h5", "r+", libver=("v108", "v108")) as file:
            file.attrs["provenance"] = np.bytes_(text)
        with pytest.raises(StoreFormatError):
            Store.open(tmp_path / "s.h5")
        assert verify(tmp_path / "s.h5")


def test_the_layout_is_what_h5py_reads(store: Path) -> None:
    data = store.read_bytes()
    layout = read_layout(lambda offset, length: data[offset : offset + length], len(data), checksums=True)
    with h5py.File(store) as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert sorted(names) == sorted(layout.datasets)
        for name, found in layout.datasets.items():
            assert found.shape == file[name].shape and found.dtype == file[name].dtype.base
            if found.nbytes:
                assert found.offset == file[name].id.get_offset() and found.offset % 64 == 0
                assert file[name][()].tobytes() == data[found.offset : found.offset + found.nbytes]
            for attribute, value in found.attributes.items():
                theirs = file[name].attrs[attribute]
                assert value == (theirs.decode() if isinstance(theirs, bytes) else theirs)
    assert data[:8] == b"\x89HDF\r\n\x1a\n"
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(layout.blocks))


def test_lookup3_gives_the_published_values() -> None:
    # The two results that the comment in lookup3.c states for hashlittle with a zero initial value.
    assert lookup3(b"") == 0xDEADBEEF
    assert lookup3(b"Four score and seven years ago") == 0x17770551
