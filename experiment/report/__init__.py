"""Runs side by side: started as a grid, read, compared, shown."""

from experiment.report.comparison import compare, main
from experiment.report.study import main as study_main

__all__ = ["compare", "main", "study_main"]
