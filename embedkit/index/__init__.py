"""Nearest neighbours over a store; the only room that uses FAISS."""

from embedkit.index.choosing import Measurement
from embedkit.index.clusters import Clusters, cluster
from embedkit.index.duplicates import Duplicates, Leaks, find_duplicates, find_leaks
from embedkit.index.exact import METRICS, Gallery
from embedkit.index.files import is_index, require_place
from embedkit.index.neighbours import Index
from embedkit.index.outliers import Outliers, find_outliers
from embedkit.index.page import search_page
from embedkit.index.pictures import image_path, read_picture
from embedkit.index.results import SCORE_NAMES, Hit, SearchResult
from embedkit.index.retrieval import RetrievalReport, retrieval_report

__all__ = [
    "METRICS", "SCORE_NAMES", "Clusters", "Duplicates", "Gallery", "Hit", "Index", "Leaks", "Measurement", "Outliers",
    "RetrievalReport", "SearchResult", "cluster", "find_duplicates", "find_leaks", "find_outliers", "image_path",
    "is_index", "read_picture", "require_place", "retrieval_report", "search_page",
]  # fmt: skip
