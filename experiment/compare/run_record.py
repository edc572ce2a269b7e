"""One run as tables and figures see it: config.json, metrics.jsonl and result.json, read and checked."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment import UserError
from experiment.cli import LATER_SETTINGS, Role, settings_with
from experiment.files import file_sha256, read_json, read_metrics
from experiment.text import ABSENT, comma_list, short_name, short_text

FIRST_BROKEN_BY = ("clean", "apgd-ce", "apgd-t", "fab-t", "square")
"""AutoAttack's attacks in their order, after the clean pass."""
CURVES = ("clean", "pgd20", "holdout_pgd10")
EPOCHS_OF_A_PEAK = 5
"""A curve of fewer evaluated epochs has no peak."""
PICTURES = (".png", ".svg")


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


class _Entries:
    """The entries of a JSON object that a run wrote; any other type is one clear error."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def get(self, key: str, kind: type, *, optional: bool = False) -> Any:
        """The entry, of a JSON type; None where it is optional and missing."""
        value = self.values.get(key)
        # bool is an int to Python, not to JSON.
        if (value is None and optional) or (isinstance(value, kind) and not isinstance(value, bool)):
            return value
        found = short_text(self.values.get(key, ABSENT))
        raise UserError(f"{self.path}: {key} is {found}, which no run writes; was the file edited?")

    def object(self, key: str) -> "_Entries | None":
        """An object inside this one; None if it is missing or empty."""
        value = self.get(key, dict, optional=True)
        return _Entries(value, self.path) if value else None

    def fraction(self, key: str) -> float:
        """A number from 0 to 1."""
        value = self.get(key, int | float)
        if not 0 <= value <= 1:
            raise UserError(f"{self.path}: {key} is {short_text(value)}; a fraction from 0 to 1 is needed")
        return float(value)

    def count(self, key: str) -> int:
        """A whole number from 1."""
        value = self.get(key, int)
        if not 1 <= value < 2**31:
            raise UserError(f"{self.path}: {key} is {short_text(value)}; a whole number from 1 is needed")
        return value


def number_or_0(value: Any) -> float:
    """A number of a file; 0 if the entry is missing or something else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def read_run(folder: Path) -> RunRecord:
    """Read the files of one finished run; anything that a run does not write is a UserError."""
    config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
    rows, evaluations = read_metrics(folder / "metrics.jsonl"), _evaluations(folder, config, result)
    if reported := _gradient_report(config, evaluations):
        result = {**result, "gradients": reported | (result.get("gradients") or {})}
    student = folder / "student.pt"
    weights = file_sha256(student) if student.is_file() else None
    files = sorted((folder / "evaluations").iterdir()) if evaluations else []
    pictures = tuple(path for path in files if path.suffix in PICTURES)
    return checked_run(folder, config, result, rows, weights, pictures)


