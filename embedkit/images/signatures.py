"""What a file is that is no image to read, by its content: names lie, above all in web crawls."""

from __future__ import annotations

import re
import zlib

HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}

_PREVIEW = "a camera's raw file, of which only a preview could be read; develop it first"
_SVG = "an SVG drawing, which has no pixels of its own; convert it first"
_VIDEO = "not an image but a video; embed frames of it"
_LFS = "not an image but a Git LFS pointer: the file itself was never fetched; run git lfs pull"
# Kind, what it is, and how it begins.
_BEGINNINGS: tuple[tuple[str, str, tuple[bytes, ...]], ...] = (
    ("unsupported", "a PDF document; convert its pages first", (b"%PDF-",)),
    ("unsupported", "a PostScript drawing, which has no pixels of its own; convert it first",
     (b"%!PS", b"\xc5\xd0\xd3\xc6", b"\x04%!PS")),
    ("unsupported", _PREVIEW, (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM")),
    ("unsupported", "a Windows metafile, a drawing without pixels of its own; convert it first",
     (b"\xd7\xcd\xc6\x9a", b"\x01\0\0\0\x6c\0\0\0", b"\x01\0\x09\0\0\x03", b"\x02\0\x09\0\0\x03")),
    ("unsupported", "an OpenEXR image, whose light has no upper end; tone-map it first", (b"\x76\x2f\x31\x01",)),
    ("unsupported", "a Radiance image, whose light has no upper end; tone-map it first", (b"#?RADIANCE", b"#?RGBE")),
    ("unsupported", "a GIMP project; export it first", (b"gimp xcf",)),
    ("unsupported", "a FITS file of measurements, which has no black and white; convert it first", (b"SIMPLE  =",)),
    ("unsupported", "a DjVu document; convert its pages first", (b"AT&TFORM",)),
    ("unsupported", "a JPEG XR image, which nothing here reads; convert it first", (b"II\xbc\x01",)),
    ("unsupported", "a BPG image, which nothing here reads; convert it first", (b"BPG\xfb",)),
    ("not-an-image", _VIDEO, (b"\x1a\x45\xdf\xa3", b"FLV\x01", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"OggS",
                              b"\x30\x26\xb2\x75\x8e\x66\xcf\x11")),
    ("not-an-image", "not an image but a sound", (b"ID3", b"fLaC")),
    ("not-an-image", _LFS, (b"version https://git-lfs.github.com/spec/",)),
    ("not-an-image", "not an image but a ZIP archive or an office document", (b"PK\x03\x04", b"PK\x05\x06")),
    ("not-an-image", "not an image but an archive",
     (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")),
    ("not-an-image", "not an image but an old office document", (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",)),
    ("not-an-image", "not an image but an HDF5 file", (b"\x89HDF\r\n\x1a\n",)),
    ("not-an-image", "not an image but a program", (b"\x7fELF", b"MZ\x90\0")),
    ("not-an-image", "not an image but a database", (b"SQLite format 3\0",)),
    ("not-an-image", "not an image but a macOS companion file", (b"\0\x05\x16\x07", b"\0\x05\x16\0")),
)  # fmt: skip
_COMMENTS = re.compile(r"\s*(<\?.*?\?>|<!--.*?-->|<!doctype\s+svg[^\[>]*(\[.*?\])?[^>]*>)", re.DOTALL | re.IGNORECASE)
_SVG_TAG = re.compile(r"\s*<(\w+:)?svg[\s>/]", re.IGNORECASE)
_HTML_TAG = re.compile(r"\s*<(!doctype\s+html|html|head|body|script|meta|title|div|p|h1|center)\b", re.IGNORECASE)
_HEAD = 65536


def recognise(data: bytes) -> tuple[str, str] | None:
    """Return why a file is no image to read, and the kind of that failure; None for bytes that say nothing.

    Examples
    --------
    >>> from embedkit.images.signatures import recognise
    >>> recognise(b"<!DOCTYPE html><title>404</title>")
    ('not an image but a web page: the download failed', 'not-an-image')
    """
    for kind, what, beginnings in _BEGINNINGS:
        if data.startswith(beginnings):
            return what, kind
    if data[4:8] == b"ftyp":
        return (_PREVIEW, "unsupported") if data[8:11] == b"crx" else (_VIDEO, "not-an-image")
    if data[:2] in (b"II", b"MM") and data[8:10] == b"CR":
        return _PREVIEW, "unsupported"
    if data[:4] == b"RIFF" and data[8:12] != b"WEBP":
        return ("not an image but a sound" if data[8:12] == b"WAVE" else _VIDEO), "not-an-image"
    if data[128:132] == b"DICM":
        return (
            "a DICOM file of measurements, which says itself what is black and white; convert it first",
            "unsupported",
        )
    if data[257:262] == b"ustar":
        return "not an image but a tar archive", "not-an-image"
    if data[:2] == b"\x1f\x8b":
        return _gzipped(data)
    if not data[:_HEAD].strip(b"\0"):
        return "not an image but zero bytes only, as interrupted downloads leave them", "not-an-image"
    return _written(data[:_HEAD])


def brands_of(data: bytes) -> set[bytes]:
    """Return the brands of an ISO file, such as HEIC, AVIF and MP4 are; empty for all else."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 1024, len(data))
    return {data[8:12]} | {data[at : at + 4] for at in range(16, end, 4)}


def _gzipped(data: bytes) -> tuple[str, str]:
    try:
        inside = zlib.decompressobj(31).decompress(data, _HEAD)
    except zlib.error:
        inside = b""
    found = _written(inside)
    return found if found is not None and found[0] == _SVG else ("not an image but a gzip archive", "not-an-image")


def _written(head: bytes) -> tuple[str, str] | None:
    """Say what a text is."""
    text = _text(head)
    if text is None:
        return None
    while (comment := _COMMENTS.match(text)) is not None:
        text = text[comment.end() :]
    if _SVG_TAG.match(text):
        return _SVG, "unsupported"
    if _HTML_TAG.match(text):
        return "not an image but a web page: the download failed", "not-an-image"
    what = "an XML document" if text.lstrip().startswith("<") else "a text"
    return f"not an image but {what}", "not-an-image"


def _text(head: bytes) -> str | None:
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = head.decode(encoding, errors="ignore")
    # Text has no control characters, and nearly all of its bytes belong to some character.
    if not text.strip() or len(text.encode(encoding)) < 0.9 * len(head):
        return None
    return None if any(sign < " " and sign not in "\t\n\r\f\x1b" for sign in text) else text
