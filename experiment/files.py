"""Atomic writes, checked reads, downloads, and the format of student checkpoints."""

import hashlib
import http.client
import io
import json
import os
import socket
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from cifar100_models import build_model
from experiment import UserError

STUDENT_FORMAT = "robust-distillation/student/1"

SECONDS_OF_SILENCE = 30
"""A connection that sends nothing for as long is given up."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None], previous: Path | None = None) -> None:
    """Write a file so that it always has the whole old or the whole new content, also after a power cut.

    Args:
        previous: new name of the old file. For a moment, only this one exists.

    Raises:
        UserError: the disk is full or the folder cannot be written to; the old file is unchanged.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path}: {reason}; free some space or write elsewhere") from error


def make_folder(path: Path) -> None:
    """Create a folder, with its parents, if it is missing; UserError if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError if the file is missing, unreadable or something else."""
    return _json_object(_read_text(path), str(path))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl; UserError if the file is missing, unreadable or has a line of another kind."""
    lines = _read_text(path).splitlines()
    return [_json_object(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a JSON {type(value).__name__}; an object is needed")
    return value


def save(path: Path, value: dict[str, Any], previous: Path | None = None) -> None:
    """torch.save tensors and plain types atomically; the old file is kept as `previous`."""
    # Via memory: torch's writer reports a full disk as one of several RuntimeErrors.
    content = io.BytesIO()
    torch.save(value, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()), previous)


def load(path: Path) -> Any:
    """torch.load with weights_only, on the CPU, after a check of the CRC-32s of the archive, which torch ignores.

    Files in torch's older, non-zip format have none.

    Raises:
        UserError: missing, truncated, damaged, not a torch file, or a pickle of anything but tensors and plain types.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{path} is an HTML page, not a checkpoint (a download that answered with a web page)")
    try:
        if head[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise a dozen unrelated types
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(f"{path} is not loaded: it is not a checkpoint of tensors and plain types only") from error
        raise UserError(f"{path} is truncated or damaged ({type(error).__name__})") from error


def download(url: str, file: Path) -> None:
    """Download a URL into a new file, whose content the caller checks.

    Raises:
        UserError: no connection, no answer in time, an HTTP error, a full disk.
    """
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_OF_SILENCE)
    try:
        torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:
        wrapped = getattr(error, "reason", None)  # URLError wraps the OSError that has the reason
        reason = str(wrapped if isinstance(wrapped, OSError) else error) or type(error).__name__
        raise UserError(" ".join(reason.split())) from error
    finally:
        socket.setdefaulttimeout(default)


def state_sha256(model: nn.Module) -> str:
    """Compute the SHA-256 of names, dtypes, shapes and bytes of the state dict, on any device and memory format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_student(path: Path, model: nn.Module, architecture: str, num_classes: int, info: dict[str, Any]) -> None:
    """Write a network that ``load_student``, ``--teacher PATH`` and ``evaluate.py`` can load without anything else.

    Args:
        architecture: a name that ``build_model`` knows; for FILE.py:function the file's path and hash are stored too.
        info: plain types about the network's training.
    """
    content = {
        "format": STUDENT_FORMAT,
        "architecture": architecture,
        "num_classes": num_classes,
        "source_file": getattr(model, "source_file", None),  # of a network from the user's own file
        "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
        "info": info,
    }
    save(path, content)


def load_student(path: Path) -> nn.Module:
    """Load a network from a student checkpoint or run folder; raises as ``open_student`` and ``build_student``."""
    return build_student(open_student(path))


def open_student(path: Path, *, unfinished: bool = False) -> dict[str, Any]:
    """Read a student checkpoint, or that of a run folder; ``path`` in the result is the file itself.

    Args:
        unfinished: also accept a run's ``last.pt``, and a run folder that has no ``student.pt`` yet.

    Raises:
        UserError: as ``load``; not a student checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        names = ["student.pt", *(["last.pt"] if unfinished else [])]
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            kind = "a run with a checkpoint" if unfinished else "a finished run"
            raise UserError(f"{path} holds no {' or '.join(names)}; it is not the folder of {kind}. {advice(path)}")
        path = found[0]
    content = load(path)
    if isinstance(content, dict) and "optimizer" in content:
        if not unfinished:
            raise UserError(
                f"{path} is a run's resume file, not a student; give the run's folder when the run is finished"
            )
        content = {**content, "format": STUDENT_FORMAT, "state_dict": content.get("model")}
    if not isinstance(content, dict) or content.get("format") != STUDENT_FORMAT:
        raise UserError(f"{path} is not a student checkpoint of this project (format {STUDENT_FORMAT})")
    return {**content, "path": path}


def build_student(content: dict[str, Any]) -> nn.Module:
    """Build the network that ``open_student`` read, on the CPU, in eval mode; no global generator changes.

    Raises:
        UserError: unknown architecture; weights that do not fit it; the file of a FILE.py:function is missing or has
            changed.
    """
    try:
        name = content["architecture"]
        if source := content.get("source_file"):
            name = _find_source(content["path"], **source)
        with torch.random.fork_rng(devices=[]):
            model = build_model(name, content["num_classes"])
        model.load_state_dict(content["state_dict"])
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{content['path']} does not hold a network that can be rebuilt: {reason}") from error
    return model.eval()


def _find_source(checkpoint: Path, path: str, sha256: str, function: str) -> str:
    """FILE.py:function at its old path or beside the checkpoint; only a file with the stored hash is run."""
    file, beside = Path(path), checkpoint.parent / Path(path).name
    for place in (file, beside):
        if place.is_file() and file_sha256(place) == sha256:
            return f"{place}:{function}"
    raise UserError(
        f"{checkpoint} needs {file.name} with the function {function} and SHA-256 {sha256[:12]}...; {file} is missing "
        f"or has been changed since. Restore it, or put a copy at {beside}"
    )


def advice(folder: Path) -> str:
    """One sentence, with the command, on what to do about a folder that is not a finished run."""
    if (folder / "config.json").is_file():
        command = read_json(folder / "config.json").get("command")
        if isinstance(command, str) and not (folder / "result.json").is_file():
            return f"Resume the run with: {command}"
    if (folder / "model.safetensors").is_file():
        return "It is an export: give the run that it was made from."
    if runs := sorted(path.parent for path in folder.glob("*/config.json")):
        return f"It holds runs: give one of them, such as {runs[0]}"
    return "A run is made with: python adaad_cifar100.py --run_name NAME"
