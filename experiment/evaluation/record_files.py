"""Evaluation records: one JSON file per evaluation, none of which overwrites another."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiment.files import read_json, write_json

FOLDER = "evaluations"
"""The folder of the records, in a run folder or wherever an evaluation was made."""

FORMAT = 2


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Write a record under ``folder/evaluations``, named after its time and what it measured; return its path.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder = Path(folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{record['time'].replace(':', '-')}_{'-'.join(record['measured'])}"
    path, again = folder / f"{name}.json", 1
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # two evaluations of one second
            break
        except FileExistsError:
            path, again = folder / f"{name}_{again + 1}.json", again + 1
    write_json(path, record)
    return path


def now() -> str:
    """The time in UTC, as records have it: to the second, ordered as text."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, the oldest first, each with its ``file``; what is no record is left out."""
    found = []
    for path in sorted((Path(folder) / FOLDER).glob("*.json")):
        if path.stat().st_size and (record := read_json(path)).get("format") == FORMAT:
            found.append({**record, "file": str(path)})
    return sorted(found, key=lambda record: (record["time"], record["file"]))


def newest_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest record of each kind that a folder has: clean, fgsm, pgd, cw, autoattack, gradients, torchattacks."""
    return {kind: record for record in records(folder) for kind in record["measured"]}
