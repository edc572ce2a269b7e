"""A study file (TOML) as the list of its runs: what varies, what is set for all, and the command of each run.

[teacher]             flags of train_teacher.py; this teacher is trained first and is the default --teacher of all runs
[grid]                lists of values of script, teacher, student, seed and any other flag; the first key varies
                      slowest, and every key is part of the run name
[settings]            flags for all runs; scripts without a flag ignore it
[settings.SCRIPT]     flags for one script, with precedence over [settings]
"""

import argparse
import fcntl
import functools
import itertools
import runpy
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment import UserError, cli
from experiment.records import read_config
from experiment.run import find_run
from experiment.text import short_name, started_as

ROOT = Path(__file__).resolve().parents[2]
RESERVED = ("run_dir", "run_name")
"""Flags that the study sets for every run."""

FINISHED, RUNNING, UNFINISHED, TO_DO = "finished", "running", "unfinished", "to do"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study: its folder, its command and its resolved flags."""

    name: str
    folder: Path
    script: Path
    arguments: tuple[str, ...]
    given: tuple[str, ...]
    """The flags that the study sets."""
    settings: dict[str, Any]
    recipe: dict[str, Any]

    @property
    def command(self) -> str:
        """The command that starts or resumes it, as it would be typed."""
        return shlex.join(["python", *started_as(self.script), *self.arguments])

    @property
    def method(self) -> str:
        """The method, with what it adds."""
        return "+".join(part for part in (self.recipe["method"], self.recipe.get("adds")) if part)

    def state(self) -> str:
        """Return finished, running, unfinished or to do; UserError if the folder has a run with other settings."""
        settings = dict(self.settings)
        if (self.folder / "config.json").is_file():
            # Flags that the study does not set, and the device, may differ.
            asked, written = set(self.given) - {"device", "run_name"}, read_config(self.folder).settings
            settings |= {flag: value for flag, value in written.items() if flag not in asked}
        config, result = find_run(self.folder, self.script.name, argparse.Namespace(**settings))
        if result is not None:
            return FINISHED
        if is_locked(self.folder / ".lock"):
            return RUNNING
        return UNFINISHED if config else TO_DO


@dataclass(frozen=True)
class Study:
    """All runs of a study file."""

    name: str
    folder: Path
    teacher: PlannedRun | None
    runs: tuple[PlannedRun, ...]

    @property
    def all_runs(self) -> tuple[PlannedRun, ...]:
        """The teacher, if the study trains one, and the runs."""
        return ((self.teacher,) if self.teacher else ()) + self.runs


def read_study(path: Path, run_dir: Path = Path("runs")) -> Study:
    """Read a study file; resolve and check the flags of all its runs, which may use devices of another machine.

    Raises:
        UserError: the file cannot be read or is no study; a table, script or flag in it does not exist; a run's folder
            holds a run with other settings.
        SystemExit: status 2, after the line with which a script reports a value that is not allowed.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is not valid TOML: {error}") from error
    for key, table in content.items():
        if key not in ("teacher", "grid", "settings") or not isinstance(table, dict):
            raise UserError(f"{path} has {key!r}; the tables [teacher], [grid] and [settings] are allowed")
    grid, settings, folder = content.get("grid", {}), content.get("settings", {}), run_dir / path.stem
    teacher = None
    if "teacher" in content:
        flags = dict(content["teacher"])
        name = str(flags.pop("run_name", "teacher"))
        teacher = _planned(path, name, folder, "train_teacher", flags)
        if "teacher" not in grid:
            settings = {"teacher": str(teacher.folder), **settings}
    study = Study(path.stem, folder, teacher, _grid_runs(path, folder, grid, settings))
    for run in study.all_runs:
        run.state()  # raises for a folder with other settings, before any work
    return study


