"""compare.py --html: one page that opens without network and is read without a script."""

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from experiment.compare.comparison import Comparison
from experiment.compare.figures import rendered
from experiment.compare.notes import verdicts
from experiment.compare.read import PICTURES
from experiment.text import TEXT_COLUMNS, Table

ABOUT = {
    "comparison": "PGD-20 and clean accuracy by epoch (bands: one standard deviation over seeds) and AutoAttack. "
    "Dashed, hollow, hatched: a baseline. Solid: with its addition. Dotted: the teacher, as published by RobustBench.",
    "gains": "Gain over the baseline, with its 95 % interval and a dot per seed.",
    "alignment": "Gradient alignment against AutoAttack accuracy. Arrows lead from a baseline to the version with an "
    "addition.",
}
"""The caption of each figure, also for screen readers."""


def page(comparison: Comparison, tables: Sequence[Table], notes: Sequence[str], figures: Mapping[str, Any]) -> str:
    """The gains in sentences, tables, notes, figures, and each run's command, versions and hashes."""
    from jinja2 import Environment

    template = resources.files("experiment.compare").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    runs = [(group.label, run) for group in comparison.groups for run in group.runs]
    pictures = [(ABOUT[name], "svg+xml", rendered(figure, "svg")) for name, figure in figures.items()]
    pictures += [
        (f"evaluate.py, {label}, seed {run.seed}: {path.stem}", PICTURES[path.suffix], path.read_bytes())
        for label, run in runs
        for path in run.pictures
    ]
    return environment.from_string(template).render(
        title=", ".join(dict.fromkeys(run.name for _, run in runs)) or "Runs that are not finished",
        verdicts=verdicts(comparison),
        tables=tables,
        text_columns=TEXT_COLUMNS,
        notes=notes,
        pictures=[
            (caption, f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
            for caption, kind, content in pictures
        ],
        runs=runs,
    )
