"""The run folder: one run, one config.json, one process at a time; and what may differ on resume."""

import argparse
import atexit
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from experiment import UserError, data, files
from experiment.cli import LATER_SETTINGS, Role, settings_with
from experiment.engine import Engine
from experiment.text import ABSENT, short_text, started_as

FORMAT = 1

PACKAGES = ("torch", "torchvision", "numpy", "robustbench", "pyautoattack")

LEFTOVER = re.compile(r"\..+\.\d+\.tmp")
"""Names of temporary files that a killed process may leave."""


def lock(folder: Path) -> FileLock:
    """Create the folder if necessary and lock it; remove it if it contains only the lock when the process ends."""
    locked = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locked.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder} is in use by another process. Wait for it, or use another --run_name") from error
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. Use another --run_dir") from error
    atexit.register(_leave_nothing, folder.absolute())
    return locked


def _leave_nothing(folder: Path) -> None:
    with suppress(OSError):  # the folder may be gone, or in use by another process
        if [entry.name for entry in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def find_run(folder: Path, script: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Find the run in the folder and check that its settings are those of this command. Changes nothing.

    Returns its config.json, or {} for a new run; and its result.json if nothing is left to do. A run without AutoAttack
    is not finished if --aa_examples now requires it.
    """
    entries = {entry.name for entry in folder.iterdir()} - {".lock"} if folder.is_dir() else set()
    foreign = sorted(name for name in entries if not LEFTOVER.fullmatch(name))
    if "config.json" not in entries:
        if foreign:
            raise UserError(f"{folder} is not a run folder (it contains {foreign[0]}). Use another --run_name")
        return {}, None
    config = _read(folder / "config.json")
    result = _read(folder / "result.json") if "result.json" in entries else None
    trained = {"student.pt", "last.pt"} <= entries  # without last.pt, the run would train again
    unattacked = trained and (result is None or result.get("autoattack") is None)
    free = [*settings_with(Role.FREE), *(settings_with(Role.AUTOATTACK) if unattacked else ())]
    if not args.holdout:  # otherwise the evaluated epochs are the candidates for the best
        free.append("eval_after")
    differing = _differing(config, {"script": script, **vars(args)}, free)
    if differing and foreign == ["config.json"]:
        return {}, None  # no checkpoint was written, so nothing is lost
    if differing:
        raise UserError(
            f"{folder} contains a run with other settings ({'; '.join(differing[:4])}). Use its settings to resume it, "
            "or another --run_name for a new run"
        )
    return config, None if unattacked and args.aa_examples else result


def _read(path: Path) -> dict[str, Any]:
    """Read a record of this version. The models of records.py need pydantic, which a machine that trains may lack."""
    record = files.read_json(path)
    if record.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this version. Use another --run_name")
    return record


def _differing(config: dict[str, Any], current: dict[str, Any], free: Sequence[str]) -> list[str]:
    """Describe each setting that differs and is not free."""
    later = {name: value for name, value in LATER_SETTINGS.items() if name in current}
    stored = {**later, "script": config["script"], **config["settings"]}
    for settings in (stored, current):  # cuda:0 and cuda:1 are equivalent
        settings["device"] = str(settings.get("device")).partition(":")[0]
    pairs = {name: (stored.get(name, ABSENT), current.get(name, ABSENT)) for name in {**stored, **current}}
    return [
        f"{name[:40]} was {short_text(before)}, is now {short_text(now)}"
        for name, (before, now) in pairs.items()
        if before != now and name not in free
    ]


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a killed process."""
    for path in (*folder.glob(".*"), *folder.glob("autoattack*/.*")):
        if LEFTOVER.fullmatch(path.name):
            path.unlink()


CHANGES = {"device": "device", "processes": "number of processes", "versions": "versions", "code_sha256": "code"}
"""Entries that may differ when a run is resumed, with their names in messages. The result may then differ in bits."""


def describe(
    args: argparse.Namespace,
    script: Path,
    recipe: dict[str, Any],
    identity: str,
    engine: Engine,
    images: data.Data,
    teacher: nn.Module | None,
) -> dict[str, Any]:
    """Return the config.json of a new run."""
    return {
        "format": FORMAT,
        "id": identity,
        "script": script.name,
        "method": recipe["method"],
        "adds": recipe.get("adds"),
        "outer_settings": list(recipe.get("outer", {})),
        "added_settings": list(recipe.get(recipe.get("adds"), {})),
        "settings": vars(args),
        **provenance(script),
        "device": engine.hardware(),
        "num_classes": images.num_classes,
        "dataset_sha256": images.sha256,
        "teacher_sha256": getattr(teacher, "sha256", None),
    }


def check_same_inputs(folder: Path, stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Check that a run is resumed with its data and its teacher."""
    for name in ("num_classes", "dataset_sha256", "teacher_sha256") if stored else ():
        if stored.get(name) != current[name]:
            raise UserError(
                f"{folder}: {name} was {stored.get(name)!r:.80} and is now {current[name]}. Use the same data and "
                "teacher, or another --run_name"
            )


def merged_config(stored: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a resumed run: as it began, but a trained run may be attacked with other settings."""
    attack = {name: current["settings"][name] for name in settings_with(Role.AUTOATTACK)}
    before = {**current["settings"], **stored.get("settings", {})}
    config = {**current, **stored, "settings": {**before, **attack}}
    if any(before[name] != value for name, value in attack.items()):
        config["command"] = current["command"]
    return config


def provenance(script: Path) -> dict[str, Any]:
    """Return command, number of processes, versions, commit and a hash of the code, for config.json."""
    return {
        "command": _command(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "commit": _commit(script.resolve().parent),
        "code_sha256": _code_sha256(script),
    }


def _command() -> str:
    """Return the command line, with torchrun and its number of processes if torchrun started it."""
    words = [*started_as(sys.argv[0]), *sys.argv[1:]]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join(["python", *words])
    processes, of_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = [f"--nnodes={processes // of_node}"] if processes > of_node else []
    return shlex.join(["torchrun", *nodes, f"--nproc_per_node={of_node}", *words])


def _code_sha256(script: Path) -> str:
    """SHA-256 over the script and every module of the project that a run imports."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    names = [name for name in ("cifar100_models", "experiment", "examples") if name in sys.modules]
    packages = (path for name in names for path in (root / name).rglob("*.py"))
    for path in (script, root / "attacks.py", root / "rslad_loss.py", *sorted(packages)):
        digest.update(f"{path.name} {files.file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """Return the commit, with -dirty if a tracked file differs from it; None outside a git checkout."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
