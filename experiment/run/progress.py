"""Terminal output of a run: header, progress bar, a line per epoch with the remaining time, and summary."""

import argparse
import sys
import time
from typing import Any

import torch
from torch import nn

from experiment.data import Data
from experiment.evaluation import MONITOR_PASSES, autoattack_label
from experiment.run.state import State

ACCURACIES = {"clean": "clean", "pgd20": "PGD-20", "holdout_pgd10": "held-out PGD-10"}
"""Keys of accuracies in metrics.jsonl, and how they are printed."""


class Progress:
    """One bar over all steps of a run: epoch, step, loss terms, images/s and the time left.

    Loss terms are on the device. Fetching them synchronises, so it is done at most once per second. If stderr is not a
    terminal, there is no bar, only the line per epoch.
    """

    def __init__(self, total: int, done: int, *, show: bool) -> None:
        from tqdm import tqdm

        form = "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
        shown = show and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, disable=not shown, dynamic_ncols=True, bar_format=form)
        self._show, self._shown, self._next = show, shown, 0.0

    def due(self) -> bool:
        """Whether a second has passed since the last update of the figures."""
        return time.monotonic() >= self._next

    def step(self) -> None:
        """Count one step."""
        self._bar.update()

    def figures(self, epoch: int, epochs: int, row: dict[str, Any]) -> None:
        """Show the running means of the loss terms and the speed."""
        self._next = time.monotonic() + 1
        self._bar.set_description_str(f"epoch {epoch}/{epochs}", refresh=False)
        self._bar.set_postfix_str(f"{loss_terms(row)}  {speed(row)} images/s")

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        if self._show:
            self._bar.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def loss_terms(row: dict[str, Any]) -> str:
    """Format the loss and its terms; a single term is the loss."""
    names = [name for name in row if name.startswith("loss")]
    return "  ".join(f"{name} {row[name]:.4f}" for name in (names if len(names) > 2 else names[:1]))


def speed(row: dict[str, Any]) -> str:
    """Format images per second, with two decimals below 10."""
    return f"{row['images_per_second']:.{0 if row['images_per_second'] >= 10 else 2}f}"


def epoch_line(row: dict[str, Any], epochs: int, left: float, attack: float) -> str:
    """Format a row of metrics.jsonl as the line of an epoch.

    Args:
        left: estimated remaining seconds of training and evaluation.
        attack: estimated seconds of AutoAttack at the end.
    """
    accuracies = "".join(f"  {label} {100 * row[key]:.2f} %" for key, label in ACCURACIES.items() if key in row)
    attacking = f", of it AutoAttack {duration(attack)}" if attack else ""
    return (
        f"epoch {row['epoch']}/{epochs}  {loss_terms(row)}  lr {row['lr']:g}{accuracies}  {row['seconds']:.1f} s  "
        f"{speed(row)} images/s  about {duration(left + attack)} left{attacking}"
    )


FIRST_SECONDS = 5.0
"""Seconds of steps before the first estimate, after WARM_STEPS steps of compilation and warm-up."""
WARM_STEPS = 2

FALLEN_PASSES, ROBUST_PASSES = 200, 8000
"""Passes of standard AutoAttack per image, a forward and a backward counted once each: of an image misclassified by the
first attack (100 steps of APGD), and of a robust one (900 of APGD-T, 900 of FAB-T, 5,000 forward passes of Square)."""


class Estimate:
    """Measures steps and estimates durations."""

    def __init__(self, args: argparse.Namespace, images: Data, *, steps: int) -> None:
        """Args:
        steps: optimizer steps of an epoch.
        """
        self._args, self._steps = args, steps
        self._train, self._test = len(images.x_train), len(images.x_test)
        self._first: tuple[int, int, float] | None = None
        self._printed = False

    def after_step(self, state: State) -> str | None:
        """Return the estimate of the whole run, once, when enough steps have been measured; otherwise None."""
        if self._printed:
            return None
        if self._first is None or self._first[0] != state.epoch:
            self._first = (state.epoch, state.step + WARM_STEPS, 0.0)
        epoch, first, seconds = self._first
        if state.step <= first:
            self._first = (epoch, first, state.epoch_seconds)
            return None
        if state.epoch_seconds - seconds < FIRST_SECONDS:
            return None
        self._printed = True
        step = (state.epoch_seconds - seconds) / (state.step - first)
        total = step * self._steps * self._args.epochs
        return (
            f"measured {step:.3g} s a step: {duration(step * self._steps)} an epoch, {duration(total)} for "
            f"{self._args.epochs} epochs of training"
        )

    def left(self, state: State) -> tuple[float, float]:
        """Return the remaining seconds of training and evaluation, and those of AutoAttack, after an epoch."""
        args, rows = self._args, state.rows
        epoch = sum(row["seconds"] for row in rows) / len(rows)
        evaluated = [row for row in rows if "pgd20" in row]
        if evaluated:
            evaluation = state.seconds["evaluation"] / len(evaluated)
        else:  # assume that a training image takes the attack's passes and four more
            evaluation = epoch / self._train / (2 * args.steps + 4) * MONITOR_PASSES * self._test
        remaining = range(state.epoch + 1, args.epochs + 1)
        evaluations = sum(number > args.eval_after or number == args.epochs for number in remaining)
        robust = evaluated[-1]["pgd20"] if evaluated else 0.5
        passes = FALLEN_PASSES + robust * (ROBUST_PASSES - FALLEN_PASSES)
        attack = evaluation / (MONITOR_PASSES * self._test) * passes * min(args.aa_examples, self._test)
        return len(remaining) * epoch + evaluations * evaluation, attack


