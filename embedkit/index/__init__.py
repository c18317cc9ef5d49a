"""Nearest neighbours over a store; the only room that uses FAISS."""

from embedkit.index.exact import METRICS, Gallery
from embedkit.index.neighbours import Index
from embedkit.index.page import search_page
from embedkit.index.pictures import image_path, read_picture
from embedkit.index.results import Hit, SearchResult

__all__ = ["METRICS", "Gallery", "Hit", "Index", "SearchResult", "image_path", "read_picture", "search_page"]