def _evaluations(folder: Path, config: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of evaluate.py, oldest first: those of the run's final student, on the run's data."""
    if not (folder / "evaluations").is_dir():
        return []
    from experiment.evaluation import records  # with torch, which takes seconds

    # best.pt, an unfinished last.pt and other data leave their records in the same place.
    wanted = ("student_sha256", result.get("student_sha256")), ("dataset_sha256", config.get("dataset_sha256"))
    return [record for record in records(folder) if all(record.get(key) == value for key, value in wanted)]


def _gradient_report(config: dict[str, Any], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """evaluate.py's report on gradients with the run's teacher, if any, and epsilon: on the most images, newest."""
    settings = config.get("settings")
    epsilon = number_or_0(settings.get("epsilon")) if isinstance(settings, dict) else 0
    reports = [
        record["gradients"]
        for record in reversed(evaluations)
        if record.get("gradients")
        and config.get("teacher_sha256") in (None, record.get("teacher_sha256"))
        and math.isclose(number_or_0(record["gradients"].get("epsilon")), epsilon, abs_tol=1e-9)
    ]
    best = max(reports, key=lambda report: number_or_0(report.get("examples")), default={})
    return {**best, "scalars_examples": best["examples"]} if best else {}


def checked_run(
    folder: Path,
    config: dict[str, Any],
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    weights: str | None,
    pictures: tuple[Path, ...] = (),
) -> RunRecord:
    """A run from what its files hold and the hash of its student.pt; other contents are a UserError."""
    made, ended = _Entries(config, folder / "config.json"), _Entries(result, folder / "result.json")
    for file in (made, ended):
        if file.get("format", int) != 1:
            raise UserError(f"{file.path} has format {file.values['format']}; this version reads format 1")
    for key in ("script", "method", "adds"):
        if config.get(key) != result.get(key):
            raise UserError(
                f"{folder} holds files of two runs: {key} is {short_text(config.get(key))} in config.json and "
                f"{short_text(result.get(key))} in result.json"
            )
    added, script = made.get("adds", str, optional=True), made.get("script", str)
    chosen, free = made.get("settings", dict), settings_with(Role.MAY_DIFFER)
    chosen = chosen | {key: value for key, value in LATER_SETTINGS.items() if key not in chosen}
    settings = {key: value for key, value in chosen.items() if key not in free}
    settings["dataset_sha256"] = made.get("dataset_sha256", str)
    settings["num_classes"] = made.get("num_classes", int)
    settings["teacher_sha256"] = made.get("teacher_sha256", str, optional=True)
    values = {"clean": ended.fraction("clean"), "pgd20": ended.fraction("pgd20")}
    attack, warnings, flags, of_attack = {}, [], "", {}
    if measured := ended.object("autoattack"):
        values["autoattack"] = measured.fraction("accuracy")
        attack = {"epsilon": measured.fraction("epsilon"), "version": measured.get("version", str)}
        attack |= {"seed": measured.get("seed", int), "examples": measured.count("examples")}
        warnings = measured.get("warnings", list, optional=True) or []
        flags = _flags(measured, attack["examples"])
        # Chunks of another size draw other random numbers.
        of_attack = {
            f"AutoAttack {key}": str(measured.values[key]) for key in ("batch", "package") if key in measured.values
        }
    # The seed of AutoAttack is the run's own by default: it is compared seed by seed.
    settings |= {f"AutoAttack {key}": value for key, value in attack.items() if key != "seed"}
    curves = _curves(rows, folder / "metrics.jsonl")
    gradients = _gradients(ended)
    values |= {key: gradients[key] for key in ("gd", "gc") if gradients}
    values |= {f"logit_{key}": value for key, value in gradients.get("scalars", {}).get("logit", {}).items()}
    values |= _of_checkpoints(ended, curves)
    best_flags = ""
    if (best := ended.object("best")) and (attacked := best.object("autoattack")):
        values["best_autoattack"], best_flags = (
            attacked.fraction("accuracy"),
            _flags(attacked, attacked.count("examples")),
        )
    changed = result.get("changed") or ["nothing"]
    hashes = {"dataset": settings["dataset_sha256"], "teacher": settings["teacher_sha256"]}
    hashes |= {"student": result.get("student_sha256"), "code": config.get("code_sha256"), "weights": weights}
    seconds = ended.get("seconds", dict, optional=True) or {}
    return RunRecord(
        folder=folder,
        method=made.get("method", str),
        added=added,
        base_script=script.replace(f"_{added}", "") if added else script,
        added_settings=tuple(map(str, made.get("added_settings", list))),
        method_settings=tuple(map(str, made.get("outer_settings", list, optional=True) or [])),
        settings=settings,
        environment={
            "hardware": ended.get("hardware", str),
            "commit": made.get("commit", str, optional=True) or "unknown",
            "changed before a resumption": comma_list(changed) if isinstance(changed, list) else "unknown",
            **{f"{package} version": str(version) for package, version in made.get("versions", dict).items()},
            **of_attack,
        },
        teacher=ended.get("teacher", str, optional=True) or "-",
        student=ended.get("student", str),
        dataset=ended.get("dataset", str),
        seed=ended.get("seed", int),
        values=values,
        test_examples=ended.count("test_examples"),
        attack=attack,
        flags=flags,
        best_flags=best_flags,
        gradients=gradients,
        warnings=tuple(map(str, warnings)),
        curves=curves,
        seconds={str(key): float(value) for key, value in seconds.items() if isinstance(value, int | float)},
        hashes={key: value for key, value in hashes.items() if isinstance(value, str)},
        command=ended.get("command", str),
        pictures=pictures,
    )


def _flags(measured: _Entries, examples: int) -> str:
    """AutoAttack's flags, in a file one text per attack, as one character per image."""
    texts = measured.get("flags", dict, optional=True)
    if not texts:
        return ""
    kept = [str(texts.get(step, "")) for step in FIRST_BROKEN_BY]
    if any(len(text) != examples or set(text) - {"0", "1"} for text in kept):
        raise UserError(
            f"{measured.path}: AutoAttack's flags are not one of 0 and 1 per image and attack; was the file edited?"
        )
    images = zip(*kept, strict=True)
    return "".join(next((str(step) for step, flag in enumerate(image) if flag == "0"), "-") for image in images)


def _gradients(ended: _Entries) -> dict[str, Any]:
    """gd, gc and their definition; of evaluate.py's report gd and gc of the logit and the number of images."""
    gradients = ended.object("gradients")
    if not gradients:
        return {}
    number = int | float
    kept = {key: gradients.get(key, number) for key in ("gd", "gc")} | {"definition": gradients.get("definition", str)}
    if (scalars := gradients.object("scalars")) and (logit := scalars.object("logit")):
        kept["scalars"] = {"logit": {key: logit.get(key, number) for key in ("gd", "gc")}}
        kept["scalars_examples"] = gradients.get("scalars_examples", int)
    return kept


def _of_checkpoints(ended: _Entries, curves: dict[str, dict[int, float]]) -> dict[str, float]:
    """Robust overfitting, and what the checkpoints beside the last one reach."""
    values = {}
    if best := ended.object("best"):
        values["best_minus_last"] = best.fraction("pgd20") - ended.fraction("pgd20")
    if (swa := ended.object("swa")) and (attacked := swa.object("autoattack")):
        values["swa_autoattack"] = attacked.fraction("accuracy")
    if holdout := curves["holdout_pgd10"]:
        values["holdout_pgd10"] = holdout[max(holdout)]
    if len(curve := curves["pgd20"]) >= EPOCHS_OF_A_PEAK:
        values["peak_minus_last"] = max(curve.values()) - curve[max(curve)]
    return values


def _curves(rows: list[dict[str, Any]], path: Path) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    for row in (_Entries(row, path) for row in rows):
        for name in CURVES:
            if name in row.values:
                curves[name][row.count("epoch")] = row.fraction(name)
    return curves
