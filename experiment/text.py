"""How names, paths and budgets are written, in run names, tables, messages and trackers alike."""

import math
from pathlib import Path

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


def budget(epsilon: float) -> str:
    """A perturbation size in pixels of [0, 1]: 8/255 rather than 0.03137; 0.15, which is no whole level, as it is."""
    levels = round(255 * epsilon)
    return f"{levels}/255" if levels > 0 and math.isclose(levels / 255, epsilon) else f"{epsilon:g}"
