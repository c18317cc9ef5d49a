"""What an HDF5 file says of itself, read in plain Python.

Stores come from strangers, and a damaged or hostile file can hang or crash the HDF5 library with the process around
it. So the library only writes stores. Reading needs little: where each dataset lies, its type and shape, and short
attributes. This module reads that little from the subset of the format that stores are written in, checks each offset
against the file before it follows it, and takes everything else for damage. After the HDF5 File Format
Specification 3.0, whose names it uses (https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

UNDEFINED = (1 << 64) - 1
# Far more than a store with every layer has, and little enough to read in a moment.
MAX_OBJECTS = 256
MAX_MESSAGES = 1 << 14
MAX_DEPTH = 3
MAX_NAME_BYTES = 255
MAX_METADATA_BYTES = 4 << 20

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_DATASPACE, _LINK_INFO, _DATATYPE, _EXTERNAL, _LINK, _LAYOUT = 0x01, 0x02, 0x03, 0x07, 0x06, 0x08
_FILTERS, _ATTRIBUTE, _CONTINUATION, _ATTRIBUTE_INFO = 0x0B, 0x0C, 0x10, 0x15
_LINK_NAME_INDEX = 5


class LayoutError(ValueError):
    """The bytes are not HDF5, or not the part of it that stores are written in."""


@dataclass(frozen=True)
class Dataset:
    """Where a contiguous dataset lies in the file, and what its bytes mean."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: Mapping[str, int | str]

    @property
    def nbytes(self) -> int:
        """Extent in the file, in bytes."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Layout:
    """The datasets of a file by path, the attributes of its root, and every metadata block as (start, end)."""

    datasets: Mapping[str, Dataset]
    attributes: Mapping[str, int | str]
    blocks: tuple[tuple[int, int], ...]


def read_layout(read: Callable[[int, int], bytes], size: int, *, checksums: bool = False) -> Layout:
    """Read what a file says of itself.

    Whatever the file says, no block is read twice, no more than 4 MiB of metadata are read in all, and no more than
    16,384 messages. So time and memory are bounded for a file of any size: tens of megabytes and a fraction of a
    second, with checksums a few seconds.

    Parameters
    ----------
    read : callable
        ``read(offset, length)`` returns bytes of the file.
    size : int
        Bytes in the file.
    checksums : bool, default False
        Whether the checksum of every metadata block is verified. That takes milliseconds, the rest a fraction of one.

    Raises
    ------
    LayoutError
        When anything is not as it should be.
    """
    try:
        return _Reader(read, size, checksums).layout()
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise LayoutError(f"its metadata is damaged: {error}") from error


class _Reader:
    def __init__(self, read: Callable[[int, int], bytes], size: int, checksums: bool) -> None:
        self.read, self.size, self.checksums = read, size, checksums
        self.blocks: list[tuple[int, int]] = []
        self.starts: set[int] = set()
        self.left, self.messages_left = MAX_METADATA_BYTES, MAX_MESSAGES
        self.headers: set[int] = set()
        self.datasets: dict[str, Dataset] = {}

    def layout(self) -> Layout:
        if self.read(0, 8) != _SIGNATURE:
            raise LayoutError("it is not an HDF5 file")
        superblock = self.block(0, 48, b"\x89HDF")
        version, offsets, lengths, _, base, _, end, root = struct.unpack_from("<4B4Q", superblock, 8)
        if version not in (2, 3) or (offsets, lengths, base) != (8, 8, 0):
            raise LayoutError(f"its superblock has version {version}, expected 2 or 3 with 8-byte offsets")
        if end != self.size:
            raise LayoutError(f"it should have {end:,} bytes and has {self.size:,}: truncated, or appended to")
        attributes = self.walk(root, "")
        return Layout(self.datasets, attributes, tuple(sorted(self.blocks)))

    def block(self, start: int, length: int, signature: bytes, checksum_at: int | None = None) -> bytes:
        """Return one metadata block; its checksum covers what stands before it, in a heap's block what follows too."""
        if length < 4 or start + length > self.size:
            raise LayoutError(f"a metadata block at {start} of {length} bytes lies outside the file")
        if start in self.starts:
            raise LayoutError(f"the metadata block at {start} is in use twice")
        self.starts.add(start)
        self.take(length)
        data = self.read(start, length)
        if len(data) != length or data[:4] != signature:
            raise LayoutError(f"expected {signature!r} at byte {start}, found {data[:4]!r}")
        if self.checksums:
            at = length - 4 if checksum_at is None else checksum_at
            covered = data[:at] + bytes(4) + data[at + 4 :] if signature == b"FHDB" else data[:at]
            if lookup3(covered) != _u32(data, at):
                raise LayoutError(f"the metadata at bytes {start}:{start + length} does not match its checksum")
        # What lies behind the checksum of a block is empty, and verified to be so like every other gap.
        end = length if checksum_at is None or signature == b"FHDB" else checksum_at + 4
        self.blocks.append((start, start + end))
        return data

    def take(self, length: int) -> None:
        """Account for metadata in memory."""
        self.left -= length
        if self.left < 0:
            raise LayoutError(f"it has more than {MAX_METADATA_BYTES:,} bytes of metadata, stores have far fewer")

    def walk(self, address: int, path: str) -> dict[str, int | str]:
        """Read the object at an address and everything linked below it, and return its attributes."""
        if address in self.headers or len(self.headers) >= MAX_OBJECTS:
            raise LayoutError(f"/{path} is linked twice, or the file has more than {MAX_OBJECTS} objects")
        self.headers.add(address)
        attributes: dict[str, int | str] = {}
        links: list[tuple[str, int]] = []
        parts: dict[int, bytes] = {}
        for kind, body in self.messages(address):
            if kind == _ATTRIBUTE:
                name, value = _attribute(body)
                attributes[name] = value
            elif kind == _LINK:
                links.append(_link(body))
            elif kind == _LINK_INFO:
                links.extend(self.dense_links(body))
            elif kind == _ATTRIBUTE_INFO:
                if struct.unpack_from("<Q", body, 4 if body[1] & 1 else 2)[0] != UNDEFINED:
                    raise LayoutError(f"/{path} keeps its attributes in a heap")
            elif kind in (_EXTERNAL, _FILTERS):
                raise LayoutError(f"/{path} is compressed, or lies in another file")
            else:
                parts[kind] = body
        if _LAYOUT in parts:
            self.datasets[path] = self.dataset(path, parts, attributes)
        if links and path.count("/") >= MAX_DEPTH - 1:
            raise LayoutError(f"its groups lie more than {MAX_DEPTH} deep")
        for name, target in links:
            self.walk(target, f"{path}/{name}" if path else name)
        return attributes

    def messages(self, address: int) -> Iterator[tuple[int, bytes]]:
        """Yield type and body of every message of an object header, through its continuation blocks."""
        prefix = self.read(address, 34)
        if prefix[:4] != b"OHDR" or prefix[4] != 2:
            raise LayoutError(f"expected an object header at byte {address}")
        flags = prefix[5]
        start = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        length = int.from_bytes(prefix[start : start + width], "little")
        pending = [(self.block(address, start + width + length + 4, b"OHDR"), start + width)]
        head = 6 if flags & 4 else 4
        while pending:
            data, at = pending.pop()
            while at + head <= len(data) - 4:
                kind, size, shared = struct.unpack_from("<BHB", data, at)
                body = data[at + head : at + head + size]
                at += head + size
                if at > len(data) - 4 or shared & 2:
                    raise LayoutError(f"a message of the object header at byte {address} is damaged or shared")
                self.messages_left -= 1
                if self.messages_left < 0:
                    raise LayoutError(f"its object headers have more than {MAX_MESSAGES:,} messages")
                if kind == _CONTINUATION:
                    start, size = struct.unpack("<QQ", body)
                    pending.append((self.block(start, size, b"OCHK"), 4))
                else:
                    yield kind, body

    def dataset(self, path: str, parts: dict[int, bytes], attributes: dict[str, int | str]) -> Dataset:
        layout = parts[_LAYOUT]
        if layout[0] not in (3, 4) or layout[1] != 1:
            raise LayoutError(f"/{path} is not contiguous")
        if _DATASPACE not in parts or _DATATYPE not in parts:
            raise LayoutError(f"/{path} has no shape or no type")
        offset, length = struct.unpack_from("<QQ", layout, 2)
        dataset = Dataset(offset, _shape(parts[_DATASPACE]), _dtype(parts[_DATATYPE]), attributes)
        if dataset.nbytes != length or (length and offset + length > self.size):
            raise LayoutError(f"/{path} of shape {dataset.shape} lies outside the file or has another extent")
        return dataset if length else Dataset(0, dataset.shape, dataset.dtype, attributes)

    def dense_links(self, info: bytes) -> Iterator[tuple[str, int]]:
        """Yield the links of a group that has more than eight: a name index over a heap of link messages."""
        heap_at, index_at = struct.unpack_from("<QQ", info, 10 if info[1] & 1 else 2)
        if heap_at == UNDEFINED:
            return
        heap, offset_width, length_width = self.heap(heap_at)
        header = self.block(index_at, 38, b"BTHD")
        kind, node_size, record_size, depth, _, _, root, count = struct.unpack_from("<BIHHBBQH", header, 5)
        if kind != _LINK_NAME_INDEX or depth != 0 or count > MAX_OBJECTS or count * record_size + 10 > node_size:
            raise LayoutError("a group has more links than stores have")
        leaf = self.block(root, node_size, b"BTLF", 6 + count * record_size)
        for number in range(count):
            record = 6 + number * record_size + 4  # The hash of the name comes first.
            if leaf[record] & 0x30:
                raise LayoutError("a link lies outside its heap")
            at = record + 1
            offset = int.from_bytes(leaf[at : at + offset_width], "little")
            length = int.from_bytes(leaf[at + offset_width : at + offset_width + length_width], "little")
            yield _link(heap[offset : offset + length])

    def heap(self, address: int) -> tuple[bytes, int, int]:
        """Return a fractal heap as one string of bytes, and the widths of offsets and lengths into it."""
        header = self.block(address, 146, b"FRHP")
        filters, flags, largest = struct.unpack_from("<HBI", header, 7)
        free_at = struct.unpack_from("<Q", header, 38)[0]
        width, first, direct, bits = struct.unpack_from("<HQQH", header, 110)
        root, rows = struct.unpack_from("<QH", header, 132)
        if filters or not flags & 2 or not 0 < width <= 16 or not 0 < first <= direct <= 1 << 16 or rows > 8:
            raise LayoutError("a heap of links is compressed, or larger than stores have")
        offset_width = (bits + 7) // 8
        length_width = min((direct.bit_length() + 7) // 8, (largest.bit_length() + 7) // 8)
        if free_at != UNDEFINED:
            self.free_space(free_at)
        checksum_at = 13 + offset_width
        if rows == 0:
            return self.block(root, first, b"FHDB", checksum_at), offset_width, length_width
        children = struct.unpack_from(
            f"<{rows * width}Q", self.block(root, 17 + offset_width + 8 * rows * width, b"FHIB"), 13 + offset_width
        )
        heap = b""
        for number, child in enumerate(children):
            length = first << max(0, number // width - 1)
            if child == UNDEFINED:
                self.take(length)
                heap += bytes(length)
            else:
                heap += self.block(child, length, b"FHDB", checksum_at)
        return heap, offset_width, length_width

    def free_space(self, address: int) -> None:
        """Account for the blocks that say where a heap is empty; their contents matter to writers only."""
        header = self.block(address, 82, b"FSHD")
        sections, used, allocated = struct.unpack_from("<QQQ", header, 54)
        if sections != UNDEFINED and allocated:
            self.block(sections, allocated, b"FSSE", used - 4)


def _link(body: bytes) -> tuple[str, int]:
    """Return name and target of a hard link; other links could lead out of the file."""
    flags, at = body[1], 2
    if body[0] != 1 or (flags & 8 and body[2] != 0):
        raise LayoutError("it has links that are not hard links")
    at += (1 if flags & 8 else 0) + (8 if flags & 4 else 0) + (1 if flags & 16 else 0)
    width = 1 << (flags & 3)
    length = int.from_bytes(body[at : at + width], "little")
    at += width
    name = body[at : at + length].decode("utf-8")
    if not 0 < length <= MAX_NAME_BYTES or "/" in name or not name.isprintable():
        raise LayoutError(f"it has links with names that stores do not have, such as {name[:64]!r}")
    return name, struct.unpack_from("<Q", body, at + length)[0]


def _shape(body: bytes) -> tuple[int, ...]:
    version, rank, _, kind = struct.unpack_from("<4B", body)
    if version != 2 or rank > 2 or kind > 1:
        raise LayoutError("it has a dataset or an attribute of a shape that stores do not have")
    return struct.unpack_from(f"<{rank}Q", body, 4)


def _dtype(body: bytes) -> np.dtype[Any]:
    kind, bits, size = body[0] & 15, body[1], _u32(body, 4)
    little_endian = bits & 1 == 0
    if kind == 0 and little_endian and size in (1, 2, 4, 8):
        return np.dtype(f"<{'i' if bits & 8 else 'u'}{size}")
    if kind == 1 and little_endian and size in (2, 4, 8):
        return np.dtype(f"<f{size}")
    if kind == 3 and 0 < size <= 1 << 16:
        return np.dtype(f"S{size}")
    raise LayoutError("it has values of a type that stores do not have")


def _attribute(body: bytes) -> tuple[str, int | str]:
    """Return name and value of an attribute: a scalar integer or a text of fixed length."""
    version, flags, *sizes = struct.unpack_from("<BBHHH", body)
    if version != 3 or flags:
        raise LayoutError("it has attributes of a version that stores do not have")
    ends = [9]
    for size in sizes:
        ends.append(ends[-1] + size)
    name = body[ends[0] : ends[1]].rstrip(b"\0").decode("utf-8")
    dtype, shape = _dtype(body[ends[1] : ends[2]]), _shape(body[ends[2] : ends[3]])
    if shape or dtype.kind not in "iuS":
        raise LayoutError(f"its attribute {name!r} is neither an integer nor a text of fixed length")
    raw = body[ends[3] : ends[3] + dtype.itemsize]
    if dtype.kind == "S":
        return name, raw.rstrip(b"\0").decode("utf-8")
    return name, int.from_bytes(raw, "little", signed=dtype.kind == "i")


def _u32(data: bytes, at: int) -> int:
    value: int = struct.unpack_from("<I", data, at)[0]
    return value


def lookup3(data: bytes) -> int:
    """Return Bob Jenkins' hash ``hashlittle`` of some bytes, the checksum of HDF5's metadata (lookup3.c, 2006)."""
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask
    words = struct.unpack(f"<{(len(data) + 11) // 12 * 3}I", data + bytes(-len(data) % 12))
    for at in range(0, len(words), 3):
        a, b, c = (a + words[at]) & mask, (b + words[at + 1]) & mask, (c + words[at + 2]) & mask
        if at + 3 < len(words):
            for by in (4, 6, 8, 16, 19, 4):
                a = ((a - c) & mask) ^ (c << by & mask | c >> (32 - by))
                a, b, c = b, (c + b) & mask, a
    if data:
        for by in (14, 11, 25, 16, 4, 14, 24):
            c = ((c ^ b) - (b << by & mask | b >> (32 - by))) & mask
            a, b, c = b, c, a
    return b if data else c
