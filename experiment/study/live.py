"""The runs at work as a table: epoch, loss, PGD-20 and time left, read from what the runs write."""

from collections.abc import Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any

from experiment.files import read_metrics
from experiment.study.plan import PlannedRun
from experiment.text import TEXT_COLUMNS

HEADS = ("run", "state", "epoch", "loss", "PGD-20", "left")


def progress_of(run: PlannedRun) -> list[str]:
    """One row of the table."""
    path = run.folder / "metrics.jsonl"
    rows, epochs = read_metrics(path) if path.is_file() else [], run.settings["epochs"]
    if not rows:
        return [run.name, "training", f"0/{epochs}", "-", "-", "-"]
    measured = [f"{100 * row['pgd20']:.2f}" for row in rows if "pgd20" in row]
    state = "training" if len(rows) < epochs else "AutoAttack" if run.settings["aa_examples"] else "ending"
    seconds = fmean(row["seconds"] for row in rows) * (epochs - len(rows))
    left = str(timedelta(seconds=round(seconds))) if seconds else "-"
    pgd20 = measured[-1] if measured else "-"
    return [run.name, state, f"{len(rows)}/{epochs}", f"{rows[-1]['loss']:.4f}", pgd20, left]


def progress_table(runs: Sequence[PlannedRun], title: str) -> Any:
    """A rich table of runs."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="left" if head in TEXT_COLUMNS else "right")
    for run in runs:
        table.add_row(*map(Text, progress_of(run)))
    return table
