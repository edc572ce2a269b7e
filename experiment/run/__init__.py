"""The run folder: one run from its first step to result.json, through any number of kills."""

from experiment.run.folder import free_settings
from experiment.run.loop import Run
from experiment.run.provenance import provenance

__all__ = ["Run", "free_settings", "provenance"]
