"""A grid of runs from one file: planned, started, resumed."""

from experiment.study.command import main
from experiment.study.plan import PlannedRun, is_locked, read_study
