"""The gate of the run folder: one process at a time, one run, one set of settings."""

import argparse
import atexit
import fcntl
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiment import UserError, files

FORMAT = 1

FREE_SETTINGS = (
    "nowand", "wandb_project", "wandb_entity", "wandb_name", "wandb_tags", "wandb_artifact", "tensorboard",
    "checkpoint_minutes", "data_dir", "run_dir", "teacher_path", "eval_after",
)  # fmt: skip
"""Settings that may change between a run and its resumption: they move no weight and no final accuracy."""

ADDED_SETTINGS = {"side": 0, "train_examples": 0, "holdout": 0, "aa_best": 0, "swa_after": 0}
"""Settings that the config.json of an older run lacks, and what it did."""

ATTACK_SETTINGS = ("aa_examples", "aa_batch")
"""Settings that may change when a finished run without AutoAttack is attacked."""

LEFTOVER = re.compile(r"\.[a-z]+(-\d+)?\.(pt|jsonl?)(\.\d+)?\.tmp")
"""Names of files that a killed process was about to write."""


def lock(folder: Path) -> int:
    """Create the folder if need be and lock it for the life of this process; the lock's file descriptor.

    A folder that holds nothing but the lock when the process ends, because the run was refused, is removed.

    Raises:
        UserError: the folder cannot be written, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder / ".lock")):
            raise BlockingIOError  # a refused process has just removed the file that was locked here
    except BlockingIOError as error:
        raise UserError(f"{folder} is in use by another process; wait for it, or give another --run_name") from error
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --run_dir") from error
    atexit.register(_leave_nothing, folder.absolute())
    return descriptor


def _leave_nothing(folder: Path) -> None:
    with suppress(OSError):  # it may be gone, or another process's by now
        if [entry.name for entry in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def admit(folder: Path, script: str, args: argparse.Namespace) -> dict[str, Any]:
    """The config.json of the run to be resumed in a locked folder, or a new run's id alone.

    A finished run without AutoAttack is resumed if --aa_examples now asks for it.

    Raises:
        UserError: the folder holds something else, a finished run, or one with other settings.
    """
    entries = {entry.name for entry in folder.iterdir()} - {".lock"}
    foreign = sorted(name for name in entries if not LEFTOVER.fullmatch(name))
    if "config.json" not in entries:
        if foreign:
            raise UserError(f"{folder} is not a run folder (it holds {foreign[0]}); give another --run_name")
        return {"id": uuid.uuid4().hex[:12]}
    config = files.read_json(folder / "config.json")
    strings = all(isinstance(config.get(name), str) for name in ("id", "script", "command", "device"))
    kinds = isinstance(config.get("settings"), dict) and isinstance(config.get("changed", []), list)
    if config.get("format") != FORMAT or not strings or not kinds:
        raise UserError(f"{folder}/config.json is not one that this version wrote; give another --run_name")
    result = files.read_json(folder / "result.json") if "result.json" in entries else None
    unattacked = result is not None and result.get("autoattack") is None
    to_attack = unattacked and args.aa_examples > 0 and "last.pt" in entries  # without it, it would train anew
    free = (*FREE_SETTINGS, *(ATTACK_SETTINGS if to_attack else ()))
    differing = _differing(config, {"script": script, **vars(args)}, free)
    if differing and foreign == ["config.json"]:
        return {"id": uuid.uuid4().hex[:12]}  # it never came to a checkpoint: there is nothing to lose
    if differing:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(differing[:4])}); give its settings to resume it, "
            "or another --run_name for a new run"
        )
    if result is not None and not to_attack:
        raise UserError(
            f"{folder} holds a finished run; see its result.json, evaluate it again with evaluate.py, or train another "
            "with another --run_name or --seed"
        )
    for path in (*folder.glob(".*"), *folder.glob("autoattack/.*")):
        if LEFTOVER.fullmatch(path.name):
            path.unlink()
    return config


def _differing(config: dict[str, Any], here: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    there = {**ADDED_SETTINGS, "script": config["script"], **config["settings"]}
    names = [name for name in {**there, **here} if name not in free]
    return [
        f"{name[:40]} {_setting(name, there)} there, {_setting(name, here)} now"
        for name in names
        if (name in there) != (name in here) or not _same(name, there[name], here[name])
    ]


def _setting(name: str, settings: dict[str, Any]) -> str:
    return f"{settings[name]!r:.80}" if name in settings else "absent"


def _same(name: str, there: Any, here: Any) -> bool:
    if name == "device":  # cuda:0 and cuda:1 are one kind of machine
        return str(there).partition(":")[0] == str(here).partition(":")[0]
    return there == here
