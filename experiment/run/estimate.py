"""How long a run will take, from what its steps and evaluations have taken so far."""

import argparse

from experiment.data import Data
from experiment.run.state import State

FIRST_SECONDS = 5.0
"""The first estimate waits for so many seconds of steps, and for some steps: the first ones compile and warm up."""
WARM_STEPS = 2

PGD20_PASSES = 21
"""Forward and backward passes of an evaluation, per image."""
FALLEN_PASSES, ROBUST_PASSES = 100, 4000
"""The same of AutoAttack, standard version, for an image that falls to its first attack (100 steps of APGD) and for one
that withstands all (900 of APGD-T, 900 of FAB-T with a pass and a half each, 5,000 forward passes of Square)."""


class Estimate:
    """Measured steps, and what follows from them."""

    def __init__(self, args: argparse.Namespace, images: Data, *, steps: int) -> None:
        """Args:
        steps: optimizer steps of an epoch.
        """
        self._args, self._steps = args, steps
        self._train, self._test = len(images.x_train), len(images.x_test)
        self._first: tuple[int, int, float] | None = None
        self._told = False

    def after_step(self, state: State) -> str | None:
        """What to print after this step: once, when some seconds of steps are measured, how long the run will take."""
        if self._told:
            return None
        if self._first is None or self._first[0] != state.epoch:
            self._first = (state.epoch, state.step + WARM_STEPS, 0.0)
        epoch, first, seconds = self._first
        if state.step <= first:
            self._first = (epoch, first, state.epoch_seconds)
            return None
        if state.epoch_seconds - seconds < FIRST_SECONDS:
            return None
        self._told = True
        step = (state.epoch_seconds - seconds) / (state.step - first)
        total = step * self._steps * self._args.epochs
        return (
            f"measured {step:.3g} s a step: {duration(step * self._steps)} an epoch, {duration(total)} for "
            f"{self._args.epochs} epochs of training"
        )

    def left(self, state: State) -> tuple[float, float]:
        """Seconds left of training and evaluation, and of AutoAttack, after a finished epoch."""
        args, rows = self._args, state.rows
        epoch = sum(row["seconds"] for row in rows) / len(rows)
        evaluated = [row for row in rows if "pgd20" in row]
        if evaluated:
            evaluation = state.seconds["evaluation"] / len(evaluated)
        else:  # as if a training image took the attack's passes and two more
            evaluation = epoch / self._train / (args.steps + 2) * PGD20_PASSES * self._test
        remaining = range(state.epoch + 1, args.epochs + 1)
        evaluations = sum(number > args.eval_after or number == args.epochs for number in remaining)
        robust = evaluated[-1]["pgd20"] if evaluated else 0.5
        passes = FALLEN_PASSES + robust * (ROBUST_PASSES - FALLEN_PASSES)
        attack = evaluation / (PGD20_PASSES * self._test) * passes * min(args.aa_examples, self._test)
        return len(remaining) * epoch + evaluations * evaluation, attack


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3:07 min, 5:20 h, 2 d 4 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    if seconds < 86400:
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
