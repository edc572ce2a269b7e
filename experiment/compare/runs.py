"""Runs as tables and figures see them: finished ones with what was measured, and unfinished ones."""

import functools
import tomllib
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import isclose
from pathlib import Path
from typing import Any

from experiment.cli import ALIASES, LATER_SETTINGS, Role, settings_with
from experiment.records import Attack, Config, Result, Row, Settings
from experiment.text import comma_list, short_name

EPOCHS_OF_A_PEAK = 5
"""A curve of fewer evaluated epochs has no peak."""
FIGURES = ("clean", "pgd20", "autoattack")
"""Of a cell in published.toml."""
SHORT_NAMES = {name: alias for alias, name in ALIASES.items()}


@functools.cache
def published() -> dict[str, Any]:
    """published.toml: figures that others published, and under "source" who did, on which data and for how long."""
    return tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, eq=False)
class Experiment:
    """What is trained: a method, with what its script adds to the base method, and its settings."""

    method: str
    added: str | None
    settings: Settings

    @property
    def name(self) -> str:
        """The method, with what it adds."""
        return "+".join(part for part in (self.method, self.added) if part)

    @property
    def setting(self) -> tuple[str, str, str]:
        """Teacher ('-' for a network without one), student and dataset: names or paths."""
        return self.settings.teacher or "-", self.settings.student, self.settings.dataset

    @property
    def names(self) -> dict[str, str]:
        """As `setting`, by these words; of a path the last part."""
        teacher, student, dataset = self.setting
        return {"teacher": short_name(teacher), "student": short_name(student), "dataset": Path(dataset).name}

    @property
    def where(self) -> str:
        """As `setting`, in a note."""
        return comma_list([self.names["teacher"], *self.setting[1:]])

    @property
    def published(self) -> dict[str, float]:
        """Clean, PGD-20 and AutoAttack accuracy published for the method, networks and data; {} if none are."""
        source, others = published()["source"], self.settings.model_extra
        teacher, student, dataset = self.setting
        if dataset != source["dataset"] or not isclose(self.settings.epsilon, Fraction(source["epsilon"])):
            return {}
        if any(others.get(name) for name in ("side", "train_examples", "holdout")):  # a part of the training images
            return {}
        by_teacher = published()["cells"].get(student, {})
        cell = by_teacher.get(SHORT_NAMES.get(teacher, teacher), {}).get(self.name, ())
        return {figure: value / 100 for figure, value in zip(FIGURES, cell, strict=bool(cell))}


@dataclass(frozen=True, eq=False)
class PendingRun(Experiment):
    """A run that is not finished: shown, never compared."""

    folder: str
    state: str


@dataclass(frozen=True, eq=False)
class RunRecord(Experiment):
    """A finished run."""

    folder: Path
    config: Config
    result: Result
    rows: list[Row]
    """Of metrics.jsonl."""
    pictures: tuple[Path, ...] = ()
    """Figures that evaluate.py made in this run's folder."""

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def pair(self) -> tuple[str, ...]:
        """What a baseline and the version with an addition share."""
        teacher, student, dataset = self.setting
        if "teacher" in self.config.added_settings:  # the baseline has none
            teacher = "-"
        return self.method, self.config.script.replace(f"_{self.added}", ""), teacher, student, dataset

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """The settings and data that must be equal for two runs to be repetitions of one experiment."""
        may_differ = settings_with(Role.MAY_DIFFER)
        settings = LATER_SETTINGS | self.config.settings
        data = {key: getattr(self.config, key) for key in ("dataset_sha256", "num_classes", "teacher_sha256")}
        return {key: value for key, value in settings.items() if key not in may_differ} | data

    @property
    def attack(self) -> Attack | None:
        """AutoAttack on the final student."""
        return self.result.autoattack

    @property
    def best_attack(self) -> Attack | None:
        """AutoAttack on the best epoch."""
        return self.result.best.autoattack if self.result.best else None

    def curve(self, name: str) -> dict[int, float]:
        """An accuracy of metrics.jsonl by epoch: clean, pgd20 or holdout_pgd10."""
        return {row.epoch: value for row in self.rows if (value := getattr(row, name)) is not None}

    @cached_property
    def values(self) -> dict[str, float]:
        """What was measured, under the names of --csv; accuracies are fractions."""
        result, gradients = self.result, self.result.gradients
        logit = (gradients.scalars or {}).get("logit") if gradients else None
        pgd20, holdout = (list(self.curve(name).values()) for name in ("pgd20", "holdout_pgd10"))
        values = {
            "clean": result.clean,
            "pgd20": result.pgd20,
            "autoattack": self.attack and self.attack.accuracy,
            "gd": gradients and gradients.gd,
            "gc": gradients and gradients.gc,
            "logit_gd": logit and logit.gd,
            "logit_gc": logit and logit.gc,
            "best_minus_last": result.best and result.best.pgd20 - result.pgd20,
            "best_autoattack": self.best_attack and self.best_attack.accuracy,
            "holdout_pgd10": holdout[-1] if holdout else None,
            "swa_autoattack": result.swa and result.swa.autoattack and result.swa.autoattack.accuracy,
            "peak_minus_last": max(pgd20) - pgd20[-1] if len(pgd20) >= EPOCHS_OF_A_PEAK else None,
        }
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def environment(self) -> dict[str, str]:
        """What may change a figure slightly and is worth a note: hardware, versions, commit."""
        versions = {f"{package} version": str(version) for package, version in self.config.versions.items()}
        changed = ", ".join(self.result.changed or ["none"])
        others = {"commit": self.config.commit or "unknown", "changes when resumed:": changed}
        return {"hardware": self.result.hardware, **others, **versions}
