"""Images that are there more than once, in one store or in two."""

from embedkit.index.duplicates.groups import Duplicates, Group, Member, find_duplicates
from embedkit.index.duplicates.leaks import Leaks, find_leaks

__all__ = ["Duplicates", "Group", "Leaks", "Member", "find_duplicates", "find_leaks"]
