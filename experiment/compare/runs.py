"""Runs as tables and figures see them: finished ones with what was measured, and unfinished ones."""

import functools
import tomllib
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from importlib import resources
from math import isclose
from pathlib import Path
from typing import Any

from experiment.cli import ALIASES, LATER_SETTINGS, Role, settings_with
from experiment.records import Attack, Config, Result, Row
from experiment.text import comma_list, short_name

CURVES = ("clean", "pgd20", "holdout_pgd10")
EPOCHS_OF_A_PEAK = 5
"""A curve of fewer evaluated epochs has no peak."""
FIGURES = ("clean", "pgd20", "autoattack")
"""Of a cell in published.toml."""
SHORT_NAMES = {name: alias for alias, name in ALIASES.items()}


@functools.cache
def published() -> dict[str, Any]:
    """published.toml: figures that others published, and under "source" who did, on which data and for how long."""
    return tomllib.loads(resources.files("experiment.compare").joinpath("published.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, eq=False)
class Experiment:
    """What is trained: a method, with what its script adds to the base method, and its settings."""

    method: str
    added: str | None
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The method, with what it adds."""
        return "+".join(part for part in (self.method, self.added) if part)

    @property
    def teacher(self) -> str:
        """'-' for a network without a teacher."""
        return self.settings.get("teacher") or "-"

    @property
    def student(self) -> str:
        """Its architecture."""
        return self.settings["student"]

    @property
    def dataset(self) -> str:
        """A name or a path."""
        return self.settings["dataset"]

    @property
    def seed(self) -> int:
        """Of everything that is random."""
        return self.settings["seed"]

    @property
    def setting(self) -> tuple[str, str, str]:
        """Teacher, student and dataset."""
        return self.teacher, self.student, self.dataset

    @property
    def names(self) -> dict[str, str]:
        """As `setting`, by these words; of a path the last part."""
        short = {"teacher": short_name(self.teacher), "student": short_name(self.student)}
        return {**short, "dataset": Path(self.dataset).name}

    @property
    def published(self) -> dict[str, float]:
        """Clean, PGD-20 and AutoAttack accuracy published for the method, networks and data; {} if none are."""
        source, settings = published()["source"], self.settings
        if self.dataset != source["dataset"] or not isclose(settings["epsilon"], Fraction(source["epsilon"])):
            return {}
        if any(settings.get(name) for name in ("side", "train_examples", "holdout")):  # a part of the training images
            return {}
        by_teacher = published()["cells"].get(self.student, {})
        cell = by_teacher.get(SHORT_NAMES.get(self.teacher, self.teacher), {}).get(self.name, ())
        return {figure: value / 100 for figure, value in zip(FIGURES, cell, strict=bool(cell))}

    @property
    def published_teacher(self) -> dict[str, float]:
        """Clean and AutoAttack accuracy of one of RobustBench's teachers, as it publishes them; {} for others."""
        if self.dataset != published()["source"]["dataset"]:
            return {}
        cell = published()["teachers"].get(SHORT_NAMES.get(self.teacher, self.teacher), ())
        return {figure: value / 100 for figure, value in zip(("clean", "autoattack"), cell, strict=bool(cell))}


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
    """Figures that evaluate.py made of the final student."""

    @property
    def base_script(self) -> str:
        """The script's name without what it adds: the same for a baseline and the version with an addition."""
        return self.config.script.replace(f"_{self.added}", "")

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """The settings and data that must be equal for two runs to be repetitions of one experiment."""
        may_differ = settings_with(Role.MAY_DIFFER)
        settings = {key: value for key, value in (LATER_SETTINGS | self.settings).items() if key not in may_differ}
        return settings | {
            key: getattr(self.config, key) for key in ("dataset_sha256", "num_classes", "teacher_sha256")
        }

    @property
    def attack(self) -> Attack | None:
        """AutoAttack on the final student."""
        return self.result.autoattack

    @property
    def best_attack(self) -> Attack | None:
        """AutoAttack on the best epoch."""
        return self.result.best.autoattack if self.result.best else None

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """Accuracy by epoch, per name in CURVES."""
        return {
            name: {row.epoch: value for row in self.rows if (value := getattr(row, name)) is not None}
            for name in CURVES
        }

    @cached_property
    def values(self) -> dict[str, float]:
        """What was measured, under the names of --csv; accuracies are fractions."""
        result, gradients = self.result, self.result.gradients
        logit = (gradients.scalars or {}).get("logit") if gradients else None
        pgd20, holdout = (list(self.curves[name].values()) for name in ("pgd20", "holdout_pgd10"))
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
        attack = self.attack
        # Chunks of another size draw other random numbers.
        of_attack = {"AutoAttack batch": attack.batch, "AutoAttack package": attack.package} if attack else {}
        return {
            "hardware": self.result.hardware,
            "commit": self.config.commit or "unknown",
            "changed before a resumption": comma_list(self.result.changed or ["nothing"]),
            **{f"{package} version": str(version) for package, version in self.config.versions.items()},
            **{key: str(value) for key, value in of_attack.items() if value is not None},
        }

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of data, teacher, student and code, as far as the run recorded them."""
        config = self.config
        hashes = {"dataset": config.dataset_sha256, "teacher": config.teacher_sha256}
        hashes |= {"student": self.result.student_sha256, "code": config.code_sha256}
        return {name: value for name, value in hashes.items() if value}
