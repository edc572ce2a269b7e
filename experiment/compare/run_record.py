"""One run as tables and figures see it: config.json, metrics.jsonl and result.json, read and checked."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment import UserError
from experiment.cli import LATER_SETTINGS, Role, settings_with
from experiment.files import file_sha256, read_json, read_metrics
from experiment.records import ATTACKS, Config, Evaluation, GradientReport, Gradients, Result, Row, Settings, checked
from experiment.text import comma_list, short_name, short_text

FIRST_BROKEN_BY = ("clean", *ATTACKS)
"""AutoAttack's attacks in their order, after the clean pass."""
CURVES = ("clean", "pgd20", "holdout_pgd10")
EPOCHS_OF_A_PEAK = 5
"""A curve of fewer evaluated epochs has no peak."""
PICTURES = {".png": "png", ".svg": "svg+xml"}
"""Their media types, by the ending of a file."""


@dataclass(frozen=True)
class Experiment:
    """What is trained: the method, the networks, the data and the settings."""

    method: str
    added: str | None
    """What the script adds to the base method, such as a module of another paper."""
    teacher: str
    student: str
    dataset: str
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The method, with what it adds."""
        return "+".join(part for part in (self.method, self.added) if part)

    @property
    def teacher_name(self) -> str:
        """The teacher's name; of a path its last part."""
        return short_name(self.teacher)

    @property
    def student_name(self) -> str:
        """As `teacher_name`."""
        return short_name(self.student)

    @property
    def dataset_name(self) -> str:
        """The data set's name; of a path its last part, with the file type."""
        return Path(self.dataset).name


@dataclass(frozen=True)
class PendingRun(Experiment):
    """A run that is not finished: shown, never compared."""

    folder: str
    state: str


@dataclass(frozen=True)
class RunRecord(Experiment):
    """A finished run. Its `settings` are what must be equal for two runs to be repetitions of one experiment."""

    folder: Path
    base_script: str
    """The script's name without what it adds: the same for a baseline and the version with an addition."""
    added_settings: tuple[str, ...]
    method_settings: tuple[str, ...]
    """Flags that only the base method has."""
    environment: dict[str, str]
    """What may change a figure slightly and is worth a note: hardware, versions, commit."""
    values: dict[str, float]
    """What was measured, under the names of --csv; accuracies are fractions in [0, 1]."""
    test_examples: int
    attack: dict[str, Any]
    """AutoAttack's epsilon, version, seed and examples; empty if it was not run."""
    flags: str
    """Per attacked image the index in FIRST_BROKEN_BY of the first attack that succeeded, '-' if none; may be empty."""
    best_flags: str
    """The same for the best epoch, if AutoAttack measured it."""
    gradients: dict[str, Any]
    """gd, gc, definition; where evaluate.py measured them, also scalars and scalars_examples."""
    warnings: tuple[str, ...]
    """AutoAttack's warnings, such as masked gradients."""
    curves: dict[str, dict[int, float]]
    """Accuracy by epoch, per name in CURVES."""
    seconds: dict[str, float]
    hashes: dict[str, str]
    command: str
    pictures: tuple[Path, ...] = ()
    """Figures that evaluate.py made of the final student."""


def read_run(folder: Path) -> RunRecord:
    """Read the files of one finished run; anything that a run does not write is a UserError."""
    config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
    rows, evaluations = read_metrics(folder / "metrics.jsonl"), _evaluations(folder, config, result)
    if report := _gradient_report(config, evaluations):
        kept = {"scalars": report.model_dump()["scalars"], "scalars_examples": report.examples}
        result = {**result, "gradients": report.model_dump() | kept | (result.get("gradients") or {})}
    student = folder / "student.pt"
    weights = file_sha256(student) if student.is_file() else None
    files = sorted((folder / "evaluations").iterdir()) if evaluations else []
    pictures = tuple(path for path in files if path.suffix in PICTURES)
    return checked_run(folder, config, result, rows, weights, pictures)


def _evaluations(folder: Path, config: dict[str, Any], result: dict[str, Any]) -> list[Evaluation]:
    """Records of evaluate.py, oldest first: those of the run's final student, on the run's data."""
    if not (folder / "evaluations").is_dir():
        return []
    from experiment.evaluation import records  # with torch, which takes seconds

    # best.pt, an unfinished last.pt and other data leave their records in the same place.
    wanted = (result.get("student_sha256"), config.get("dataset_sha256"))
    found = [checked(Evaluation, record, Path(record["file"])) for record in records(folder)]
    return [record for record in found if (record.student_sha256, record.dataset_sha256) == wanted]


def _gradient_report(config: dict[str, Any], evaluations: list[Evaluation]) -> GradientReport | None:
    """evaluate.py's report on gradients with the run's teacher, if any, and epsilon: on the most images, newest."""
    epsilon = checked(Settings, config.get("settings"), Path("config.json")).epsilon if evaluations else 0
    reports = [
        record.gradients
        for record in reversed(evaluations)
        if record.gradients
        and config.get("teacher_sha256") in (None, record.teacher_sha256)
        and math.isclose(record.gradients.epsilon, epsilon, abs_tol=1e-9)
    ]
    return max(reports, key=lambda report: report.examples, default=None)


