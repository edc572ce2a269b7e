"""Runs side by side: read, compared, shown."""

from experiment.compare.command import main
