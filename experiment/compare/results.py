"""What a run's files hold, checked: config.json, metrics.jsonl, result.json."""

import math
import os
from pathlib import Path
from typing import Any

from experiment import UserError
from experiment.cli import LATER_SETTINGS, Role, settings_with
from experiment.compare.run_record import FIRST_BROKEN_BY, RunRecord
from experiment.compare.text import ABSENT, comma_list, number_or_0, short_text
from experiment.files import file_sha256, read_json, read_metrics

SCALARS_KEPT = ("probability", "logit")
REPORT = ("gd", "gc", "remainder_student", "remainder_teacher")
"""What is kept of each scalar of evaluate.py's report on gradients."""

CURVES = ("clean", "pgd20", "holdout_pgd10")


def read_run(folder: Path) -> RunRecord:
    """Read and check config.json, metrics.jsonl and result.json of one finished run.

    Raises:
        UserError: not a run folder, an unfinished run, or files that do not hold what a run writes.
    """
    # os.path.isdir and isfile answer False where Path's raise, such as for a name that is too long.
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; give folders of runs, or folders that hold them")
    if not os.path.isfile(folder / "config.json"):
        raise UserError(f"{folder} is not a run folder: it holds no config.json")
    config = read_json(folder / "config.json")
    if not os.path.isfile(folder / "result.json"):
        command = _get(config, folder / "config.json", "command", str)
        raise UserError(f"{folder} is an unfinished run (no result.json); to finish it, run this again: {command}")
    result, rows = read_json(folder / "result.json"), read_metrics(folder / "metrics.jsonl")
    evaluations = _evaluations(folder, config, result)
    if reported := _gradient_report(config, evaluations):
        result = {**result, "gradients": reported | (result.get("gradients") or {})}
    return checked_run(folder, config, result, rows, evaluations, weights_sha256(folder))


