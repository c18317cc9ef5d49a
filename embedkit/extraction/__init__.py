"""extraction: images and a backbone become a store."""

from embedkit.extraction.estimating import Estimate, estimate
from embedkit.extraction.extracting import extract
from embedkit.extraction.progress import Measured, Progress

__all__ = ["Estimate", "Measured", "Progress", "estimate", "extract"]
