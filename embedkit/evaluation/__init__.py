"""Evaluation: what embeddings are worth, measured by fixed protocols over stores."""

from embedkit.evaluation.benching import run_suite
from embedkit.evaluation.cells import Cell
from embedkit.evaluation.comparing import Comparison, compare, compare_all, comparison_table
from embedkit.evaluation.fitted import FittedHead
from embedkit.evaluation.predicting import predict
from embedkit.evaluation.probing import probe
from embedkit.evaluation.protocols import PROTOCOLS, Protocol
from embedkit.evaluation.reports import Report
from embedkit.evaluation.splits import Split
from embedkit.evaluation.suites import Suite, read_suite

__all__ = [
    "PROTOCOLS",
    "Cell",
    "Comparison",
    "FittedHead",
    "Protocol",
    "Report",
    "Split",
    "Suite",
    "compare",
    "compare_all",
    "comparison_table",
    "predict",
    "probe",
    "read_suite",
    "run_suite",
]
