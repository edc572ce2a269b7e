"""compare.py --html: one page that opens without network and is read without a script."""

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from experiment.compare.comparison import Comparison
from experiment.compare.figures import svg
from experiment.compare.notes import verdicts
from experiment.compare.run_record import PICTURES
from experiment.text import TEXT_COLUMNS, Table

ABOUT = {
    "comparison": "PGD-20 and clean accuracy by epoch (bands: one standard deviation over seeds) and AutoAttack. "
    "Dashed, hollow, hatched: a baseline. Solid: with its addition. Dotted: the teacher.",
    "gains": "Gain over the baseline, with its 95 % interval and a dot per seed.",
    "alignment": "Gradient alignment against AutoAttack accuracy. Arrows lead from a baseline to the version with an "
    "addition.",
}
"""The caption of each figure, also for screen readers."""


def page(comparison: Comparison, tables: Sequence[Table], notes: Sequence[str], figures: Mapping[str, Any]) -> str:
    """The gains in sentences, tables, notes, figures as SVG, and each run's command, versions and hashes."""
    from jinja2 import Environment

    template = resources.files("experiment.compare").joinpath("page.html").read_text(encoding="utf-8")
    # Everything is escaped but the SVG, whose text matplotlib escapes.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    runs = [(group.label, run) for group in comparison.groups for run in group.runs]
    return environment.from_string(template).render(
        title=", ".join(dict.fromkeys(run.name for _, run in runs)) or "Runs that are not finished",
        verdicts=verdicts(comparison),
        tables=tables,
        text_columns=TEXT_COLUMNS,
        notes=notes,
        figures=[(name, ABOUT[name], _with_own_ids(svg(figure), name)) for name, figure in figures.items()],
        pictures=[
            (
                f"{label}, seed {run.seed}: {path.stem}",
                f"data:image/{PICTURES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}",
            )
            for label, run in runs
            for path in run.pictures
        ],
        runs=runs,
    )


def _with_own_ids(text: str, name: str) -> str:
    """Ids that no other figure of the page has."""
    for attribute in ('id="', "url(#", 'xlink:href="#'):
        text = text.replace(attribute, f"{attribute}{name}-")
    return text
