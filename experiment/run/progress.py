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

FALLEN_PASSES, ROBUST_PASSES = 200, 8000
"""Passes of standard AutoAttack per image, a forward and a backward counted once each: of an image misclassified by the
first attack (100 steps of APGD), and of a robust one (900 of APGD-T, 900 of FAB-T, 5,000 forward passes of Square)."""


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
        self._show, self._next = show, 0.0

    def step(self) -> bool:
        """Count one step; return whether a second has passed since the last update of the figures."""
        self._bar.update()
        return self._show and time.monotonic() >= self._next

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


def remaining(args: argparse.Namespace, images: Data, state: State, pass_seconds: float) -> tuple[float, float]:
    """Estimate the remaining seconds of training and evaluation, and those of AutoAttack, after an epoch.

    `pass_seconds` is the time of the student's forward pass per image, used as long as no evaluation was timed.
    """
    rows, test = state.rows, len(images.x_test)
    epoch = sum(row["seconds"] for row in rows) / len(rows)
    evaluated = [row for row in rows if "pgd20" in row]
    evaluation = state.seconds["evaluation"] / len(evaluated) if evaluated else pass_seconds * MONITOR_PASSES * test
    left = range(state.epoch + 1, args.epochs + 1)
    evaluations = sum(number > args.eval_after or number == args.epochs for number in left)
    robust = evaluated[-1]["pgd20"] if evaluated else 0.5
    passes = FALLEN_PASSES + robust * (ROBUST_PASSES - FALLEN_PASSES)
    attack = evaluation / (MONITOR_PASSES * test) * passes * min(args.aa_examples, test)
    return len(left) * epoch + evaluations * evaluation, attack


def epoch_line(row: dict[str, Any], epochs: int, left: float, attack: float) -> str:
    """Format a row of metrics.jsonl as the line of an epoch; the seconds are those of `remaining`."""
    from tqdm import tqdm

    accuracies = "".join(f"  {label} {100 * row[key]:.2f} %" for key, label in ACCURACIES.items() if key in row)
    attacking = f" (AutoAttack {tqdm.format_interval(attack)})" if attack else ""
    return (
        f"epoch {row['epoch']}/{epochs}  {loss_terms(row)}  lr {row['lr']:g}{accuracies}  {row['seconds']:.1f} s  "
        f"{speed(row)} images/s  about {tqdm.format_interval(left + attack)} left{attacking}"
    )


def header(
    config: dict[str, Any],
    folder: str,
    resumed: str,
    images: Data,
    student: nn.Module,
    teacher: nn.Module | None,
    tried: str,
    trackers: list[str],
) -> str:
    """Return the header of a run: networks, data, settings, the position of a resumed run, a line for each tracker.

    `tried` is what `check_teacher` returns.
    """

    def size(model: nn.Module) -> str:
        return f"{sum(p.numel() for p in model.parameters()):,} parameters"

    settings = config["settings"]
    epochs, epsilon = settings["epochs"], settings["epsilon"]
    milestones = [epoch for epoch in settings["lr_milestones"] if epoch < epochs]
    drops = f"divided by 10 after {', '.join(map(str, milestones))}" if milestones else "not lowered"
    rows = [("resumed", resumed)] if resumed else []
    if teacher is not None:
        sha256 = str(config["teacher_sha256"])[:12]
        rows.append(("teacher", f"{settings['teacher']}, {size(teacher)}, SHA-256 {sha256}, {tried}"))
    sizes = f"{len(images.x_train)} training and {len(images.x_test)} test images"
    rows += [
        ("student", f"{settings['student']}, {size(student)}, {images.num_classes} classes"),
        ("data", f"{images.name}: {sizes}"),
        ("schedule", f"{epochs} epochs, lr {settings['lr']:g}, {drops}"),
        ("device", f"{config['device']}, {settings['precision']}, torch {torch.__version__}"),
        ("attack", f"epsilon {epsilon:.4g}, {settings['steps']} steps of {settings['step_size']:.4g}"),
    ]
    reach = settings["steps"] * settings["step_size"]
    if reach < epsilon:
        rows.append(("warning", f"the attack's steps reach {reach:.4g} of epsilon {epsilon:.4g}: see --step_size"))
    ramp = settings.get("ramp_epochs", epochs)
    if ramp != epochs:
        alpha = settings["alpha"]
        warning = f"the largest weight of the {config['adds']} term is {alpha * epochs / ramp:g}, not alpha {alpha:g}: "
        warning += (
            f"it is alpha * epoch / {ramp}, and the run has {epochs} epochs. Use --ramp_epochs {epochs} for alpha."
        )
        rows.append(("warning", warning))
    if settings["holdout"] and settings["eval_after"] >= epochs - 1:
        rows.append(
            ("warning", f"--holdout has only the last epoch to choose from: --eval_after {settings['eval_after']}")
        )
    if own := [*config["outer_settings"], *config["added_settings"]]:
        rows.append(("method", ", ".join(f"{name} {_short(settings[name])}" for name in own)))
    rows += [("rows", line) for line in trackers]
    return "\n".join([f"{_method(config)}: {folder}", *(f"  {name:<8} {text}" for name, text in rows)])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _method(record: dict[str, Any]) -> str:
    return f"{record['method']}+{record['adds']}" if record["adds"] else record["method"]


def summary(result: dict[str, Any], folder: str) -> str:
    """Return the summary of a finished run: settings, accuracies, times and files."""

    def accuracies(found: dict[str, Any]) -> str:
        attack = found["autoattack"]
        attacked = f", {autoattack_label(attack['version'])} {100 * attack['accuracy']:.2f} %" if attack else ""
        return f"clean {100 * found['clean']:.2f} %, PGD-20 {100 * found['pgd20']:.2f} %{attacked}"

    attack = result["autoattack"]
    rows = [
        ("method", _method(result)),
        ("teacher", result["teacher"] or "-"),
        ("student", f"{result['student']} on {result['dataset']}, seed {result['seed']}, {result['epochs']} epochs"),
        ("clean", f"{100 * result['clean']:.2f} % of {result['test_examples']} test images"),
        ("PGD-20", f"{100 * result['pgd20']:.2f} %"),
    ]
    if attack:
        text = f"{100 * attack['accuracy']:.2f} % of {attack['examples']} test images"
        rows.append((autoattack_label(attack["version"]), text))
    else:
        rows.append(("AutoAttack", "not run"))
    gradients, best, mean = (result.get(name) for name in ("gradients", "best", "swa"))
    if gradients:
        rows.append(("GD, GC", f"{gradients['gd']:.4f}, {gradients['gc']:.4f} on {gradients['examples']} test images"))
        rows.append(("", gradients["definition"]))
    if best:
        rows.append(("best", f"epoch {best['epoch']} by PGD-10 on held-out images: {accuracies(best)}"))
    if mean:
        rows.append(("mean weights", f"of the last {mean['epochs']} epochs: {accuracies(mean)}"))
    rows += [
        ("time", "  ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())),
        ("hardware", result["hardware"]),
        ("files", f"{folder}/result.json, metrics.jsonl, student.pt, config.json"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
