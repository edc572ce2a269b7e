"""What a flag is when it is not given: a script's RECIPE, its preset, and the rules that hold for every script."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from experiment import UserError
from experiment.cli.flags import ALIASES

PAPER = "preset paper"
"""The group of a RECIPE that holds what ``--preset paper`` changes."""

Defaults = dict[str, Any]
"""By flag: its value, or a function of all flags' values that computes it."""


def defaults_of(recipe: dict[str, Any], preset: str) -> Defaults:
    """What the flags of a RECIPE are, unless they are given."""
    groups = [group for name, group in recipe.items() if isinstance(group, dict) and name != PAPER]
    defaults = {flag: value for group in groups for flag, value in group.items()}
    if preset == "paper":
        defaults |= recipe[PAPER]
    if "lr_milestones" in defaults:
        defaults["lr_milestones"] = _milestones(defaults["lr_milestones"], defaults["epochs"])
    return defaults


def default(defaults: Defaults, flag: str, args: argparse.Namespace) -> Any:
    """One flag's default beside the others' values.

    Raises:
        UserError: the recipe has none for these.
    """
    value = defaults[flag]
    return value(args) if callable(value) else value


def fill(args: argparse.Namespace, given: set[str], defaults: Defaults) -> None:
    """Give every flag that was not given its default; those that others are computed from come first.

    Raises:
        UserError: the recipe has none for a flag beside what was given.
    """
    open_flags = [flag for flag in defaults if flag not in given]
    for flag in sorted(open_flags, key=lambda flag: callable(defaults[flag])):
        try:
            setattr(args, flag, default(defaults, flag, args))
        except UserError as error:
            raise UserError(f"--preset paper has no {flag} {error}: give --{flag}") from error


def by_teacher_and_student(students: tuple[str, ...], **teachers: tuple[float, ...]) -> Callable[..., float]:
    """A preset's table: for each teacher (by its short name) one value per student, in the order of `students`.

    Returns:
        A function of the flags' values, which looks the value up.
    """

    def look_up(args: argparse.Namespace) -> float:
        if args.dataset != "cifar100":
            raise UserError(f"for {args.dataset}; its table is of cifar100")
        short = {name: alias for alias, name in ALIASES.items()}.get(args.teacher, args.teacher)
        if short not in teachers or args.student not in students:
            raise UserError(
                f"for teacher {args.teacher} and student {args.student}; the paper has it for "
                f"{', '.join(teachers)} and {', '.join(students)} only"
            )
        return teachers[short][students.index(args.student)]

    return look_up


def _milestones(recipes: list[int] | None, epochs: int) -> Callable[[argparse.Namespace], list[int]]:
    """The recipe's milestones hold for its number of epochs; for any other they are at 1/2 and 3/4."""

    def milestones(args: argparse.Namespace) -> list[int]:
        if recipes is not None and args.epochs == epochs:
            return list(recipes)
        # An epoch that starts after the fraction has passed is the first to be lowered: ceil.
        return [math.ceil(args.epochs / 2), math.ceil(args.epochs * 3 / 4)]

    return milestones
