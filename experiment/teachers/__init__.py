"""Networks of others and of our own: RobustBench's Linf zoos, checkpoints, bare weights; teachers are frozen ones."""

from experiment.teachers.loader import FrozenTeacher, check_teacher_name, load_teacher
from experiment.teachers.networks import Network, load_network

__all__ = ["FrozenTeacher", "Network", "check_teacher_name", "load_network", "load_teacher"]
