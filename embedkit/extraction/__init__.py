"""extraction: images and a backbone become a store."""

from embedkit.extraction.estimating import Estimate, estimate
from embedkit.extraction.extracting import extract, listed
from embedkit.extraction.flow import Embedded, embed_batches
from embedkit.extraction.progress import Measured, Progress

__all__ = ["Embedded", "Estimate", "Measured", "Progress", "embed_batches", "estimate", "extract", "listed"]
