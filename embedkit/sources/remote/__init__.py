"""Images behind URLs."""

from embedkit.sources.remote.listing import list_remote, open_remote
from embedkit.sources.remote.transfers import Patience, is_remote, public_url

__all__ = ["Patience", "is_remote", "list_remote", "open_remote", "public_url"]
