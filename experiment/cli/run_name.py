"""The default name of a run folder: what is trained, and every setting that is not the default."""

import argparse
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiment.text import short_name

LONGEST = 160
"""Characters before the seed; file systems allow 255 bytes."""


def default_run_name(script: str, args: argparse.Namespace, changed: Iterable[str]) -> str:
    """Script, data set, teacher, student, the values of changed flags, and the seed."""
    preset = "paper" if getattr(args, "preset", "default") == "paper" else None
    networks = (short_name(str(getattr(args, flag))) for flag in ("dataset", "teacher", "student") if flag in args)
    parts = [Path(script).stem.removesuffix("_cifar100"), *networks, preset]
    parts += [f"{flag}{_compact(getattr(args, flag))}" for flag in changed]
    name = "_".join(part for part in parts if part)
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}_seed{args.seed}"


def _compact(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(str, value)) or "-none"
    if isinstance(value, float):
        parts = 255 * value
        levels = f"{parts:.0f}-255" if math.isclose(round(parts), parts) else f"{value:g}"
        return min(f"{value:g}", levels, key=len)
    return f"-{value}" if isinstance(value, str) else str(value)
