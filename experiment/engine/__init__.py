"""The machine under a run: device, precision, ranks, and networks that do no work twice."""

from experiment.engine.accelerated import Accelerated
from experiment.engine.machine import Engine, cpu_name

__all__ = ["Accelerated", "Engine", "cpu_name"]
