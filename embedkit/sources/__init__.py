"""Where images are, what they are called, and what their classes are."""

from embedkit.sources.choosing import choose, join
from embedkit.sources.entries import Entries, Entry, ImageFile, Listing, content_sha256, inside, status_of
from embedkit.sources.filelists import list_files, list_named
from embedkit.sources.folders import SUFFIXES, list_folder
from embedkit.sources.manifests import list_manifest
from embedkit.sources.opening import list_images

__all__ = [
    "SUFFIXES",
    "Entries",
    "Entry",
    "ImageFile",
    "Listing",
    "choose",
    "content_sha256",
    "inside",
    "join",
    "list_files",
    "list_folder",
    "list_images",
    "list_manifest",
    "list_named",
    "status_of",
]