def _grid_runs(path: Path, folder: Path, grid: dict[str, Any], settings: dict[str, Any]) -> tuple[PlannedRun, ...]:
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: {key} in [grid] is {values!r:.40}; expected a list of at least one value")
    if "script" not in grid:
        raise UserError(f"{path} has no script in [grid], a list of training scripts")
    scripts = [str(script).removesuffix(".py") for script in grid["script"]]
    own = {key: value for key, value in settings.items() if isinstance(value, dict)}
    if foreign := [key for key in own if key not in scripts]:
        raise UserError(f"{path}: [settings.{foreign[0]}] is not a script in [grid], which has {', '.join(scripts)}")
    shared = {key: value for key, value in settings.items() if key not in own}
    known = {script: _flags_of(script) for script in scripts}
    for flag in (*shared, *grid):
        if flag != "script" and not any(flag in flags for flags in known.values()):
            raise UserError(f"{path}: {flag} is not a flag that a study can give to {', '.join(scripts)}")
    runs: dict[str, PlannedRun] = {}
    for point in itertools.product(*({**grid, "script": scripts}[key] for key in grid)):
        chosen = dict(zip(grid, point, strict=True))
        script = chosen.pop("script")
        varied = {flag: value for flag, value in chosen.items() if flag in known[script]}
        common = {flag: value for flag, value in shared.items() if flag in known[script]}
        name = _name(script, varied)
        run = _planned(path, name, folder, script, {**common, **own.get(script, {}), **varied})
        # A script that lacks a varied flag has the same run several times; it is kept once.
        if runs.setdefault(name, run).arguments != run.arguments:
            raise UserError(f"{path}: two different runs would have the name {name}")
    return tuple(runs.values())


def _script_path(script: str) -> Path:
    """SCRIPT.py in the current folder, or that of this project; PACKAGE.SCRIPT is in a folder."""
    path = Path(f"{script.replace('.', '/')}.py")
    return path if path.is_file() else ROOT / path


@functools.cache
def _recipe(script: str) -> dict[str, Any]:
    path = _script_path(script)
    if not path.is_file():
        raise UserError(f"the study's script {script}.py does not exist here or in {ROOT}")
    recipe = runpy.run_path(str(path)).get("RECIPE")
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is not a training script: it has no RECIPE")
    return recipe


def _resolved(script: str, arguments: list[str]) -> dict[str, Any]:
    return vars(cli.parse_args(str(_script_path(script)), _recipe(script), arguments, elsewhere=True))


def _flags_of(script: str) -> set[str]:
    return {"wandb", *_resolved(script, [])}


def _planned(path: Path, name: str, run_dir: Path, script: str, flags: dict[str, Any]) -> PlannedRun:
    if reserved := [flag for flag in RESERVED if flag in flags]:
        raise UserError(f"{path}: {reserved[0]} is set by the study itself; remove it")
    flags = {**flags, "run_dir": str(run_dir), "run_name": name}
    arguments = [text for flag, value in flags.items() for text in (f"--{flag}", *_texts(path, flag, value))]
    settings = _resolved(script, arguments)
    return PlannedRun(
        name, run_dir / name, _script_path(script), tuple(arguments), tuple(flags), settings, _recipe(script)
    )


def _texts(path: Path, flag: str, value: Any) -> list[str]:
    """A TOML value as arguments: true and false as 1 and 0, a list as several."""
    if isinstance(value, list):
        return [text for each in value for text in _texts(path, flag, each)]
    if not isinstance(value, int | float | str):
        raise UserError(f"{path}: {flag} is {value!r:.40}; expected a number, a string or a list of these")
    return [str(int(value)) if isinstance(value, bool) else str(value)]


def _name(script: str, varied: dict[str, Any]) -> str:
    """ard_IGDM_BDM_RES-18_alpha20_seed0: method, teacher and student by name, any other flag with its value."""
    parts, networks = [_script_path(script).stem.removesuffix("_cifar100")], ("teacher", "student")
    for flag in sorted(varied, key=lambda flag: (flag == "seed", flag not in networks)):
        value = varied[flag]
        text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(short_name(text) if flag in networks else f"{flag}{text}".replace("/", "-"))
    return "_".join(parts)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a run folder."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # or the file does not exist
        return isinstance(error, BlockingIOError)
    return False
