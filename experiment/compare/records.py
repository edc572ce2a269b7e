"""Records of runs in one small file, to be kept where the run folders are not: tables are made from either.

A records file is JSON, one line per run: what config.json and result.json hold, metrics.jsonl by column, AutoAttack's
flags as one character per image (the step that broke it, see ``results.FIRST_BROKEN_BY``), and of evaluate.py's records
the report on gradients.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment import UserError
from experiment.compare.results import checked_run, read_run
from experiment.compare.run_record import FIRST_BROKEN_BY, RunRecord
from experiment.files import read_json, read_metrics, write_atomically

FORMAT = 1
DIGITS = 6
"""Significant digits that are kept of what metrics.jsonl holds; config.json and result.json are kept whole."""


def write_records(path: Path, folders: Sequence[Path]) -> None:
    """Write the records of finished runs.

    Raises:
        UserError: a folder does not hold a finished run; the file cannot be written.
    """
    lines = []
    for folder in folders:
        run = read_run(folder)
        result = read_json(folder / "result.json")
        config = read_json(folder / "config.json")
        if run.flags:
            result["autoattack"]["flags"] = run.flags
        if run.gradients:
            result["gradients"] = run.gradients
        for values in (config, result):
            if "command" in values:
                values["command"] = _without_folder(values["command"])
        record = {
            "folder": folder.as_posix(),
            "config": config,
            "result": result,
            "weights": run.hashes.get("weights"),
            "metrics": _columns(read_metrics(folder / "metrics.jsonl")),
        }
        lines.append(json.dumps(record, separators=(",", ":")))
    text = f'{{"format":{FORMAT},"runs":[\n' + ",\n".join(lines) + "\n]}\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_records(path: Path) -> list[RunRecord]:
    """The runs of a records file.

    Raises:
        UserError: it is not a records file, or a record does not hold what a run writes.
    """
    content = read_json(path)
    if content.get("format") != FORMAT or not isinstance(content.get("runs"), list):
        raise UserError(f"{path} is not a records file of this version (compare.py --records writes one)")
    runs = []
    for record in content["runs"]:
        try:
            result, flags = record["result"], (record["result"].get("autoattack") or {}).get("flags")
            if flags:
                result = {**result, "autoattack": {**result["autoattack"], "flags": _by_attack(flags)}}
            folder, rows = Path(record["folder"]), _rows(record["metrics"])
            runs.append(checked_run(folder, record["config"], result, rows, weights=record["weights"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise UserError(f"{path}: {error}") from error
            raise UserError(f"{path}: a record is damaged: {type(error).__name__} {error}") from error
    return runs


def _without_folder(command: str) -> str:
    """A command that names its script without the folder it lay in: of no use elsewhere, and nobody's business."""
    return re.sub(r"\S*/(?=\w+\.py(\s|$))", "", command, count=1)


def _by_attack(flags: str) -> dict[str, str]:
    """One character per image as AutoAttack's texts of 0 and 1, one per step."""
    fell = [len(FIRST_BROKEN_BY) if flag == "-" else int(flag) for flag in flags]
    return {name: "".join("1" if at > step else "0" for at in fell) for step, name in enumerate(FIRST_BROKEN_BY)}


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [_rounded(row.get(key)) for row in rows] for key in keys}


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    number = len(next(iter(columns.values()), []))
    return [{key: values[row] for key, values in columns.items() if values[row] is not None} for row in range(number)]
