"""Diagnosis: what this machine has, whether embedkit works on it, and what to do where it does not."""

from embedkit.diagnosis.examination import examine
from embedkit.diagnosis.findings import Finding

__all__ = ["Finding", "examine"]
