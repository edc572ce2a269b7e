"""The contract of a run folder: what config.json, metrics.jsonl, result.json and records of evaluate.py hold.

Runs and evaluate.py write these files; study.py, compare.py and a records file in docs/results read them through the
models here. Accuracies are fractions from 0 to 1, times are seconds, epochs count from 1. A field that a model does not
name is kept as it is.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from experiment import UserError
from experiment.text import ABSENT, short_text

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""AutoAttack's attacks in their order. Versions for few classes lack some."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Record(BaseModel):
    """A JSON object. Types are JSON's own: no text is taken for a number, and no truth value for 1."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Settings(Record):
    """The settings of a run that every reader needs; the others are in the same object."""

    epsilon: Fraction
    epochs: Count
    seed: int


class Config(Record):
    """config.json: what a run is made of."""

    format: Literal[1]
    script: str
    method: str
    adds: str | None
    outer_settings: list[str] = []
    """Flags that only the base method has."""
    added_settings: list[str]
    """Flags of what the script adds to the base method."""
    settings: dict[str, Any]
    versions: dict[str, Any]
    commit: str | None = None
    code_sha256: str | None = None
    num_classes: Count
    dataset_sha256: str
    teacher_sha256: str | None = None


class Attack(Record):
    """AutoAttack's result."""

    accuracy: Fraction
    epsilon: Fraction
    version: str
    seed: int
    examples: Count
    batch: Any = None
    package: Any = None
    flags: dict[str, str] | None = None
    """For "clean" and each attack one character per image: 1 if it is classified correctly so far, else 0."""
    warnings: list[str] | None = None

    @model_validator(mode="after")
    def _one_flag_per_image(self) -> Self:
        flags = self.flags or {}
        needed = {"clean", ATTACKS[-1]} if flags else set()
        if needed - set(flags) or any(len(text) != self.examples or set(text) - {"0", "1"} for text in flags.values()):
            raise ValueError("AutoAttack's flags should be one of 0 and 1 per image and attack")
        return self


class Scalar(Record):
    """Distance and cosine of the input gradients of one scalar of the logits."""

    gd: FiniteFloat
    gc: FiniteFloat


class Gradients(Scalar):
    """Gradient alignment of student and teacher; with evaluate.py's report also by scalar."""

    definition: str
    scalars: dict[str, Scalar] | None = None
    scalars_examples: int = 0


class GradientReport(Gradients):
    """evaluate.py's report on input gradients, in the record of an evaluation."""

    examples: Count
    epsilon: Fraction


class Evaluation(Record):
    """A record of evaluate.py, as far as it is compared."""

    student_sha256: str | None = None
    dataset_sha256: str | None = None
    teacher_sha256: str | None = None
    gradients: GradientReport | None = None
    file: str = ""


class Checkpoint(Record):
    """Another checkpoint than the last: the best epoch on held-out images, or averaged weights."""

    clean: Fraction
    pgd20: Fraction
    autoattack: Attack | None = None


class Result(Record):
    """result.json: what came out of a run."""

    format: Literal[1]
    script: str
    method: str
    adds: str | None
    teacher: str | None = None
    student: str
    dataset: str
    seed: int
    clean: Fraction
    pgd20: Fraction
    test_examples: Count
    autoattack: Attack | None = None
    gradients: Gradients | None = None
    best: Checkpoint | None = None
    swa: Checkpoint | None = None
    seconds: dict[str, FiniteFloat] = {}
    student_sha256: str | None = None
    hardware: str
    command: str
    changed: list[str] | None = None
    """Parts of the environment that changed between the run's start and its resumptions."""


class Row(Record):
    """A row of metrics.jsonl: an epoch. Loss terms are further fields, ``loss_<name>``."""

    epoch: Count
    clean: Fraction | None = None
    pgd20: Fraction | None = None
    holdout_pgd10: Fraction | None = None


Model = TypeVar("Model", bound=Record)


def checked(model: type[Model], values: Any, path: Path) -> Model:
    """The values as a model.

    Raises:
        UserError: a field is missing or not what the model says; the message names the file, the field and the value.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the content"
        found = ABSENT if first["type"] == "missing" else short_text(first["input"])
        raise UserError(f"{path}: {where} is {found}: {first['msg']}. Was the file edited?") from error
