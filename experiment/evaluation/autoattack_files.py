"""The chunk files of AutoAttack: one small checked file per chunk of images, so that an attack resumes."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment import UserError
from experiment.evaluation.batches import as_pixels
from experiment.files import read_json, write_json

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of AutoAttack's standard version, in their order; each gets the images that the ones before left."""


def chunk_file(folder: Path, i: int) -> Path:
    """The file of chunk i."""
    return Path(folder) / f"chunk-{i:05d}.json"


def data_sha256(x: Tensor, y: Tensor) -> str:
    """SHA-256 of the images as the network sees them, and of the labels."""
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    digest.update(as_pixels(x).float().cpu().contiguous().numpy().tobytes())
    digest.update(y.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checksum(parts: dict[str, Any], record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([parts, record], sort_keys=True).encode()).hexdigest()


def write_chunk(path: Path, parts: dict[str, Any], record: dict[str, Any]) -> None:
    """Write a finished chunk with its checksum."""
    write_json(path, {"parts": parts, "record": record, "sha256": _checksum(parts, record)})


def finished_chunks(folder: Path | None, parts: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Create the folder, and read the chunk files that are there: (number, record).

    Files of the format before, which held no flag per image, count as absent: their images are attacked again.

    Raises:
        UserError: a file belongs to another student, setting or data, or its checksum does not match.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}") from error
    for i, expected in enumerate(parts):
        path = chunk_file(folder, i)
        if not path.exists():
            continue
        content = read_json(path)
        found, record = content.get("parts"), content.get("record")
        if content.get("sha256") != _checksum(found, record):
            raise UserError(
                f"{path} is damaged: its checksum does not match; delete it to have its images attacked again"
            )
        differing = [name for name in expected if found.get(name) != expected[name]]
        if differing:
            raise UserError(
                f"{path} holds AutoAttack results of another {' and '.join(differing)}; results are not mixed: "
                f"use another folder, or delete {folder} to attack anew"
            )
        if "flags" in record:
            yield i, record
