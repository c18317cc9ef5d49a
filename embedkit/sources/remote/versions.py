"""Versions of objects, by which an update knows that one has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

# What places call the version of an object; two versions differ in one of these at least.
_NAMES = (
    "ETag", "etag", "e_tag", "LastModified", "last_modified", "Last-Modified", "mtime", "updated", "modified",
    "created", "modificationTime", "timeModified", "generation", "md5Hash", "crc32c", "content_md5", "Content-MD5",
    "Digest", "checksum", "blob_id", "oid", "sha", "VersionId",
)  # fmt: skip


def stamp_of(info: Mapping[str, Any]) -> int:
    """Return a number that stands for the version of an object, or 0 where its place says nothing of versions.

    Examples
    --------
    >>> from embedkit.sources.remote.versions import stamp_of
    >>> stamp_of({"ETag": "1"}) == stamp_of({"ETag": "2"}), stamp_of({"name": "1.jpg"})
    (False, 0)
    """
    version = [f"{name}={info[name]}" for name in _NAMES if info.get(name) is not None]
    if not version:
        return 0
    return int.from_bytes(hashlib.sha256("\n".join(version).encode()).digest()[:8], "big") >> 1
