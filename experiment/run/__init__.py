"""A training run and its folder: checkpoints, resume and the final result."""

from experiment.run.folder import find_run, provenance
from experiment.run.loop import Run