def duration(seconds: float) -> str:
    """Format seconds as 42 s, 3:07 min, 5:20 h or 2 d 4 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    if seconds < 86400:
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def header(
    config: dict[str, Any],
    folder: str,
    resumed: str,
    images: Data,
    student: nn.Module,
    teacher: nn.Module | None,
    trackers: list[str],
) -> str:
    """Return the header of a run: networks, data, settings, position of a resumed run, and trackers.

    Args:
        trackers: a line for each tracker.
    """

    def size(model: nn.Module) -> str:
        return f"{sum(p.numel() for p in model.parameters()):,} parameters"

    settings = config["settings"]
    lines = [
        f"{config['method']}{'+' + config['adds'] if config['adds'] else ''}: {folder}{resumed}",
        f"  student  {settings['student']}, {size(student)}, {images.num_classes} classes",
        f"  data     {images.name}: {len(images.x_train)} training and {len(images.x_test)} test images "
        f"({images.test_order})",
        f"  schedule {settings['epochs']} epochs, lr {settings['lr']:g}{_drops(settings['lr_milestones'])}",
        f"  device   {config['device']}, {settings['precision']}, torch {torch.__version__}",
    ]
    reach = settings["steps"] * settings["step_size"]
    lines.append(
        f"  attack   epsilon {settings['epsilon']:.4g}, {settings['steps']} steps of {settings['step_size']:.4g}"
    )
    if reach < settings["epsilon"]:
        lines.append(
            f"  warning  the attack's steps reach {reach:.4g} of epsilon {settings['epsilon']:.4g}: see --step_size"
        )
    ramp, epochs = settings.get("ramp_epochs", 0), settings["epochs"]
    if ramp > epochs:
        reached, alpha = settings["alpha"] * epochs / ramp, settings["alpha"]
        lines.append(
            f"  warning  the largest weight of the {config['adds']} term is {reached:g}, not alpha {alpha:g}: "
            f"the run has {epochs} of {ramp} ramp epochs. Use --ramp_epochs {epochs} to reach alpha."
        )
    # The method's own settings.
    own = {name: settings[name] for name in (*config["outer_settings"], *config["added_settings"])}
    if own:
        lines.append(f"  method   {', '.join(f'{name} {_short(value)}' for name, value in own.items())}")
    if teacher is not None:
        digest = str(config["teacher_sha256"])[:12]
        lines.insert(1, f"  teacher  {settings['teacher']}, {size(teacher)}, SHA-256 {digest}")
    lines += [f"  rows     {where}" for where in trackers]
    return "\n".join(lines)


def _drops(milestones: list[int]) -> str:
    return f", divided by 10 after {', '.join(map(str, milestones))}" if milestones else ", not lowered"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def per_cent(accuracy: float | None) -> str:
    """Format a fraction as per cent with two decimals; None as a dash."""
    return "-" if accuracy is None else f"{100 * accuracy:.2f}"


def summary(result: dict[str, Any], folder: str) -> str:
    """Return the summary of a finished run: settings, accuracies, times and files."""
    attack = result["autoattack"]
    rows = [
        ("method", result["method"] + (f"+{result['adds']}" if result["adds"] else "")),
        ("teacher", result["teacher"] or "-"),
        ("student", f"{result['student']} on {result['dataset']}, seed {result['seed']}, {result['epochs']} epochs"),
        ("clean", f"{per_cent(result['clean'])} % of {result['test_examples']} test images"),
        ("PGD-20", f"{per_cent(result['pgd20'])} %"),
        (
            autoattack_label(attack["version"]) if attack else "AutoAttack",
            f"{per_cent(attack['accuracy'])} % of {attack['examples']} test images" if attack else "not run",
        ),
    ]
    gradients, best, mean = (result.get(name) for name in ("gradients", "best", "swa"))
    if gradients:
        rows.append(("GD, GC", f"{gradients['gd']:.4f}, {gradients['gc']:.4f} on {gradients['examples']} test images"))
        rows.append(("", gradients["definition"]))
    if best:
        rows.append(("best", f"epoch {best['epoch']} by PGD-10 on held-out images: {_accuracies(best)}"))
    if mean:
        rows.append(("mean weights", f"of the last {mean['epochs']} epochs: {_accuracies(mean)}"))
    rows += [
        ("time", "  ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())),
        ("hardware", result["hardware"]),
        ("files", f"{folder}/result.json, metrics.jsonl, student.pt, config.json"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _accuracies(found: dict[str, Any]) -> str:
    attack = found["autoattack"]
    attacked = f", {autoattack_label(attack['version'])} {per_cent(attack['accuracy'])} %" if attack else ""
    return f"clean {per_cent(found['clean'])} %, PGD-20 {per_cent(found['pgd20'])} %{attacked}"
