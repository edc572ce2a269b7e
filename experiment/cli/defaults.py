"""Defaults of the flags: a script's RECIPE, its preset, the milestones of the learning rate, and the run's name."""

import argparse
import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiment import UserError
from experiment.cli.flags import ALIASES
from experiment.text import budget, short_name

PAPER = "preset paper"
"""The group of a RECIPE with what ``--preset paper`` changes."""

LONGEST = 160
"""Characters of a default run name before the seed; file systems allow 255 bytes."""

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


def _milestones(milestones: list[int] | None, epochs: int, args: argparse.Namespace) -> list[int]:
    """The recipe's milestones for the recipe's number of epochs; for any other, 1/2 and 3/4 of the epochs."""
    if milestones is not None and args.epochs == epochs:
        return list(milestones)
    # Rounded up: the first epoch at a lower rate starts after the fraction has passed.
    return [math.ceil(args.epochs / 2), math.ceil(args.epochs * 3 / 4)]


def fill(args: argparse.Namespace, given: set[str], defaults: Defaults) -> list[str]:
    """Set every flag that was not given to its default; return the given flags that differ from theirs.

    Raises:
        UserError: the preset has no default for these networks.
    """
    changed = []
    for flag, default in sorted(defaults.items(), key=lambda item: callable(item[1])):  # computed ones come last
        try:
            value = default(args) if callable(default) else default
            if flag not in given:
                setattr(args, flag, value)
            elif getattr(args, flag) != value:
                changed.append(flag)
        except UserError as error:
            if flag not in given:
                raise UserError(f"--preset paper has no {flag} {error}: give --{flag}") from error
            changed.append(flag)
    return [flag for flag in defaults if flag in changed]


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


def default_run_name(script: str, args: argparse.Namespace, changed: Iterable[str]) -> str:
    """Script, data set, teacher, student, the values of changed flags, and the seed."""
    preset = "paper" if getattr(args, "preset", "default") == "paper" else None
    networks = (short_name(str(getattr(args, flag))) for flag in ("dataset", "teacher", "student") if flag in args)
    parts = [Path(script).stem.removesuffix("_cifar100"), *networks, preset]
    parts += [f"{flag}{_compact(getattr(args, flag))}" for flag in changed]
    name = "_".join(part for part in parts if part)
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}_seed{args.seed}"


def _compact(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(str, value)) or "-none"
    if isinstance(value, float):
        return min(f"{value:g}", budget(value).replace("/", "-"), key=len)
    return f"-{value}" if isinstance(value, str) else str(value)
