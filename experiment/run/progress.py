"""What a person sees of a run: its header, the progress bar, a line per epoch, the summary."""

import sys
import time
from typing import Any

import torch
from torch import nn

from experiment.data import Data

ACCURACIES = {"clean": "clean", "pgd20": "PGD-20"}
"""Keys of accuracies in metrics.jsonl, and how they are printed."""


class Progress:
    """One bar over all steps of a run: epoch, step, loss terms, images/s and the time left.

    Loss terms live on the device; they are fetched, which waits for the GPU, at most once a second. Where stderr is
    no terminal there is no bar, only the line per epoch.
    """

    def __init__(self, total: int, done: int, *, show: bool) -> None:
        from tqdm import tqdm

        form = "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
        shown = show and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, disable=not shown, dynamic_ncols=True, bar_format=form)
        self._show, self._shown, self._next = show, shown, 0.0

    def due(self) -> bool:
        """Whether a second has passed since the figures were last fetched."""
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
    """The loss and its terms; a single term is the loss."""
    names = [name for name in row if name.startswith("loss")]
    return "  ".join(f"{name} {row[name]:.4f}" for name in (names if len(names) > 2 else names[:1]))


def speed(row: dict[str, Any]) -> str:
    """Images per second: whole ones, or two decimals where they are few."""
    return f"{row['images_per_second']:.{0 if row['images_per_second'] >= 10 else 2}f}"


def epoch_line(row: dict[str, Any], epochs: int, seconds_left: float) -> str:
    """One printed line for one row of metrics.jsonl."""
    terms = loss_terms(row)
    accuracies = "".join(f"  {label} {100 * row[key]:.2f} %" for key, label in ACCURACIES.items() if key in row)
    left = time.strftime("%H:%M:%S", time.gmtime(seconds_left % 86400))
    days = f"{int(seconds_left // 86400)} d " if seconds_left >= 86400 else ""
    return (
        f"epoch {row['epoch']}/{epochs}  {terms}  lr {row['lr']:g}{accuracies}  "
        f"{row['seconds']:.1f} s  {speed(row)} images/s  {days}{left} of training left"
    )


def header(
    config: dict[str, Any], folder: str, resumed: str, images: Data, student: nn.Module, teacher: nn.Module | None
) -> str:
    """What a run prints when it starts: all that it is made of, and where it was resumed."""

    def size(model: nn.Module) -> str:
        return f"{sum(p.numel() for p in model.parameters()):,} parameters"

    settings = config["settings"]
    lines = [
        f"{config['method']}{'+' + config['adds'] if config['adds'] else ''}: {folder}{resumed}",
        f"  student  {settings['student']}, {size(student)}, {images.num_classes} classes",
        f"  data     {images.name}: {len(images.x_train)} training and {len(images.x_test)} test images",
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
    # What the method brings: all that may surprise in it is a setting.
    own = {name: settings[name] for name in (*config["outer_settings"], *config["added_settings"])}
    if own:
        lines.append(f"  method   {', '.join(f'{name} {_short(value)}' for name, value in own.items())}")
    if teacher is not None:
        digest = str(config["teacher_sha256"])[:12]
        lines.insert(1, f"  teacher  {settings['teacher']}, {size(teacher)}, SHA-256 {digest}")
    if settings["device"] == "cpu" and images.name != "digits":
        large = teacher is not None and sum(p.numel() for p in teacher.parameters()) > 1e7
        lines.append(
            f"  warning  no CUDA device: an epoch takes {'a day' if large else 'hours'} here, minutes on a GPU"
        )
    return "\n".join(lines)


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
            "AutoAttack",
            f"{per_cent(attack['accuracy'])} % of {attack['examples']} test images" if attack else "not run",
        ),
        *_gradient_rows(result["gradients"]),
        ("time", "  ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())),
        ("hardware", result["hardware"]),
        ("files", f"{folder}/result.json, metrics.jsonl, student.pt, config.json"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _gradient_rows(gradients: dict[str, Any] | None) -> list[tuple[str, str]]:
    if gradients is None:
        return []
    return [
        ("GD, GC", f"{gradients['gd']:.4f}, {gradients['gc']:.4f} on {gradients['examples']} test images"),
        ("", gradients["definition"]),
    ]
