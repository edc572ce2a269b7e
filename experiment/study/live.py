"""The live table of a study: run, epoch, loss, PGD-20 and time left, read from what the runs write."""

from collections.abc import Sequence
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from experiment.files import read_metrics
from experiment.study.plan import PlannedRun

HEADS = ("run", "state", "epoch", "loss", "PGD-20", "left")


def progress_of(run: PlannedRun) -> list[str]:
    """One row of the table: what metrics.jsonl says about a run at work."""
    path = run.folder / "metrics.jsonl"
    rows = read_metrics(path) if path.is_file() else []
    epochs = run.settings["epochs"]
    measured = [row["pgd20"] for row in rows if "pgd20" in row]
    loss = f"{rows[-1]['loss']:.4f}" if rows else "-"
    left = fmean(row["seconds"] for row in rows) * (epochs - len(rows)) if rows else None
    state = "training" if len(rows) < epochs else "AutoAttack" if run.settings["aa_examples"] else "ending"
    pgd20 = f"{100 * measured[-1]:.2f}" if measured else "-"
    return [run.name, state, f"{len(rows)}/{epochs}", loss, pgd20, "-" if not left else duration(left)]


def duration(seconds: float) -> str:
    """1 d 02:03:04 or 02:03:04."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


class LiveTable:
    """A table at the bottom of the terminal while runs are at work; where stdout is no terminal, nothing."""

    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._total, self._done = total, done
        self._console = Console()
        self._live = Live(console=self._console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def tell(self, line: str) -> None:
        """Print a line above the table."""
        from rich.text import Text

        if line.endswith(": finished"):
            self._done += 1
        self._console.print(Text(line), soft_wrap=True)

    def show(self, runs: Sequence[PlannedRun]) -> None:
        """Draw the runs at work."""
        if self._console.is_terminal:
            self._live.update(self._table([progress_of(run) for run in runs]))

    def _table(self, rows: Sequence[Sequence[str]]) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, title=f"{self._done} of {self._total} runs finished", title_justify="left")
        for head in HEADS:
            table.add_column(head, justify="left" if head in ("run", "state") else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        return table
