"""The contract of a run folder: what config.json, metrics.jsonl, result.json and records of evaluate.py hold.

Runs and evaluate.py write these files; study.py, compare.py and a records file in docs/results read them through the
models here. Accuracies are fractions from 0 to 1, times are seconds, epochs count from 1. A field that a model does not
name is kept as it is.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from experiment import UserError
from experiment.files import advice, read_json
from experiment.text import ABSENT, AUTOATTACK_STEPS, short_text

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Record(BaseModel):
    """A JSON object. Types are JSON's own: no text is taken for a number, and no truth value for 1."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Settings(Record):
    """The settings of a run that every reader needs; the others are in the same object."""

    teacher: str | None = None
    student: str
    dataset: str
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
    command: str = ""
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
    flags: Annotated[str, Field(pattern="^[0-4-]*$")] | None = None
    """A character per image: the index in AUTOATTACK_STEPS of the first step at which it is misclassified, or "-".

    A result.json has a text per step instead, of 1 (correctly classified so far) and 0.
    """
    warnings: list[str] | None = None

    @field_validator("flags", mode="before")
    @classmethod
    def _first_misclassified(cls, flags: Any) -> Any:
        if not isinstance(flags, dict):
            return flags
        texts = {str(step): flags[name] for step, name in enumerate(AUTOATTACK_STEPS) if name in flags}
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("AutoAttack's flags should be texts of 0 and 1")
        images = zip(*texts.values(), strict=True)
        return "".join(next((s for s, flag in zip(texts, image, strict=True) if flag == "0"), "-") for image in images)

    @model_validator(mode="after")
    def _one_flag_per_image(self) -> Self:
        if self.flags and len(self.flags) != self.examples:
            raise ValueError(f"AutoAttack's flags are of {len(self.flags)} images, expected {self.examples}")
        return self


class Scalar(Record):
    """Distance and cosine of the input gradients of one scalar of the logits."""

    gd: FiniteFloat
    gc: FiniteFloat


class Gradients(Scalar):
    """Gradient alignment of student and teacher; evaluate.py measures it by scalar too."""

    definition: str
    examples: int = 0
    scalars: dict[str, Scalar] | None = None
    scalars_examples: int = 0
    """Images of `scalars`, where evaluate.py's report completes a run's own figures."""


class Evaluation(Record):
    """A record of evaluate.py, as far as it is compared."""

    student_sha256: str | None = None
    dataset_sha256: str | None = None
    teacher_sha256: str | None = None
    gradients: Gradients | None = None


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
    epochs: Count
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


def read_config(folder: Path) -> Config:
    """Read a run's config.json; UserError if it is missing or holds what no run writes."""
    return checked(Config, read_json(folder / "config.json"), folder / "config.json")


def read_result(folder: Path) -> Result:
    """Read a finished run's result.json; UserError if it is missing or holds what no run writes."""
    path = folder / "result.json"
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a finished run: it has no result.json. {advice(folder)}")
    return checked(Result, read_json(path), path)


def check_student(folder: Path, result: Result, sha256: str) -> None:
    """Raise UserError if student.pt, whose state dict has this SHA-256, is not the student of result.json."""
    if result.student_sha256 not in (None, sha256):
        raise UserError(f"{folder}/result.json was measured on another student than student.pt (SHA-256 {sha256})")
