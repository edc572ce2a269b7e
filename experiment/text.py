"""Formatting of names, paths, epsilons, values and tables in run names, messages and trackers."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ABSENT = "absent"

AUTOATTACK_STEPS = ("clean", "apgd-ce", "apgd-t", "fab-t", "square")
"""AutoAttack's clean pass and its attacks, in their order. Versions for few classes lack some."""

TEXT_COLUMNS = ("method", "teacher", "student", "dataset", "run", "state", "attack", "class", "f")
"""Left-aligned columns; others are right-aligned."""

Table = list[list[str]]
"""Text cells, header first."""

SUFFIXES = (".pt", ".pth", ".safetensors", ".npz")


def short_name(what: str) -> str:
    """Return a name unchanged, or the last part of a path without its file type.

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
    """Return the words after ``python`` that start a script: its path, or -m and its module in a package."""
    path = Path(script).resolve()
    if (path.parent / "__init__.py").is_file():
        return ["-m", f"{path.parent.name}.{path.stem}"]
    return [str(script)]


def budget(epsilon: float) -> str:
    """Format an epsilon in pixels of [0, 1]: 8/255 instead of 0.03137, but 0.15, which is not a whole level."""
    levels = round(255 * epsilon)
    return f"{levels}/255" if levels > 0 and math.isclose(levels / 255, epsilon) else f"{epsilon:g}"


def short_text(value: Any) -> str:
    """Format a value for a message or a label: one line, truncated if long."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    # Checksums: twelve characters are enough to distinguish them.
    return text if len(text) <= 60 else f"{text[:12]}..."


def comma_list(values: Iterable[Any]) -> str:
    """Join values with commas."""
    return ", ".join(map(str, values))


def escaped(text: str) -> str:
    """Escape bytes of a path name that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def points(values: Sequence[float], sign: str = "") -> str:
    """Format fractions as mean per cent with two decimals, with ± sample standard deviation for several values."""
    return spread([100 * value for value in values], 2, sign)


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Format the mean, with ± sample standard deviation for several values; '-' for none."""
    if not values:
        return "-"
    mean = f"{fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


def as_text(table: Table) -> str:
    """Format a table for the terminal, with numbers right-aligned."""
    import io

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in table[0]:
        drawn.add_column(Text(head), justify="left" if head in TEXT_COLUMNS else "right")
    for row in table[1:]:
        drawn.add_row(*map(Text, row))
    output = io.StringIO()
    Console(file=output, width=10_000, color_system=None, legacy_windows=False).print(drawn)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())
