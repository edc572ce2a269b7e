"""Device, precision and ranks of a run, and accelerated networks."""

from experiment.engine.accelerated import Accelerated
from experiment.engine.machine import Engine, cpu_name, gathered, ranks
