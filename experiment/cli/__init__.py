"""The command line: one table of flags for all scripts, with the defaults of each script's RECIPE."""

from experiment.cli.flags import (
    ALIASES,
    LATER_SETTINGS,
    Role,
    fraction,
    number,
    options,
    positive_int,
    settings_with,
    switch,
    whole,
)
from experiment.cli.parser import Parser, by_teacher_and_student, parse_args, resolve_device
from experiment.entry import guard
