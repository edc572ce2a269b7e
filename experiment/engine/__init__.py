"""The machine under a run: device, precision, ranks, and networks that do no work twice."""

from experiment.engine.accelerated import Accelerated, FastPath
from experiment.engine.machine import SYNC_EVERY, Engine

__all__ = ["SYNC_EVERY", "Accelerated", "Engine", "FastPath"]
