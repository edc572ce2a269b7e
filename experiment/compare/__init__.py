"""Runs side by side: read, compared, shown."""

from experiment.compare.command import compare, main

__all__ = ["compare", "main"]
