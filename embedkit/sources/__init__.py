"""Where images are, what they are called, and what their classes are."""

from embedkit.sources.archives import ARCHIVE_SUFFIXES, find_entry, list_archive
from embedkit.sources.choosing import choose, join
from embedkit.sources.datasets import is_dataset_folder, list_dataset
from embedkit.sources.entries import Entries, Entry, ImageFile, Listing, content_sha256, inside, status_of
from embedkit.sources.filelists import list_files, list_named
from embedkit.sources.folders import SUFFIXES, list_folder
from embedkit.sources.memory import list_memory
from embedkit.sources.opening import list_images
from embedkit.sources.patterns import expand
from embedkit.sources.remote import list_remote, open_remote
from embedkit.sources.remote.transfers import Patience, public_url
from embedkit.sources.tables import list_manifest
from embedkit.sources.videos import VIDEO_SUFFIXES, list_video, list_videos

__all__ = [
    "ARCHIVE_SUFFIXES",
    "SUFFIXES",
    "VIDEO_SUFFIXES",
    "Entries",
    "Entry",
    "ImageFile",
    "Listing",
    "Patience",
    "choose",
    "content_sha256",
    "expand",
    "find_entry",
    "inside",
    "is_dataset_folder",
    "join",
    "list_archive",
    "list_dataset",
    "list_files",
    "list_folder",
    "list_images",
    "list_manifest",
    "list_memory",
    "list_named",
    "list_remote",
    "list_video",
    "list_videos",
    "open_remote",
    "public_url",
    "status_of",
]
