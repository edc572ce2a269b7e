"""A training run and its folder: checkpoints, resume and the final result."""

from experiment.run.folder import free_settings
from experiment.run.loop import Run
from experiment.run.provenance import provenance

__all__ = ["Run", "free_settings", "provenance"]
