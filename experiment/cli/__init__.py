"""The command line: one table of flags for all scripts, with the defaults of each script's RECIPE."""

from experiment.cli.defaults import by_teacher_and_student
from experiment.cli.flags import ALIASES, LATER_SETTINGS, Role, options, settings_with
from experiment.cli.parser import Parser, parse_args, resolve_device
from experiment.cli.values import fraction, number, positive_int, switch, whole
from experiment.entry import guard

__all__ = [
    "ALIASES",
    "LATER_SETTINGS",
    "Parser",
    "Role",
    "by_teacher_and_student",
    "fraction",
    "guard",
    "number",
    "options",
    "parse_args",
    "positive_int",
    "resolve_device",
    "settings_with",
    "switch",
    "whole",
]
