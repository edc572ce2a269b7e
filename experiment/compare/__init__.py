"""Comparison of runs: tables, notes, figures and a page."""

from experiment.compare.command import main
