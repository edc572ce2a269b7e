"""The machine under a run: device, precision, ranks, and networks that do no work twice."""

from experiment.engine.accelerated import Accelerated, FastPath
from experiment.engine.machine import Engine, cpu_name

__all__ = ["Accelerated", "Engine", "FastPath", "cpu_name"]
