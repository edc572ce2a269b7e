"""Defaults of the flags: a script's RECIPE, its preset, and the milestones of the learning rate."""

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

from experiment import UserError
from experiment.cli.flags import ALIASES

PAPER = "preset paper"
"""The group of a RECIPE with what ``--preset paper`` changes."""

Defaults = dict[str, Any]
"""By flag: its value, or a function that computes it from the namespace of all flags."""


def defaults_of(recipe: dict[str, Any], preset: str) -> Defaults:
    """The defaults of a RECIPE's flags under a preset."""
    groups = [group for name, group in recipe.items() if isinstance(group, dict) and name != PAPER]
    defaults = {flag: value for group in groups for flag, value in group.items()}
    if preset == "paper":
        defaults |= recipe[PAPER]
    if "lr_milestones" in defaults:
        defaults["lr_milestones"] = functools.partial(_milestones, defaults["lr_milestones"], defaults["epochs"])
    return defaults


def default(defaults: Defaults, flag: str, args: argparse.Namespace) -> Any:
    """One flag's default given the other flags' values; UserError if the preset has none for them."""
    value = defaults[flag]
    return value(args) if callable(value) else value


def fill(args: argparse.Namespace, given: set[str], defaults: Defaults) -> None:
    """Set every flag that was not given to its default; those that are computed from others come last."""
    for flag in sorted((flag for flag in defaults if flag not in given), key=lambda flag: callable(defaults[flag])):
        try:
            setattr(args, flag, default(defaults, flag, args))
        except UserError as error:
            raise UserError(f"--preset paper has no {flag} {error}: give --{flag}") from error


def by_teacher_and_student(students: tuple[str, ...], **teachers: tuple[float, ...]) -> Callable[..., float]:
    """A preset's default that depends on the networks.

    Args:
        teachers: by the teacher's short name, one value per student.

    Returns:
        A function that looks the value up for a namespace of flags.
    """

    def look_up(args: argparse.Namespace) -> float:
        if args.dataset != "cifar100":
            raise UserError(f"for {args.dataset}; its table is of cifar100")
        teacher = {name: alias for alias, name in ALIASES.items()}.get(args.teacher, args.teacher)
        if teacher not in teachers or args.student not in students:
            raise UserError(
                f"for teacher {args.teacher} and student {args.student}; the paper has it for "
                f"{', '.join(teachers)} and {', '.join(students)} only"
            )
        return teachers[teacher][students.index(args.student)]

    return look_up


def _milestones(milestones: list[int] | None, epochs: int, args: argparse.Namespace) -> list[int]:
    """The recipe's milestones for the recipe's number of epochs; for any other, 1/2 and 3/4 of the epochs."""
    if milestones is not None and args.epochs == epochs:
        return list(milestones)
    # Rounded up: the first epoch at a lower rate starts after the fraction has passed.
    return [math.ceil(args.epochs / 2), math.ceil(args.epochs * 3 / 4)]
