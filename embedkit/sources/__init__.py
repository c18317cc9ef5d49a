"""Where images are, what they are called, and what their classes are."""

from embedkit.sources.entries import Entries, Entry, ImageFile, Listing, content_sha256, inside, status_of
from embedkit.sources.filelists import list_files, list_named
from embedkit.sources.folders import SUFFIXES, list_folder

__all__ = [
    "SUFFIXES",
    "Entries",
    "Entry",
    "ImageFile",
    "Listing",
    "content_sha256",
    "inside",
    "list_files",
    "list_folder",
    "list_named",
    "status_of",
]