def _evaluations(folder: Path, config: dict[str, Any], result: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Records of evaluate.py, oldest first: those of the run's final student, on the run's data."""
    if not (folder / "evaluations").is_dir():
        return ()
    from experiment.evaluation import records  # with torch, which takes seconds

    # best.pt, an unfinished last.pt and other data leave their records in the same place.
    same = ("student_sha256", result.get("student_sha256")), ("dataset_sha256", config.get("dataset_sha256"))
    return tuple(record for record in records(folder) if all(record.get(key) == value for key, value in same))


def _gradient_report(config: dict[str, Any], evaluations: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """What evaluate.py measured of the gradients with the run's teacher and epsilon: on the most images, newest."""
    settings = config.get("settings")
    epsilon = number_or_0(settings.get("epsilon")) if isinstance(settings, dict) else 0
    alike = [
        record["gradients"]
        for record in reversed(evaluations)
        if record.get("gradients")
        and record.get("teacher_sha256") == config.get("teacher_sha256")
        and math.isclose(number_or_0(record["gradients"].get("epsilon")), epsilon, abs_tol=1e-9)
    ]
    if not alike:
        return {}
    best = max(alike, key=lambda report: number_or_0(report.get("examples")))
    return {**best, "scalars_examples": best.get("examples")}


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of a run's student.pt: the students of a teacher name it by that."""
    path = folder / "student.pt"
    return file_sha256(path) if path.is_file() else None


def checked_run(
    folder: Path,
    config: dict[str, Any],
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    evaluations: tuple[dict[str, Any], ...] = (),
    weights: str | None = None,
) -> RunRecord:
    """A run from what its files hold, and the hash of its student.pt.

    Raises:
        UserError: the files are not of one run, or do not hold what a run writes.
    """
    in_config, in_result = folder / "config.json", folder / "result.json"
    for values, path in ((config, in_config), (result, in_result)):
        if _get(values, path, "format", int) != 1:
            raise UserError(f"{path} has format {values['format']}; this version reads format 1")
    for key in ("script", "method", "adds"):
        if config.get(key) != result.get(key):
            raise UserError(
                f"{folder} holds files of two runs: {key} is {short_text(config.get(key))} in config.json and "
                f"{short_text(result.get(key))} in result.json"
            )
    added = _get(config, in_config, "adds", str, optional=True)
    script = _get(config, in_config, "script", str)
    chosen = _get(config, in_config, "settings", dict)
    chosen |= {key: value for key, value in LATER_SETTINGS.items() if key not in chosen}
    settings = {key: value for key, value in chosen.items() if not _may_differ(key)}
    for key, kind, optional in (
        ("dataset_sha256", str, False),
        ("num_classes", int, False),
        ("teacher_sha256", str, True),
    ):
        settings[key] = _get(config, in_config, key, kind, optional=optional)
    measured = _get(result, in_result, "autoattack", dict, optional=True)
    attack, warnings, flags = {}, [], ""
    if measured:
        warnings = _get(measured, in_result, "warnings", list, optional=True) or []
        attack = {
            "epsilon": _fraction(measured, in_result, "epsilon"),
            "version": _get(measured, in_result, "version", str),
            "seed": _get(measured, in_result, "seed", int),
            "examples": _count(measured, in_result, "examples"),
        }
        flags = _flags(measured, in_result, attack["examples"])
    # The seed of AutoAttack is the run's own by default: it is compared seed by seed.
    settings |= {f"AutoAttack {key}": value for key, value in attack.items() if key != "seed"}
    if measured:
        attack["attacks"] = _get(measured, in_result, "attacks", dict, optional=True) or {}
    versions = _get(config, in_config, "versions", dict)
    changed = result.get("changed") or ["nothing"]
    hashes = {"dataset": settings["dataset_sha256"], "teacher": settings["teacher_sha256"]}
    hashes |= {"student": result.get("student_sha256"), "code": config.get("code_sha256"), "weights": weights}
    seconds = _get(result, in_result, "seconds", dict, optional=True) or {}
    return RunRecord(
        folder=folder,
        method=_get(config, in_config, "method", str),
        added=added,
        base_script=script.replace(f"_{added}", "") if added else script,
        added_settings=tuple(map(str, _get(config, in_config, "added_settings", list))),
        method_settings=tuple(map(str, _get(config, in_config, "outer_settings", list, optional=True) or [])),
        settings=settings,
        environment={
            "hardware": _get(result, in_result, "hardware", str),
            "commit": _get(config, in_config, "commit", str, optional=True) or "unknown",
            "changed before a resumption": comma_list(changed) if isinstance(changed, list) else "unknown",
            **{f"{package} version": str(version) for package, version in versions.items()},
            # Chunks of another size draw other random numbers.
            **{f"AutoAttack {key}": str(measured[key]) for key in ("batch", "package") if key in (measured or {})},
        },
        teacher=_get(result, in_result, "teacher", str, optional=True) or "-",
        student=_get(result, in_result, "student", str),
        dataset=_get(result, in_result, "dataset", str),
        seed=_get(result, in_result, "seed", int),
        clean=_fraction(result, in_result, "clean"),
        pgd20=_fraction(result, in_result, "pgd20"),
        test_examples=_count(result, in_result, "test_examples"),
        autoattack=_fraction(measured, in_result, "accuracy") if measured else None,
        attack=attack,
        flags=flags,
        gradients=_gradients(result, in_result),
        best=_checkpoint(result, in_result, "best"),
        swa=_checkpoint(result, in_result, "swa"),
        warnings=tuple(map(str, warnings)),
        curves=_curves(rows, folder / "metrics.jsonl"),
        seconds={str(key): float(value) for key, value in seconds.items() if isinstance(value, int | float)},
        hashes={key: value for key, value in hashes.items() if isinstance(value, str)},
        command=_get(result, in_result, "command", str),
        evaluations=evaluations,
    )


def _flags(measured: dict[str, Any], path: Path, examples: int) -> str:
    """AutoAttack's flags, in a file one text per attack, as one digit per image."""
    texts = _get(measured, path, "flags", dict, optional=True)
    if not texts:
        return ""
    kept = [str(texts.get(step, "")) for step in FIRST_BROKEN_BY]
    if any(len(text) != examples or set(text) - {"0", "1"} for text in kept):
        raise UserError(f"{path}: AutoAttack's flags are not one of 0 and 1 per image and attack; was the file edited?")
    images = zip(*kept, strict=True)
    return "".join(next((str(step) for step, flag in enumerate(image) if flag == "0"), "-") for image in images)


def _checkpoint(result: dict[str, Any], path: Path, key: str) -> dict[str, Any]:
    """Accuracies of a checkpoint other than the last: clean, pgd20 and AutoAttack's dict or None."""
    measured = _get(result, path, key, dict, optional=True)
    if not measured:
        return {}
    attack = _get(measured, path, "autoattack", dict, optional=True)
    robust = {"accuracy": _fraction(attack, path, "accuracy")} if attack else None
    return {**measured, **{key: _fraction(measured, path, key) for key in ("clean", "pgd20")}, "autoattack": robust}


def _gradients(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """gd, gc and their definition as the run measured them; of evaluate.py's report what `SCALARS_KEPT` names."""
    gradients = _get(result, path, "gradients", dict, optional=True)
    if not gradients:
        return {}
    kept = {key: _get(gradients, path, key, int | float) for key in ("gd", "gc")}
    kept["definition"] = _get(gradients, path, "definition", str)
    if scalars := _get(gradients, path, "scalars", dict, optional=True):
        kept["scalars"] = {
            name: {key: _get(of_scalar, path, key, int | float) for key in REPORT}
            for name in SCALARS_KEPT
            if (of_scalar := _get(scalars, path, name, dict))
        }
        kept["scalars_examples"] = _get(gradients, path, "scalars_examples", int)
    return kept


def _get(values: dict[str, Any], path: Path, key: str, kind: type, *, optional: bool = False) -> Any:
    """values[key], of the JSON type `kind`, or None where that is allowed."""
    value = values.get(key)
    # bool is an int to Python, not to JSON.
    if (value is None and optional) or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise UserError(
        f"{path}: {key} is {short_text(values.get(key, ABSENT))}, which no run writes; was the file edited?"
    )


def _fraction(values: dict[str, Any], path: Path, key: str) -> float:
    value = _get(values, path, key, int | float)
    if not 0 <= value <= 1:
        raise UserError(f"{path}: {key} is {short_text(value)}; a fraction from 0 to 1 is needed")
    return float(value)


def _count(values: dict[str, Any], path: Path, key: str) -> int:
    value = _get(values, path, key, int)
    if not 1 <= value < 2**31:
        raise UserError(f"{path}: {key} is {short_text(value)}; a whole number from 1 is needed")
    return value


def _curves(rows: list[dict[str, Any]], path: Path) -> dict[str, dict[int, float]]:
    """Accuracies and loss terms by epoch, of the epochs that have them."""
    curves: dict[str, dict[int, float]] = {figure: {} for figure in CURVES}
    for row in rows:
        for figure in row:
            if figure in CURVES:
                curves[figure][_count(row, path, "epoch")] = _fraction(row, path, figure)
            elif figure.startswith("loss"):
                curves.setdefault(figure, {})[_count(row, path, "epoch")] = _get(row, path, figure, int | float)
    return curves


def _may_differ(setting: str) -> bool:
    return setting in settings_with(Role.MAY_DIFFER)
