"""Finished runs, read from their folders and checked."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment import UserError
from experiment.files import read_json

MAY_DIFFER = (
    "run_name", "run_dir", "data_dir", "teacher_path", "device", "nowand", "aa_batch", "checkpoint_minutes", "seed",
    "eval_after",
)  # fmt: skip
"""Settings that leave the experiment the same; those that begin with wandb_ come on top."""

ABSENT = "absent"


@dataclass(frozen=True)
class FinishedRun:
    """One finished run folder, checked: accuracies are fractions in [0, 1]."""

    folder: Path
    method: str
    adds: str | None
    family: str
    """The script's name without what it adds: a baseline and its twin share it."""
    added_settings: tuple[str, ...]
    conditions: dict[str, Any]
    """What must be equal for two runs to be repetitions of one experiment: settings, data, teacher, AutoAttack."""
    circumstances: dict[str, str]
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
    """AutoAttack's epsilon, version, seed and examples; empty if it was not run."""
    warnings: tuple[str, ...]
    """What AutoAttack warned of, such as masked gradients."""
    curves: dict[str, dict[int, float]]
    """By "clean" and "pgd20": accuracy by epoch."""
    command: str


def read_run(folder: Path) -> FinishedRun:
    """Read and check config.json, metrics.jsonl and result.json of one run folder.

    Raises:
        UserError: not a run folder, an unfinished run, or files that do not hold what a run writes.
    """
    # os.path.isdir and isfile answer False where Path's raise, such as for a name that is too long.
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; give the folders of finished runs")
    if not os.path.isfile(folder / "config.json"):
        raise UserError(f"{folder} is not a run folder: it holds no config.json")
    config = read_json(folder / "config.json")
    if not os.path.isfile(folder / "result.json"):
        command = _get(config, folder / "config.json", "command", str)
        raise UserError(f"{folder} is an unfinished run (no result.json); to finish it, run this again: {command}")
    return _checked_run(folder, config, read_json(folder / "result.json"))


def _checked_run(folder: Path, config: dict[str, Any], result: dict[str, Any]) -> FinishedRun:
    in_config, in_result = folder / "config.json", folder / "result.json"
    for values, path in ((config, in_config), (result, in_result)):
        if _get(values, path, "format", int) != 1:
            raise UserError(f"{path} has format {values['format']}; this version reads format 1")
    settings = _get(config, in_config, "settings", dict)
    for key in ("script", "method", "adds"):
        if config.get(key) != result.get(key):
            raise UserError(
                f"{folder} holds files of two runs: {key} is {shown(config.get(key))} in config.json and "
                f"{shown(result.get(key))} in result.json"
            )
    adds = _get(config, in_config, "adds", str, optional=True)
    script = _get(config, in_config, "script", str)
    conditions = {key: value for key, value in settings.items() if not _may_differ(key)}
    for key, kind, optional in (
        ("dataset_sha256", str, False),
        ("num_classes", int, False),
        ("teacher_sha256", str, True),
    ):
        conditions[key] = _get(config, in_config, key, kind, optional=optional)
    measured = _get(result, in_result, "autoattack", dict, optional=True)
    attack, warnings = {}, []
    if measured:
        warnings = _get(measured, in_result, "warnings", list, optional=True) or []
        attack = {
            "epsilon": _fraction(measured, in_result, "epsilon"),
            "version": _get(measured, in_result, "version", str),
            "seed": _get(measured, in_result, "seed", int),
            "examples": _count(measured, in_result, "examples"),
        }
    # The seed of AutoAttack is the run's own by default: it is compared seed by seed, not over a row.
    conditions |= {f"AutoAttack {key}": value for key, value in attack.items() if key != "seed"}
    versions = _get(config, in_config, "versions", dict)
    return FinishedRun(
        folder=folder,
        method=_get(config, in_config, "method", str),
        adds=adds,
        family=script.replace(f"_{adds}", "") if adds else script,
        added_settings=tuple(map(str, _get(config, in_config, "added_settings", list))),
        conditions=conditions,
        circumstances={
            "hardware": _get(result, in_result, "hardware", str),
            "commit": _get(config, in_config, "commit", str, optional=True) or "unknown",
            "changed before a resumption": listed(result.get("changed") or ["nothing"])
            if isinstance(result.get("changed", []), list)
            else "unknown",
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
        warnings=tuple(map(str, warnings)),
        curves=_curves(folder / "metrics.jsonl"),
        command=_get(result, in_result, "command", str),
    )


def _get(values: dict[str, Any], path: Path, key: str, kind: type, *, optional: bool = False) -> Any:
    """values[key], of the JSON type `kind`, or None where that is allowed."""
    value = values.get(key)
    # bool is an int to Python, not to JSON.
    if (value is None and optional) or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise UserError(f"{path}: {key} is {shown(values.get(key, ABSENT))}, which no run writes; was the file edited?")


def _fraction(values: dict[str, Any], path: Path, key: str) -> float:
    value = _get(values, path, key, int | float)
    if not 0 <= value <= 1:
        raise UserError(f"{path}: {key} is {shown(value)}; a fraction from 0 to 1 is needed")
    return float(value)


def _count(values: dict[str, Any], path: Path, key: str) -> int:
    value = _get(values, path, key, int)
    if not 1 <= value < 2**31:
        raise UserError(f"{path}: {key} is {shown(value)}; a whole number from 1 is needed")
    return value


def _curves(path: Path) -> dict[str, dict[int, float]]:
    """Clean and PGD-20 accuracy by epoch, of the epochs that were evaluated."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error.reason} at byte {error.start}") from error
    curves: dict[str, dict[int, float]] = {"clean": {}, "pgd20": {}}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not valid JSON: {str(error).splitlines()[0]}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} holds {shown(row)}; a JSON object is needed")
        for figure, curve in curves.items():
            if figure in row:
                curve[_count(row, path, "epoch")] = _fraction(row, path, figure)
    return curves


def _may_differ(setting: str) -> bool:
    return setting in MAY_DIFFER or setting.startswith("wandb_")


def shown(value: Any) -> str:
    """A value in a message or a label: short, on one line."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    # Checksums: twelve characters tell any two apart.
    return text if len(text) <= 60 else f"{text[:12]}..."


def escaped(text: str) -> str:
    """Text that any output takes: bytes of a path name that are not UTF-8 become escapes."""
    return text.encode(errors="backslashreplace").decode()


def listed(values: Iterable[Any]) -> str:
    """Values in one line, separated by commas."""
    return ", ".join(map(str, values))
