"""extraction: images and a backbone become a store."""

from embedkit.extraction.extracting import extract
from embedkit.extraction.progress import Measured, Progress

__all__ = ["Measured", "Progress", "extract"]
