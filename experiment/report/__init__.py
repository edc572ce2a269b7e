"""Runs side by side: started as a grid, read, compared, shown."""

from experiment.report.compare import compare
from experiment.report.compare import main as compare_main
from experiment.report.study import main as study_main

__all__ = ["compare", "compare_main", "study_main"]
