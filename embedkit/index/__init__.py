"""Nearest neighbours over a store; the only room that uses FAISS."""

from embedkit.index.neighbours import Hit, Index, SearchResult, image_path
from embedkit.index.page import search_page

__all__ = ["Hit", "Index", "SearchResult", "image_path", "search_page"]
