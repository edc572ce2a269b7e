"""Trained networks: RobustBench's Linf zoos, checkpoints, bare weights; a teacher is a frozen one of them."""

from experiment.teachers.networks import check_teacher_name, load_network, load_teacher
from experiment.teachers.zoo import published_accuracy
