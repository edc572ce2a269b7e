"""Values and numbers as text, for messages, labels and tables."""

import json
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

ABSENT = "absent"


def short_text(value: Any) -> str:
    """A value in a message or a label: on one line, cut where it is long."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    # Checksums: twelve characters tell any two apart.
    return text if len(text) <= 60 else f"{text[:12]}..."


def escaped(text: str) -> str:
    """Text that any output takes: bytes of a path name that are not UTF-8 become escapes."""
    return text.encode(errors="backslashreplace").decode()


def comma_list(values: Iterable[Any]) -> str:
    """Values in one line, separated by commas."""
    return ", ".join(map(str, values))


def number_or_0(value: Any) -> float:
    """A number of a file, 0 if the entry is missing or something else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def points(values: Sequence[float], sign: str = "") -> str:
    """Per cent with two decimals, with the sample standard deviation where there are several; '-' for none."""
    return spread([100 * value for value in values], 2, sign)


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """The mean, with the sample standard deviation where there are several; '-' for none."""
    if not values:
        return "-"
    mean = f"{fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


def p_value(value: float) -> str:
    """A p value with two digits."""
    return f"{value:.2g}" if value >= 0.001 else "< 0.001"
