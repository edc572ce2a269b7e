"""What an evaluation leaves: a record of its own, and adversarial images; nothing overwrites another."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from experiment import UserError
from experiment.evaluation.accuracy import Attacked
from experiment.evaluation.batches import as_pixels
from experiment.files import read_json, write_atomically, write_json

FOLDER = "evaluations"
"""The folder of the records, in a run folder or beside a checkpoint."""

FORMAT = 2


def check_record_place(folder: Path, out: Path | None) -> None:
    """Refuse, before any work, a place that a record could not be written to.

    Raises:
        UserError: `out` exists, or its folder does not; the folder cannot be written to.
    """
    if out is not None:
        check_output(out)
        return
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to; give --out FILE.json")


def check_output(path: Path) -> None:
    """Refuse, before any work, a file that could not be written, or that would overwrite another."""
    if path.exists():
        raise UserError(f"{path} exists; nothing is overwritten: give another name")
    # The folder of the records may still be to come.
    if not path.parent.is_dir() and not (path.parent.name == FOLDER and path.parent.parent.is_dir()):
        raise UserError(f"{path}: there is no folder {path.parent}")


def write_record(folder: Path, record: dict[str, Any], out: Path | None = None) -> Path:
    """Write a record to `out`, or under ``folder/evaluations``, named after its time and what it measured.

    Args:
        record: plain types, with ``measured``, the kinds of figures that it holds; ``format`` and ``time`` are added.

    Returns:
        The file.

    Raises:
        UserError: it cannot be written.
    """
    record = {"format": FORMAT, "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), **record}
    path = out or _unused(Path(folder) / FOLDER, f"{record['time'].replace(':', '-')}_{'-'.join(record['measured'])}")
    path.parent.mkdir(exist_ok=True)
    write_json(path, record)
    return path


def _unused(folder: Path, name: str) -> Path:
    """An empty file of its own for a record: two evaluations may end in the same second."""
    folder.mkdir(parents=True, exist_ok=True)
    path, again = folder / f"{name}.json", 1
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            again += 1
            path = folder / f"{name}_{again}.json"
        else:
            return path


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, the oldest first, each with its ``file``; what is no record is left out."""
    found = []
    for path in sorted((Path(folder) / FOLDER).glob("*.json")):
        if path.stat().st_size and (record := read_json(path)).get("format") == FORMAT:
            found.append({**record, "file": str(path)})
    return sorted(found, key=lambda record: record["time"])


def newest_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest record of each kind that a folder has: clean, fgsm, pgd, cw, autoattack, gradients, torchattacks."""
    return {kind: record for record in records(folder) for kind in record["measured"]}


def save_adversarial(path: Path, x: Tensor, y: Tensor, found: Attacked) -> None:
    """Write an .npz with x and x_adv, (N, C, H, W) float32 in [0, 1], and y and predictions, (N,) int64.

    Raises:
        UserError: it cannot be written.
    """
    import numpy as np

    arrays = {"x": as_pixels(x).float(), "x_adv": found.x_adv, "y": y, "predictions": found.predictions}
    path.parent.mkdir(exist_ok=True)
    on_cpu = {name: tensor.cpu().contiguous().numpy() for name, tensor in arrays.items()}
    write_atomically(path, lambda file: np.savez_compressed(file, **on_cpu))
