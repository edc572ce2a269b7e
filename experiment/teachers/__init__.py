"""Teachers: RobustBench's CIFAR-100 Linf models from a local file or a download, and networks of our own."""

from experiment.teachers.loader import FrozenTeacher, check_teacher_name, load_teacher

__all__ = ["FrozenTeacher", "check_teacher_name", "load_teacher"]
