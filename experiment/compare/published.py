"""Figures that others published, shown beside ours; their file is published.toml."""

import functools
import tomllib
from collections.abc import Mapping
from fractions import Fraction
from importlib import resources
from math import isclose
from typing import Any

from experiment.cli import ALIASES
from experiment.compare.runs import Experiment

FIGURES = ("clean", "pgd20", "autoattack")
IMAGES = 10_000
"""Under AutoAttack, in the published figures."""
SHORT_NAMES = {name: alias for alias, name in ALIASES.items()}


@functools.cache
def _published() -> dict[str, Any]:
    return tomllib.loads(resources.files("experiment.compare").joinpath("published.toml").read_text(encoding="utf-8"))


def source() -> Mapping[str, Any]:
    """Who published the cells: name, dataset, epsilon, epochs by method."""
    return _published()["source"]


def published_cell(run: Experiment) -> dict[str, float] | None:
    """Clean, PGD-20 and AutoAttack accuracy (fractions) published for a run's method, networks and data, if any."""
    settings = run.settings
    if run.dataset != source()["dataset"]:
        return None
    if not isclose(settings["epsilon"], Fraction(source()["epsilon"])):
        return None
    if any(settings.get(name) for name in ("side", "train_examples", "holdout")):  # a part of the training images
        return None
    teacher = SHORT_NAMES.get(run.teacher, run.teacher)
    cell = _published()["cells"].get(run.student, {}).get(teacher, {}).get(run.name)
    return {figure: value / 100 for figure, value in zip(FIGURES, cell, strict=True)} if cell else None


def teacher_figures(teacher: str, dataset: str) -> dict[str, float]:
    """Clean and AutoAttack accuracy (fractions) of one of RobustBench's teachers, as it publishes them; may be {}."""
    figures = _published()["teachers"].get(SHORT_NAMES.get(teacher, teacher))
    if not figures or dataset != source()["dataset"]:
        return {}
    return {"clean": figures[0] / 100, "autoattack": figures[1] / 100}
