"""Evaluation: what embeddings are worth, measured by fixed protocols over stores."""

from embedkit.evaluation.comparing import Comparison, compare, compare_all, comparison_table
from embedkit.evaluation.fitted import FittedHead
from embedkit.evaluation.probing import probe
from embedkit.evaluation.protocols import PROTOCOLS, Protocol
from embedkit.evaluation.reports import Report
from embedkit.evaluation.splits import Split

__all__ = [
    "PROTOCOLS",
    "Comparison",
    "FittedHead",
    "Protocol",
    "Report",
    "Split",
    "compare",
    "compare_all",
    "comparison_table",
    "probe",
]
