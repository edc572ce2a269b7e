"""How names, paths, budgets, values and tables are written, in run names, messages and trackers alike."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ABSENT = "absent"

TEXT_COLUMNS = ("method", "teacher", "student", "dataset", "run", "state")
"""Columns that are set to the left; figures are set to the right."""

Table = list[list[str]]
"""Text cells, header first."""

SUFFIXES = (".pt", ".pth", ".safetensors", ".npz")


def short_name(what: str) -> str:
    """A network's or data set's name as it is; of a path its last part, without folders and file type.

    runs/a and runs/a/student.pt are both "a", as every run has a student.pt; FILE.py:function is "FILE.function".
    """
    file, colon, function = what.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{Path(file).stem}.{function}"
    path = Path(what)
    if path.name == "student.pt" and path.parent.name:
        return path.parent.name
    return path.stem if path.suffix in SUFFIXES else path.name


def started_as(script: str | Path) -> list[str]:
    """What follows ``python`` to start a script: its path, or -m and the module's name where it is in a package."""
    path = Path(script).resolve()
    if (path.parent / "__init__.py").is_file():
        return ["-m", f"{path.parent.name}.{path.stem}"]
    return [str(script)]


def budget(epsilon: float) -> str:
    """A perturbation size in pixels of [0, 1]: 8/255 rather than 0.03137; 0.15, which is no whole level, as it is."""
    levels = round(255 * epsilon)
    return f"{levels}/255" if levels > 0 and math.isclose(levels / 255, epsilon) else f"{epsilon:g}"


def short_text(value: Any) -> str:
    """A value in a message or a label: on one line, cut where it is long."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    # Checksums: twelve characters tell any two apart.
    return text if len(text) <= 60 else f"{text[:12]}..."


def comma_list(values: Iterable[Any]) -> str:
    """Values in one line, separated by commas."""
    return ", ".join(map(str, values))


def escaped(text: str) -> str:
    """Text that any output takes: bytes of a path name that are not UTF-8 become escapes."""
    return text.encode(errors="backslashreplace").decode()


def points(values: Sequence[float], sign: str = "") -> str:
    """Per cent with two decimals, with the sample standard deviation where there are several; '-' for none."""
    return spread([100 * value for value in values], 2, sign)


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """The mean, with the sample standard deviation where there are several; '-' for none."""
    if not values:
        return "-"
    mean = f"{fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


def as_text(table: Table, width: int | None = None) -> str:
    """A table for the terminal, figures to the right.

    Args:
        width: of the terminal: a wider table says in a line above it what is the same in all rows, and folds names.
            Without it nothing is moved or folded, whatever takes the text.
    """
    import io

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    shared, table = _narrowed(table, width) if width else ([], table)
    # rich is one off, and fills a width that it is given.
    limit = width - 1 if width and _natural_width(table) > width else None
    drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, width=limit)
    for head, *cells in zip(*table, strict=True):
        # A name keeps room for its longest word; where it is tight, figures break before their ±.
        words = [len(word) for cell in (head, *cells) for word in cell.split()]
        side = "left" if head in TEXT_COLUMNS else "right"
        drawn.add_column(Text(head), justify=side, overflow="fold", min_width=min(10, max(words)))
    for row in table[1:]:
        drawn.add_row(*map(Text, row))
    output = io.StringIO()
    Console(file=output, width=10_000, color_system=None, legacy_windows=False).print(drawn)
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    return "\n".join([f"all: {', '.join(shared)}"] * bool(shared) + lines)


def _natural_width(table: Table) -> int:
    """Of the table with nothing folded."""
    return sum(max(map(len, column)) + 3 for column in zip(*table, strict=True))


def _narrowed(table: Table, width: int) -> tuple[list[str], Table]:
    """Move columns with one value only out of a table that is too wide: what they say, and the table without them."""
    shared = []
    for head in ("dataset", "AutoAttack images", "n seeds", "student", "teacher"):
        if _natural_width(table) <= width or head not in table[0]:
            continue
        at = table[0].index(head)
        if len({row[at] for row in table[1:]}) == 1:
            shared.append(f"{head} {table[1][at]}")
            table = [row[:at] + row[at + 1 :] for row in table]
    return shared, table
