"""A training run and its folder: checkpoints, resume and the final result."""

from experiment.run.folder import find_run
from experiment.run.loop import Run
from experiment.run.provenance import provenance

__all__ = ["Run", "find_run", "provenance"]
