"""Runs side by side: read, compared, shown."""

from experiment.report.comparison import compare, main

__all__ = ["compare", "main"]
