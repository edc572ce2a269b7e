"""Finished runs in one small file, kept where the run folders are not; tables and figures are the same from either.

A records file is JSON, one line per run: what config.json and result.json hold, metrics.jsonl by column, AutoAttack's
flags as in ``RunRecord.flags``, and evaluate.py's report on gradients.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment import UserError
from experiment.compare.run_record import FIRST_BROKEN_BY, RunRecord, checked_run
from experiment.files import read_json, read_metrics, write_atomically

FORMAT = 1
DIGITS = 6
"""Significant digits that are kept of what metrics.jsonl holds; config.json and result.json are kept whole."""


def write_records(path: Path, runs: Sequence[RunRecord]) -> None:
    """Write the records of runs that were read from their folders."""
    lines = []
    for run in runs:
        config, result = read_json(run.folder / "config.json"), read_json(run.folder / "result.json")
        if run.flags:
            result["autoattack"]["flags"] = run.flags
        if run.gradients:
            result["gradients"] = run.gradients
        for values in (config, result):
            if "command" in values:
                values["command"] = _without_folder(values["command"])
        record = {
            "folder": run.folder.as_posix(),
            "config": config,
            "result": result,
            "weights": run.hashes.get("weights"),
            "metrics": _columns(read_metrics(run.folder / "metrics.jsonl")),
        }
        lines.append(json.dumps(record, separators=(",", ":")))
    text = f'{{"format":{FORMAT},"runs":[\n' + ",\n".join(lines) + "\n]}\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_records(path: Path) -> list[RunRecord]:
    """The runs of a records file; another or a damaged file is a UserError."""
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
            runs.append(checked_run(folder, record["config"], result, rows, record["weights"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise UserError(f"{path}: {error}") from error
            raise UserError(f"{path}: a record is damaged: {type(error).__name__} {error}") from error
    return runs


def _without_folder(command: str) -> str:
    """A command whose script is named without its folder, which is the machine's own."""
    return re.sub(r"\S*/(?=\w+\.py(\s|$))", "", command, count=1)


def _by_attack(flags: str) -> dict[str, str]:
    """One character per image as AutoAttack's texts of 0 and 1, one per step."""
    broken_at = [len(FIRST_BROKEN_BY) if flag == "-" else int(flag) for flag in flags]
    return {name: "".join("01"[at > step] for at in broken_at) for step, name in enumerate(FIRST_BROKEN_BY)}


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [_rounded(row.get(key)) for row in rows] for key in keys}


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    number = len(next(iter(columns.values()), []))
    return [{key: values[row] for key, values in columns.items() if values[row] is not None} for row in range(number)]
