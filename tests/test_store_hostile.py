"""Files that somebody made on purpose: every checksum in them matches, and nothing else has to."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedkit import EmbeddingSpec, ImageError, Index, Store, StoreFormatError
from embedkit.spec import canonical_json
from embedkit.store import Failures, Images, Rows, verify
from embedkit.store import format as schema
from embedkit.store.hdf5 import MAX_METADATA_BYTES, LayoutError, lookup3, read_layout
from embedkit.store.parts import read_parts, write_part

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=2)
IDS = np.array([b"a.jpg", b"b.jpg", b"c.jpg"])


def failed(*ids: bytes) -> dict[str, Any]:
    zeros = {f"failures/{name}": np.zeros(len(ids), kind) for name, kind in (("sizes", "<u8"), ("mtimes_ns", "<i8"))}
    return {"failures/ids": np.array(ids, dtype="S9"), "failures/errors": np.array([b"x"] * len(ids), "S1"), **zeros}


def of_kinds(kinds: Any) -> dict[str, Any]:
    return {**failed(b"d.jpg", b"e.jpg"), "failures/kinds": kinds}


def make(
    path: Path,
    columns: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
    *,
    provenance: str | None = None,
    spec: EmbeddingSpec = SPEC,
    block_rows: int = schema.BLOCK_ROWS,
) -> Path:
    """Write a store of three rows in which columns (None: left out) and attributes are replaced by others."""
    arrays = {
        "embeddings": np.ones((3, 2), "<f4"), "ids": IDS, "sizes": np.zeros(3, "<u8"), "mtimes_ns": np.zeros(3, "<i8"),
        "content_sha256": np.ones((3, 32), "u1"), **failed(), **(columns or {}),
    }  # fmt: skip
    arrays = {name: array for name, array in arrays.items() if array is not None}
    matrices = [name for name in arrays if name == "embeddings" or name.startswith("layers/")]
    for name in matrices:
        rows = arrays[name]
        blocks = [rows[start : start + block_rows].tobytes() for start in range(0, len(rows), block_rows)]
        digests = b"".join(hashlib.sha256(block).digest() for block in blocks)
        arrays[f"checksums/{name}"] = np.frombuffer(digests, "u1").reshape(-1, 32)
    hashes = {name: schema.sha256_of(array) for name, array in arrays.items()}
    hashes |= {name: hashes[f"checksums/{name}"] for name in matrices}
    written: dict[str, Any] = {name: {"sha256": sha256} for name, sha256 in hashes.items()}
    for name in arrays:
        if name.startswith("checksums/"):
            written[name] |= {"block_rows": block_rows, "algorithm": "sha256"}
    facts = [(name, arrays[name].dtype.str, arrays[name].shape, hashes[name]) for name in schema.identity(arrays)]
    written[""] = {
        "format": schema.FORMAT, "schema_version": 1, "digest": spec.digest, "run_id": "r", "created": "c",
        "provenance": provenance or canonical_json({"identity": spec.to_dict(), "information": {}}),
        "content_id": schema.content_id(spec.digest, facts), **(attributes or {}),
    }  # fmt: skip
    pieces = schema.lay_out({name: (array.shape, array.dtype) for name, array in arrays.items()}, written)
    data = bytearray(pieces.size)
    for name, array in arrays.items():
        data[pieces.offsets[name] : pieces.offsets[name] + array.nbytes] = np.ascontiguousarray(array).tobytes()
    for offset, block in pieces.metadata:
        data[offset : offset + len(block)] = block
    path.write_bytes(data)
    return path


# --- HDF5 that goes in circles


def message(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("<BHB", kind, len(body), 0) + body


def checked(data: bytes) -> bytes:
    return data + struct.pack("<I", lookup3(data))


def with_root(messages: list[bytes], *blocks: bytes) -> bytes:
    """Return a file whose root object has some messages, with blocks at 4096 and each a megabyte behind the last."""
    body = b"".join(messages)
    root = checked(b"OHDR" + bytes([2, 2]) + struct.pack("<I", len(body)) + body)
    assert 48 + len(root) <= 4096
    size = 4096 + (len(blocks) << 20)
    head = b"\x89HDF\r\n\x1a\n" + bytes([2, 8, 8, 0]) + struct.pack("<4Q", 0, (1 << 64) - 1, size, 48)
    return (checked(head) + root).ljust(4096, b"\0") + b"".join(blocks)


def continued(at: int) -> bytes:
    return message(0x10, struct.pack("<QQ", 4096 + (at << 20), 1 << 20))


def block_of(*messages: bytes) -> bytes:
    body = b"".join(messages)
    return checked((b"OCHK" + body + message(0) * ((1 << 18) - len(body) // 4))[: (1 << 20) - 4])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (with_root([continued(0)], block_of(continued(0))), "in use twice"),
        (with_root([continued(0)], block_of(*[continued(0)] * 2000)), "in use twice"),
        (with_root([continued(0)], block_of()), "messages"),
        (with_root([continued(at) for at in range(5)], *[block_of()] * 5), "bytes of metadata"),
    ],
)
def test_object_headers_without_end_are_refused_at_once(tmp_path: Path, data: bytes, error: str) -> None:
    (tmp_path / "s.h5").write_bytes(data)
    read = 0

    def counted(offset: int, length: int) -> bytes:
        nonlocal read
        read += length
        return data[offset : offset + length]

    started = time.perf_counter()
    with pytest.raises(LayoutError, match=error):
        read_layout(counted, len(data), checksums=True)
    assert read <= MAX_METADATA_BYTES + 4096 and time.perf_counter() - started < 10
    assert verify(tmp_path / "s.h5")
    for function in (Store.open, Store.status):
        with pytest.raises(StoreFormatError):
            function(tmp_path / "s.h5")


@pytest.mark.parametrize(("rows", "error"), [(8, "bytes of metadata"), (1, "block at 4096 is in use twice")])
def test_a_heap_of_links_is_read_once_and_not_when_it_is_large(rows: int, error: str) -> None:
    nowhere = (1 << 64) - 1
    heap = bytearray(146)
    heap[:10] = b"FRHP\0" + struct.pack("<HHB", 8, 0, 2)
    struct.pack_into("<Q", heap, 38, nowhere)
    struct.pack_into("<HQQH", heap, 110, 16, 1 << 16, 1 << 16, 32)
    struct.pack_into("<QH", heap, 132, 4096 + 256, rows)
    index = b"BTHD\0" + struct.pack("<BIHHBBQH", 5, 64, 11, 0, 0, 0, 4096 + 4096, 0)
    data = bytearray(with_root([message(2, bytes(2) + struct.pack("<QQ", 4096, 4096 + 2048))] * 100, bytes(1 << 20)))
    children = b"FHIB".ljust(17, b"\0") + struct.pack("<128Q", *[nowhere] * 128)
    for at, block in ((0, heap), (256, children), (2048, index), (4096, b"BTLF")):
        data[4096 + at : 4096 + at + len(block)] = block
    with pytest.raises(LayoutError, match=error):
        read_layout(lambda offset, length: bytes(data[offset : offset + length]), len(data))


def test_links_have_names_and_lie_at_depths_that_stores_have() -> None:
    def link(name: bytes, to: int) -> bytes:
        return message(6, bytes([1, 1]) + struct.pack("<H", len(name)) + name + struct.pack("<Q", to))

    for name in (b"", b"a/b", b"x" * 256, b"a\nerror: forged", b"\x1b[31m"):
        data = with_root([link(name, 4096)])
        with pytest.raises(LayoutError, match="names that stores do not have"):
            read_layout(lambda offset, length, data=data: data[offset : offset + length], len(data))
    data = bytearray(with_root([link(b"a", 4096)], bytes(1 << 20)))
    for number in range(8):
        body = link(b"a", 4096 + 64 * (number + 1))
        at = 4096 + 64 * number
        data[at : at + 14 + len(body)] = checked(b"OHDR" + bytes([2, 2]) + struct.pack("<I", len(body)) + body)
    with pytest.raises(LayoutError, match="3 deep"):
        read_layout(lambda offset, length: bytes(data[offset : offset + length]), len(data))


# --- Metadata


def nested(depth: int) -> str:
    text = canonical_json({"identity": SPEC.to_dict()})
    return text.replace('"arch_kwargs":{}', f'"arch_kwargs":{{"a":{"[" * depth}1{"]" * depth}}}')


LAYERS = {"identity": SPEC.to_dict(), "layers": {"": SPEC.to_dict()}}


@pytest.mark.parametrize(
    ("provenance", "error"),
    [
        (json.dumps({"identity": {**SPEC.to_dict(), "arch_kwargs": {"a": float("nan")}}}), "cannot be read"),
        (json.dumps({"identity": {**SPEC.to_dict(), "precision": float("inf")}}), "cannot be read"),
        (canonical_json({"identity": SPEC.to_dict()})[:-1] + ',"information":{"recipe":{"a":1e999}}}', "cannot be"),
        *[(nested(depth), "more than 64 deep") for depth in (100, 600, 900)],
        (canonical_json(LAYERS), "the layer ''"),
        (canonical_json(LAYERS).replace('"":', '"a/b":'), "the layer 'a/b'"),
        (canonical_json(LAYERS).replace('"":', f'"{"x" * 65}":'), "the layer 'xxx"),
        (canonical_json(LAYERS).replace('"":', '"a\\nerror: forged":'), r"the layer 'a\nerror: forged'"),
        (canonical_json(LAYERS).replace('"":', '"\\ud800":'), "cannot be read"),
        (canonical_json({"identity": {**SPEC.to_dict(), "a\nerror: forged": 1}}), r"'a\nerror: forged'"),
    ],
)
def test_provenance_that_no_writer_writes_is_refused(tmp_path: Path, provenance: str, error: str) -> None:
    path = make(tmp_path / "s.h5", provenance=provenance)
    for function in (Store.open, Store.status):
        with pytest.raises(StoreFormatError) as found:
            function(path)
        assert error in str(found.value) and "\n" not in str(found.value)
    assert [problem.where for problem in verify(path)] == ["metadata"]


@pytest.mark.parametrize("root", ["a\0b", "\ud800", 5, None])
def test_a_root_that_is_no_path_is_unknown(tmp_path: Path, root: Any) -> None:
    provenance = canonical_json({"identity": SPEC.to_dict(), "information": {"root": root}})
    store = Store.open(make(tmp_path / "s.h5", provenance=provenance))
    assert store.root is None and Index.build(store).search(0, 1).hits()[0].path is None


@pytest.mark.parametrize("content_id", ["\x1b[2Jx\nforged", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_a_content_id_is_64_digits(tmp_path: Path, content_id: str) -> None:
    path = make(tmp_path / "s.h5", attributes={"content_id": content_id})
    with pytest.raises(StoreFormatError, match="content_id is not 64 hexadecimal digits"):
        Store.open(path)
    assert verify(path)


# --- Columns


def test_what_is_made_here_is_a_store_when_nothing_is_replaced(tmp_path: Path) -> None:
    labels = {"labels": np.array([0, 1, -1], "<i4"), "label_names": np.array([b"a", b"b"])}
    path = make(tmp_path / "s.h5", {**labels, **failed(b"d.jpg", b"e.jpg")})
    assert verify(path) == [] and Store.open(path).summary()["rows"] == 3
    assert {failure.kind for failure in Store.open(path).failures} == {"unknown"}
    make(path, of_kinds(np.array([b"too-large", b"later~KIND/of.2030"])))
    assert verify(path) == []
    assert [failure.kind for failure in Store.open(path).failures] == ["too-large", "later~KIND/of.2030"]
    assert verify(make(path, {"x": np.array(1, "<i8"), "checksums/x": np.zeros((1, 32), "u1")})) == []


@pytest.mark.parametrize(
    ("columns", "where", "error"),
    [
        ({"sizes": None}, "metadata", "no dataset /sizes"),
        ({"embeddings": np.ones(3, "<f4")}, "metadata", "expected float rows"),
        ({"embeddings": np.array([[1, 1], [1, np.nan], [1, 1]], "<f4")}, "embeddings", "infinities or NaN"),
        ({"embeddings": np.array([[1, 1], [1, 1], [1, np.inf]], "<f2")}, "embeddings", "infinities or NaN"),
        ({"ids": IDS[::-1]}, "ids", "not sorted"),
        ({"ids": IDS[[0, 1, 1]]}, "ids", "not sorted by their bytes and unique"),
        ({"ids": np.array([b"", b"b", b"c"])}, "ids", "'' is not a path"),
        ({"ids": np.array([b"../a", b"b", b"c"])}, "ids", "'../a' is not a path"),
        ({"ids": np.array([b"a", b"b", b"c/.."])}, "ids", "'c/..' is not a path"),
        ({"ids": np.array([b"/etc/passwd", b"b", b"c"])}, "ids", "'/etc/passwd' is not a path"),
        ({"ids": np.array([b"a", b"b\0b", b"c"])}, "ids", r"'b\x00b' is not a path"),
        (failed(b"e.jpg", b"d.jpg"), "failures/ids", "not sorted"),
        (of_kinds(np.array([b"empty"])), "metadata", "/failures/kinds is |S5 of shape (1,) for 2 rows"),
        (of_kinds(np.array([b"empty"] * 2, "S33")), "metadata", "/failures/kinds is |S33 of shape (2,)"),
        (of_kinds(np.zeros(2, "u1")), "metadata", "/failures/kinds is uint8 of shape (2,)"),
        (failed(b"0.jpg", b"b.jpg", b"d.jpg"), "ids", "'b.jpg' is both a row and a failure"),
        ({"labels": np.array([0, 0, 1], "<i4"), "label_names": np.array([b"a"])}, "labels", "name none of 1 classes"),
        ({"labels": np.array([0, 0, -2], "<i4"), "label_names": np.array([b"a"])}, "labels", "name none of 1 classes"),
        ({"labels": np.array([0, 0, 1], "<i4"), "label_names": np.array([b"a", b"a"])}, "label_names", "unique"),
        ({"labels": np.array([0, 0, 0], "<i4"), "label_names": np.array([b"a", b"b"])}, "label_names", "no row"),
    ],
)
def test_columns_that_no_store_has_are_found(tmp_path: Path, columns: Any, where: str, error: str) -> None:
    problems = verify(make(tmp_path / "s.h5", columns))
    assert [problem.where for problem in problems] == [where] and error in str(problems[0])


@pytest.mark.parametrize("kind", [b"", b"a\0b", b"\xe9", "é".encode(), b"two words", b"a\nerror: forged", b"\x1b[31m"])
def test_a_kind_of_failure_is_a_word(tmp_path: Path, kind: bytes) -> None:
    path = make(tmp_path / "s.h5", of_kinds(np.array([b"empty", kind])))
    assert [str(problem) for problem in verify(path)] == [
        "failures/kinds: it has what is no kind: a word of 1 to 32 printable ASCII characters"
    ]
    store = Store.open(path)
    for read in (lambda: store.failures, store.summary):
        with pytest.raises(StoreFormatError, match="no kind; the file is damaged"):
            read()


@pytest.mark.parametrize("kinds", [np.array([b"two words"]), np.array([b"empty"] * 2)])
def test_a_part_with_other_kinds_is_set_aside(tmp_path: Path, kinds: Any) -> None:
    failures = Failures.of([ImageError("d.jpg", "the file is empty", "empty")], [0], [0])
    rows = Rows(Images.empty(), failures, {"": np.empty((0, 2), "<f4")})
    path = write_part(tmp_path, 0, SPEC.digest, "r", rows)
    assert list(read_parts(tmp_path, SPEC.digest)) == [path.name]
    path = write_part(tmp_path, 1, SPEC.digest, "r", replace(rows, failures=replace(failures, kinds=kinds)))
    assert len(read_parts(tmp_path, SPEC.digest)) == 1 and (tmp_path / f"{path.name}.bad").exists()


def test_a_class_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    columns = {"labels": np.array([0, 0, 1], "<i4"), "label_names": np.array([b"a", b"a"])}
    for read in (Store.summary, Store.class_counts):
        with pytest.raises(StoreFormatError, match="a name twice"):
            read(Store.open(make(tmp_path / "s.h5", columns)))


def test_ids_are_compared_across_the_blocks_that_they_are_read_in(tmp_path: Path) -> None:
    count = 140_000

    def problems(ids: list[bytes], *failures: bytes) -> list[str]:
        columns = {
            "embeddings": np.ones((count, 1), "<f4"), "ids": np.array(ids), "sizes": np.zeros(count, "<u8"),
            "mtimes_ns": np.zeros(count, "<i8"), "content_sha256": np.zeros((count, 32), "u1"), **failed(*failures),
        }  # fmt: skip
        narrow = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=1)
        return [problem.error for problem in verify(make(tmp_path / "s.h5", columns, spec=narrow))]

    ids = [b"%06d" % number for number in range(count)]
    assert problems(ids, b"000000x", b"065536x", b"999999") == []
    assert "not sorted" in problems([*ids[:65536], ids[65535], *ids[65537:]])[0]
    assert problems(ids, b"000000x", b"065536") == ["'065536' is both a row and a failure"]
    assert problems(ids, b"139999", b"999999") == ["'139999' is both a row and a failure"]


def test_blocks_of_checksums_are_of_4096_rows(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5", block_rows=1)
    assert [problem.where for problem in verify(path)] == ["embeddings"]
    assert "expected (4096, (1, 32), '|u1')" in str(verify(path)[0])


def overlapping(path: Path) -> Path:
    """Make the sizes lie where the times do, with checksums of metadata that match."""
    data = bytearray(make(path).read_bytes())
    layout = read_layout(lambda start, length: bytes(data[start : start + length]), len(data))
    sizes, times = (struct.pack("<QQ", layout.datasets[name].offset, 24) for name in ("sizes", "mtimes_ns"))
    at = data.index(sizes)
    data[at : at + 16] = times
    start, stop = next(block for block in layout.blocks if block[0] <= at < block[1])
    data[stop - 4 : stop] = struct.pack("<I", lookup3(bytes(data[start : stop - 4])))
    path.write_bytes(data)
    return path


def test_parts_of_a_file_that_overlap_are_not_hashed(tmp_path: Path) -> None:
    calls: list[int] = []
    problems = verify(overlapping(tmp_path / "s.h5"), progress=lambda done, total: calls.append(done))
    assert "two parts of the file claim byte" in str(problems[0]) and len(problems) == 1 and not calls


def test_a_store_of_nan_is_searched_in_vain_with_an_error(tmp_path: Path) -> None:
    path = make(tmp_path / "s.h5", {"embeddings": np.full((3, 2), np.nan, "<f4")})
    searches: list[Callable[[], Any]] = [
        lambda: Index.build(path).search(0, 2), lambda: Index.build(path).search(np.ones(2), 2),
    ]  # fmt: skip
    for search in searches:
        with pytest.raises(StoreFormatError, match=r"s\.h5 has embeddings that are not finite.*embedkit verify"):
            search()
