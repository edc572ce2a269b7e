"""config.json: what a run is made of; and what may differ when it is resumed."""

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from experiment import UserError, data, files
from experiment.cli import LATER_SETTINGS, Role, settings_with
from experiment.engine import Engine
from experiment.run.folder import FORMAT
from experiment.run.provenance import provenance

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


def write(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    files.write_json(folder / "config.json", config)
