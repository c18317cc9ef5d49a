"""Images in tar and zip archives, read in place."""

from embedkit.sources.archives.listing import ARCHIVE_SUFFIXES, find_entry, list_archive

__all__ = ["ARCHIVE_SUFFIXES", "find_entry", "list_archive"]
