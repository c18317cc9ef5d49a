"""Images that a table names."""

from embedkit.sources.tables.manifests import list_manifest, manifest_parts
from embedkit.sources.tables.rows import TABLES

__all__ = ["TABLES", "list_manifest", "manifest_parts"]