def checked_run(
    folder: Path,
    config: dict[str, Any],
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    weights: str | None,
    pictures: tuple[Path, ...] = (),
) -> RunRecord:
    """A run from what its files hold and the hash of its student.pt.

    Raises:
        UserError: a file holds what no run writes, or the files are of two runs.
    """
    made = checked(Config, config, folder / "config.json")
    checked(Settings, made.settings, folder / "config.json")
    ended = checked(Result, result, folder / "result.json")
    epochs = [checked(Row, row, folder / "metrics.jsonl") for row in rows]
    for key in ("script", "method", "adds"):
        if config.get(key) != result.get(key):
            raise UserError(
                f"{folder} holds files of two runs: {key} is {short_text(config.get(key))} in config.json and "
                f"{short_text(result.get(key))} in result.json"
            )
    may_differ = settings_with(Role.MAY_DIFFER)
    settings = {key: value for key, value in {**LATER_SETTINGS, **made.settings}.items() if key not in may_differ}
    settings |= {key: config.get(key) for key in ("dataset_sha256", "num_classes", "teacher_sha256")}
    attack, curves = ended.autoattack, {name: _curve(epochs, name) for name in CURVES}
    kept = {key: getattr(attack, key) for key in ("epsilon", "version", "seed", "examples")} if attack else {}
    # The seed of AutoAttack is the run's own by default: it is compared seed by seed.
    settings |= {f"AutoAttack {key}": value for key, value in kept.items() if key != "seed"}
    hashes = {"dataset": made.dataset_sha256, "teacher": made.teacher_sha256, "student": ended.student_sha256}
    hashes |= {"code": made.code_sha256, "weights": weights}
    # Chunks of another size draw other random numbers.
    of_attack = {"AutoAttack batch": attack.batch, "AutoAttack package": attack.package} if attack else {}
    return RunRecord(
        folder=folder,
        method=made.method,
        added=made.adds,
        base_script=made.script.replace(f"_{made.adds}", "") if made.adds else made.script,
        added_settings=tuple(made.added_settings),
        method_settings=tuple(made.outer_settings),
        settings=settings,
        environment={
            "hardware": ended.hardware,
            "commit": made.commit or "unknown",
            "changed before a resumption": comma_list(ended.changed or ["nothing"]),
            **{f"{package} version": str(version) for package, version in made.versions.items()},
            **{key: str(value) for key, value in of_attack.items() if value is not None},
        },
        teacher=ended.teacher or "-",
        student=ended.student,
        dataset=ended.dataset,
        seed=ended.seed,
        values=_values(ended, curves),
        test_examples=ended.test_examples,
        attack=kept,
        flags=broken_by(attack.flags) if attack and attack.flags else "",
        best_flags=broken_by(ended.best.autoattack.flags or {}) if ended.best and ended.best.autoattack else "",
        gradients=_gradients(ended.gradients),
        warnings=tuple(attack.warnings or ()) if attack else (),
        curves=curves,
        seconds=ended.seconds,
        hashes={key: value for key, value in hashes.items() if value is not None},
        command=ended.command,
        pictures=pictures,
    )


def broken_by(flags: dict[str, str]) -> str:
    """AutoAttack's flags, in a file one text per attack, as one character per image: see ``RunRecord.flags``."""
    steps = [(str(FIRST_BROKEN_BY.index(name)), text) for name, text in flags.items() if name in FIRST_BROKEN_BY]
    images = zip(*(text for _, text in steps), strict=True)
    names = [step for step, _ in steps]
    return "".join(
        next((name for name, flag in zip(names, image, strict=True) if flag == "0"), "-") for image in images
    )


def _gradients(found: Gradients | None) -> dict[str, Any]:
    """gd, gc and their definition; of evaluate.py's report gd and gc of the logit and the number of images."""
    if found is None:
        return {}
    kept: dict[str, Any] = {"gd": found.gd, "gc": found.gc, "definition": found.definition}
    if logit := (found.scalars or {}).get("logit"):
        kept["scalars"] = {"logit": {"gd": logit.gd, "gc": logit.gc}}
        kept["scalars_examples"] = found.scalars_examples
    return kept


def _values(ended: Result, curves: dict[str, dict[int, float]]) -> dict[str, float]:
    """What was measured, under the names of --csv."""
    values = {"clean": ended.clean, "pgd20": ended.pgd20}
    if ended.autoattack:
        values["autoattack"] = ended.autoattack.accuracy
    gradients = _gradients(ended.gradients)
    values |= {key: gradients[key] for key in ("gd", "gc") if gradients}
    values |= {f"logit_{key}": value for key, value in gradients.get("scalars", {}).get("logit", {}).items()}
    if ended.best:
        values["best_minus_last"] = ended.best.pgd20 - ended.pgd20
    if ended.swa and ended.swa.autoattack:
        values["swa_autoattack"] = ended.swa.autoattack.accuracy
    if holdout := curves["holdout_pgd10"]:
        values["holdout_pgd10"] = holdout[max(holdout)]
    if len(curve := curves["pgd20"]) >= EPOCHS_OF_A_PEAK:
        values["peak_minus_last"] = max(curve.values()) - curve[max(curve)]
    if ended.best and ended.best.autoattack:
        values["best_autoattack"] = ended.best.autoattack.accuracy
    return values


def _curve(rows: list[Row], name: str) -> dict[int, float]:
    return {row.epoch: getattr(row, name) for row in rows if getattr(row, name) is not None}
