"""A run as the tables and figures see it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiment.compare.text import number_or_0
from experiment.text import short_name

FIRST_BROKEN_BY = ("clean", "apgd-ce", "apgd-t", "fab-t", "square")
"""AutoAttack's attacks in their order, after the clean pass."""


EPOCHS_OF_A_PEAK = 5
"""Below so many evaluated epochs a curve has no peak to speak of."""


def on_part(settings: Mapping[str, Any]) -> bool:
    """See ``RunRecord.on_part``."""
    return any(settings.get(name) for name in ("side", "train_examples", "holdout"))


@dataclass(frozen=True)
class RunRecord:
    """One run as its files tell it; accuracies are fractions in [0, 1]."""

    folder: Path
    method: str
    added: str | None
    """What the script adds to the base method, such as a module of another paper."""
    base_script: str
    """The script's name without what it adds: a baseline and its twin share it."""
    added_settings: tuple[str, ...]
    method_settings: tuple[str, ...]
    """Flags that are the base method's own."""
    settings: dict[str, Any]
    """What must be equal for two runs to be repetitions of one experiment: settings, data, teacher, AutoAttack."""
    environment: dict[str, str]
    """What may change a figure slightly and is worth a note: hardware, versions, commit."""
    teacher: str
    student: str
    dataset: str
    seed: int
    clean: float
    pgd20: float
    test_examples: int
    autoattack: float | None
    attack: dict[str, Any]
    """AutoAttack's epsilon, version, seed, examples and accuracy after each attack; empty if it was not run."""
    flags: str
    """Per attacked image the digit of the step of FIRST_BROKEN_BY that it fell to, '-' if to none; may be empty."""
    gradients: dict[str, Any]
    """gd, gc and their definition, where evaluate.py measured it also its "scalars"; empty without a teacher."""
    best: dict[str, Any]
    """The checkpoint chosen on held-out training images; empty if none was kept."""
    swa: dict[str, Any]
    warnings: tuple[str, ...]
    """What AutoAttack warned of, such as masked gradients."""
    curves: dict[str, dict[int, float]]
    """By figure (accuracies, loss terms): value by epoch."""
    seconds: dict[str, float]
    hashes: dict[str, str]
    command: str
    evaluations: tuple[dict[str, Any], ...] = field(default=(), compare=False)
    """Records of evaluate.py on the final student and the run's data, oldest first."""

    @property
    def name(self) -> str:
        """The method, with what it adds."""
        return "+".join(part for part in (self.method, self.added) if part)

    @property
    def teacher_name(self) -> str:
        """The teacher's name, of a path its last part."""
        return short_name(self.teacher)

    @property
    def on_part(self) -> bool:
        """Whether it saw a part of the training images, or smaller ones: nobody's published experiment."""
        return on_part(self.settings)

    @property
    def epsilon(self) -> float:
        """The attack's budget in training; 0 if the settings have none."""
        return number_or_0(self.settings.get("epsilon"))

    @property
    def best_minus_last(self) -> float | None:
        """PGD-20 accuracy of the best checkpoint minus that of the last: robust overfitting."""
        return self.best["pgd20"] - self.pgd20 if self.best.get("pgd20") is not None else None

    @property
    def peak_minus_last(self) -> float | None:
        """Highest PGD-20 accuracy of any evaluated epoch minus the last one's; the test images choose the epoch."""
        curve = self.curves["pgd20"]
        return max(curve.values()) - curve[max(curve)] if len(curve) >= EPOCHS_OF_A_PEAK else None

    @property
    def gd(self) -> float | None:
        """Distance between the student's and the teacher's input gradients; lower is closer."""
        return self.gradients.get("gd")

    @property
    def gc(self) -> float | None:
        """Cosine between the student's and the teacher's input gradients; higher is closer."""
        return self.gradients.get("gc")

    def of_scalar(self, scalar: str, key: str) -> float | None:
        """What evaluate.py's report on gradients says about "probability" or "logit"."""
        return self.gradients.get("scalars", {}).get(scalar, {}).get(key)

    @property
    def logit_gd(self) -> float | None:
        """Distance between the input gradients of the true class's logit."""
        return self.of_scalar("logit", "gd")

    @property
    def logit_gc(self) -> float | None:
        """Cosine between the input gradients of the true class's logit."""
        return self.of_scalar("logit", "gc")

    @property
    def holdout_pgd10(self) -> float | None:
        """PGD-10 accuracy of the last epoch on held-out training images."""
        curve = self.curves["holdout_pgd10"]
        return curve[max(curve)] if curve else None

    @property
    def swa_autoattack(self) -> float | None:
        """AutoAttack accuracy of the averaged weights."""
        return (self.swa.get("autoattack") or {}).get("accuracy")

    def withstood(self) -> list[bool]:
        """Per attacked image whether it withstood all of AutoAttack; empty for a record without flags."""
        return [flag == "-" for flag in self.flags]


@dataclass(frozen=True)
class PendingRun:
    """A run that is not finished: shown, never compared."""

    name: str
    teacher: str
    student: str
    dataset: str
    epsilon: float
    seed: int
    state: str
    folder: str
    on_part: bool = False
    """As of a finished run."""

    @property
    def teacher_name(self) -> str:
        """The teacher's name, of a path its last part."""
        return short_name(self.teacher)
