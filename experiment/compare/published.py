"""Figures that others published, for the table beside ours; their file is published.toml."""

import functools
import tomllib
from fractions import Fraction
from importlib import resources
from math import isclose
from typing import Any

from experiment.cli import ALIASES
from experiment.compare.run_record import PendingRun, RunRecord

FIGURES = ("clean", "pgd20", "autoattack")
SHORT_NAMES = {name: alias for alias, name in ALIASES.items()}


@functools.cache
def published_figures() -> dict[str, Any]:
    """The content of published.toml."""
    return tomllib.loads(resources.files("experiment.compare").joinpath("published.toml").read_text(encoding="utf-8"))


def published_cell(run: RunRecord | PendingRun) -> dict[str, float] | None:
    """Clean, PGD-20 and AutoAttack accuracy (fractions) published for a run's method, networks and data, if any."""
    table = published_figures()
    if run.dataset != table["source"]["dataset"] or not isclose(run.epsilon, Fraction(table["source"]["epsilon"])):
        return None
    if run.on_part:
        return None
    teacher = SHORT_NAMES.get(run.teacher, run.teacher)
    cell = table["cells"].get(run.student, {}).get(teacher, {}).get(run.name)
    return {figure: value / 100 for figure, value in zip(FIGURES, cell, strict=True)} if cell else None


def published_epochs(method: str) -> int | None:
    """For how many epochs the published runs of a base method were trained."""
    return published_figures()["source"]["epochs"].get(method)


def source_name() -> str:
    """Who published the cells."""
    return published_figures()["source"]["name"]


def teacher_figures(teacher: str, dataset: str) -> dict[str, float]:
    """Clean and AutoAttack accuracy (fractions) of one of RobustBench's teachers, as it publishes them; may be {}."""
    table = published_figures()
    figures = (
        table["teachers"].get(SHORT_NAMES.get(teacher, teacher)) if dataset == table["source"]["dataset"] else None
    )
    return {"clean": figures[0] / 100, "autoattack": figures[1] / 100} if figures else {}
