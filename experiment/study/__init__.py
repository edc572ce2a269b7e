"""Studies: grids of runs, defined in a TOML file, that are started and resumed together."""

from experiment.study.command import main
from experiment.study.plan import PlannedRun, is_locked, read_study
