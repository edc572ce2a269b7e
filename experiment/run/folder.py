"""The run folder: one process at a time, one run, one config.json; and what may differ when a run is resumed."""

import argparse
import atexit
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from experiment import UserError, data, files
from experiment.cli import LATER_SETTINGS, Role, settings_with
from experiment.engine import Engine
from experiment.run.provenance import provenance

FORMAT = 1

LEFTOVER = re.compile(r"\.[a-z]+(-\d+)?\.(pt|jsonl?)(\.\d+)?\.tmp|\.shared-[0-9a-f]+")
"""Names of files that a killed process was about to write, or that its ranks met in."""


def free_settings(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that may change in a run that has these: with --holdout, --eval_after tells which epochs compete."""
    free = settings_with(Role.FREE)
    return free if settings.get("holdout") else (*free, "eval_after")


def lock(folder: Path) -> FileLock:
    """Create the folder if need be and lock it as long as the returned lock, or this process, lives.

    A folder that holds nothing but the lock when the process ends, because the run was refused, is removed.

    Raises:
        UserError: the folder cannot be written, or another process has it.
    """
    locked = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locked.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder} is in use by another process; wait for it, or give another --run_name") from error
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --run_dir") from error
    atexit.register(_leave_nothing, folder.absolute())
    return locked


def _leave_nothing(folder: Path) -> None:
    with suppress(OSError):  # it may be gone, or another process's by now
        if [entry.name for entry in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def find_run(folder: Path, script: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The run that the folder holds, if it is the one that this command means. Changes nothing.

    Returns:
        Its config.json, or ``{}`` for a new run; and its result.json if it is finished and nothing is left to do. A
        finished run without AutoAttack is not finished for a command whose --aa_examples asks for it.

    Raises:
        UserError: the folder holds something else, or a run with other settings.
    """
    entries = {entry.name for entry in folder.iterdir()} - {".lock"} if folder.is_dir() else set()
    foreign = sorted(name for name in entries if not LEFTOVER.fullmatch(name))
    if "config.json" not in entries:
        if foreign:
            raise UserError(f"{folder} is not a run folder (it holds {foreign[0]}); give another --run_name")
        return {}, None
    config = files.read_json(folder / "config.json")
    strings = all(isinstance(config.get(name), str) for name in ("id", "script", "command", "device"))
    kinds = isinstance(config.get("settings"), dict) and isinstance(config.get("changed", []), list)
    if config.get("format") != FORMAT or not strings or not kinds:
        raise UserError(f"{folder}/config.json is not one that this version wrote; give another --run_name")
    result = files.read_json(folder / "result.json") if "result.json" in entries else None
    trained = {"student.pt", "last.pt"} <= entries  # without last.pt, it would train anew
    unattacked = trained and (result is None or (result.get("autoattack") is None and args.aa_examples > 0))
    free = (*free_settings(vars(args)), *(settings_with(Role.AUTOATTACK) if unattacked else ()))
    differing = _differing(config, {"script": script, **vars(args)}, free)
    if differing and foreign == ["config.json"]:
        return {}, None  # it never came to a checkpoint: there is nothing to lose
    if differing:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(differing[:4])}); give its settings to resume it, "
            "or another --run_name for a new run"
        )
    return config, None if unattacked else result


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process was about to write."""
    for path in (*folder.glob(".*"), *folder.glob("autoattack*/.*")):
        if LEFTOVER.fullmatch(path.name):
            path.unlink()


def new_id() -> str:
    """An id that no other run has."""
    return uuid.uuid4().hex[:12]


def _differing(config: dict[str, Any], here: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    later = {name: value for name, value in LATER_SETTINGS.items() if name in here}
    there = {**later, "script": config["script"], **config["settings"]}
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


CHANGES = {
    "device": "device",
    "processes": "number of processes",
    "versions": "versions",
    "commit": "commit",
    "code_sha256": "code",
}
"""Entries that may differ when a run is resumed, and what they are called: its bits may differ then."""


def describe(
    args: argparse.Namespace,
    script: Path,
    recipe: dict[str, Any],
    identity: str,
    engine: Engine,
    images: data.Data,
    teacher: nn.Module | None,
) -> dict[str, Any]:
    """The config.json of a run that begins now."""
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


def check_same_inputs(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse to resume a run on other data or with another teacher.

    Raises:
        UserError: the number of classes, or a hash, is another.
    """
    for name in ("num_classes", "dataset_sha256", "teacher_sha256"):
        if there.get(name) != here[name]:
            raise UserError(
                f"{folder} began with {name} {there.get(name)!r:.80}, now it is {here[name]}; give it back what it "
                "began with, or another --run_name"
            )


def changes(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What else differs between a run's start and its resumption, in words."""
    return [said for name, said in CHANGES.items() if there.get(name, here[name]) != here[name]]


def resumed_config(there: dict[str, Any], here: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config of a resumed run, and the config.json to write with its result, if that must say something new.

    A trained run may be attacked otherwise than its config.json says: that then says so together with its result.json.
    """
    config = {**here, "device": there["device"], "processes": there.get("processes", here["processes"])}
    attack = {name: here["settings"][name] for name in settings_with(Role.AUTOATTACK)}
    before = {**LATER_SETTINGS, **there["settings"]}
    if all(before[name] == value for name, value in attack.items()):
        return {**config, "command": there["command"]}, None
    return config, {**there, "settings": {**there["settings"], **attack}, "command": here["command"]}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    files.write_json(folder / "config.json", config)
