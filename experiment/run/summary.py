"""What a run says at its start and at its end."""

from typing import Any

import torch
from torch import nn

from experiment.data import Data
from experiment.evaluation import autoattack_label


def header(
    config: dict[str, Any],
    folder: str,
    resumed: str,
    images: Data,
    student: nn.Module,
    teacher: nn.Module | None,
    trackers: list[str],
) -> str:
    """What a run prints when it starts: all that it is made of, where it was resumed, and where its rows go.

    Args:
        trackers: a line for each tracker that mirrors the rows.
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
    # What the method brings: all that may surprise in it is a setting.
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
    """A fraction as per cent with two decimals, or a dash."""
    return "-" if accuracy is None else f"{100 * accuracy:.2f}"


def summary(result: dict[str, Any], folder: str) -> str:
    """The table that a finished run prints: what was trained, what came out, and the files that prove it."""
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
