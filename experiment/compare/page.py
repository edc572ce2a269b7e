"""compare.py --html: one page that opens without network and is read without a script."""

from collections.abc import Sequence
from importlib import resources
from typing import Any

from experiment.compare import figures
from experiment.compare.comparison import Comparison
from experiment.compare.groups import SeedGroup, unequal_settings
from experiment.compare.plots import all_figures
from experiment.compare.tables import labels_of
from experiment.text import TEXT_COLUMNS

ABOUT = {
    "comparison": "PGD-20 and clean accuracy by epoch (bands: one standard deviation over seeds) and AutoAttack. "
    "Dashed, hollow, hatched: a baseline. Solid: with its addition. Dotted: the teacher.",
    "gains": "Gain over the baseline, with its 95 % interval and a dot per seed.",
    "alignment": "Do alignment and robustness move together? Arrows lead from a baseline to its twin.",
    "headroom": "Gain against what the teacher is ahead of the baseline.",
}
"""What is read from each figure; also its text for those who do not see it."""

PICTURES = {".png": "png", ".svg": "svg+xml"}


def page(comparison: Comparison) -> str:
    """The page: tables, notes, figures as SVG, settings that differ, commands, versions and hashes."""
    from jinja2 import Environment

    drawn = all_figures(comparison.groups, comparison.gains)
    template = resources.files("experiment.compare").joinpath("page.html").read_text(encoding="utf-8")
    # Everything is escaped but the SVG, whose text matplotlib escapes.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=_title(comparison.groups),
        tables=comparison.tables,
        text_columns=TEXT_COLUMNS,
        notes=comparison.notes,
        figures=[
            {"name": name, "about": ABOUT[name], "svg": _with_own_ids(figures.svg(figure), name)}
            for name, figure in drawn.items()
        ],
        pictures=_pictures(comparison.groups),
        differing=unequal_settings(comparison.groups),
        runs=[
            {"label": label, "run": run}
            for group, label in zip(comparison.groups, labels_of(comparison.groups), strict=True)
            for run in group.runs
        ],
    )


def _title(groups: Sequence[SeedGroup]) -> str:
    names = dict.fromkeys(group.name for group in groups)
    return ", ".join(names) or "Runs that are not finished"


def _with_own_ids(svg: str, name: str) -> str:
    """Ids that no other figure of the page has."""
    for attribute in ('id="', "url(#", 'xlink:href="#'):
        svg = svg.replace(attribute, f"{attribute}{name}-")
    return svg


def _pictures(groups: Sequence[SeedGroup]) -> list[dict[str, Any]]:
    """Figures that evaluate.py wrote into the run folders' evaluations/, as data in the page."""
    import base64

    found = []
    for group in groups:
        for run in group.runs:
            for path in sorted((run.folder / "evaluations").iterdir() if run.evaluations else ()):
                if kind := PICTURES.get(path.suffix):
                    data = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
                    found.append({"name": f"{run.name}, seed {run.seed}: {path.stem}", "data": data})
    return found
