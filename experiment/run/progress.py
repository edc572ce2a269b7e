"""What a person sees of a run at work: the progress bar and a line per epoch."""

import sys
import time
from typing import Any

from experiment.run.estimate import duration

ACCURACIES = {"clean": "clean", "pgd20": "PGD-20", "holdout_pgd10": "held-out PGD-10"}
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


def epoch_line(row: dict[str, Any], epochs: int, left: float, attack: float) -> str:
    """One printed line for one row of metrics.jsonl.

    Args:
        left: estimated seconds of training and evaluation that are left.
        attack: estimated seconds of AutoAttack after that.
    """
    accuracies = "".join(f"  {label} {100 * row[key]:.2f} %" for key, label in ACCURACIES.items() if key in row)
    attacking = f", of it AutoAttack {duration(attack)}" if attack else ""
    return (
        f"epoch {row['epoch']}/{epochs}  {loss_terms(row)}  lr {row['lr']:g}{accuracies}  {row['seconds']:.1f} s  "
        f"{speed(row)} images/s  about {duration(left + attack)} left{attacking}"
    )
