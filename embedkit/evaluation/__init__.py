"""Evaluation: what embeddings are worth, measured by fixed protocols over stores."""

from embedkit.evaluation.probing import PROTOCOLS, Protocol, probe
from embedkit.evaluation.reports import Report
from embedkit.evaluation.splits import Split

__all__ = ["PROTOCOLS", "Protocol", "Report", "Split", "probe"]
