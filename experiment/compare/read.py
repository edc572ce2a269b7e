"""What compare.py is given, run folders, folders that hold them, studies and records files, as runs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiment import UserError
from experiment.compare.records import read_records
from experiment.compare.run_record import PendingRun, RunRecord, read_run
from experiment.files import MAKE_A_RUN, read_json, read_metrics
from experiment.records import Config, Settings, checked
from experiment.study import is_locked, read_study

DEPTH = 3
"""Folders of runs are looked for down to this level: runs/STUDY/RUN."""
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass
class Runs:
    """Finished and unfinished runs, and the folders further down that were left out."""

    finished: list[RunRecord] = field(default_factory=list)
    pending: list[PendingRun] = field(default_factory=list)
    deeper: list[Path] = field(default_factory=list)


def read_runs(sources: Sequence[Path], run_dir: Path = Path("runs")) -> Runs:
    """Read every run once, in the order given; `run_dir` holds the runs of studies."""
    runs, seen = Runs(), set()
    for source in sources:
        if source.suffix == ".json" and os.path.isfile(source):
            runs.finished += read_records(source)
            continue
        planned = {}
        if source.suffix == ".toml" and os.path.isfile(source):
            planned = {run.folder: run for run in read_study(source, run_dir).all_runs}
            folders = list(planned)
        else:
            folders, deeper = _run_folders(source)
            runs.deeper += deeper
        for folder in folders:
            place = os.path.realpath(folder)
            if place in seen:
                continue
            seen.add(place)
            if (folder / "result.json").is_file():
                runs.finished.append(read_run(folder))
            elif (folder / "config.json").is_file():
                config = read_json(folder / "config.json")
                made = checked(
                    Settings, checked(Config, config, folder / "config.json").settings, folder / "config.json"
                )
                runs.pending.append(_pending(folder.name, config, config["settings"], _progress(folder, made.epochs)))
            else:
                run = planned[folder]
                runs.pending.append(_pending(run.name, run.recipe, run.settings, run.state()))
    return runs


def _run_folders(source: Path) -> tuple[list[Path], list[Path]]:
    """The runs of the first level that has any, and those below it: another study's, which would not be compared."""
    # os.path.isdir and isfile answer False where Path's raise, such as for a name that is too long.
    if os.path.isfile(source):
        raise UserError(f"{source} is a file; expected a folder, a study (.toml) or records (.json). {MAKE_A_RUN}")
    if not os.path.isdir(source):
        raise UserError(f"{source} is not a folder; give folders of runs, or folders that hold them")
    if os.path.isfile(source / "model.safetensors"):
        raise UserError(f"{source} is an export, not a run folder. Give the run that it was made from. {MAKE_A_RUN}")
    levels = (sorted(path.parent for path in source.glob("*/" * level + "config.json")) for level in range(DEPTH))
    for found in levels:
        if found:
            below = (folder for level in levels for folder in level)
            return found, [folder for folder in below if not set(found) & set(folder.parents)]  # an export is no run
    if any(path.suffix.lower() in IMAGES for path in source.glob("*/*")):
        raise UserError(f"{source} is a folder of images, not a run folder. {MAKE_A_RUN} --dataset {source}")
    raise UserError(f"{source} is not a run folder and holds none: there is no config.json in it. {MAKE_A_RUN}")


def _pending(name: str, recipe: dict[str, Any], settings: dict[str, Any], state: str) -> PendingRun:
    return PendingRun(
        method=str(recipe.get("method")),
        added=str(recipe["adds"]) if recipe.get("adds") else None,
        teacher=str(settings.get("teacher") or "-"),
        student=str(settings.get("student")),
        dataset=str(settings.get("dataset")),
        seed=settings["seed"],
        settings=settings,
        folder=name,
        state=state,
    )


def _progress(folder: Path, epochs: int) -> str:
    path = folder / "metrics.jsonl"
    done = len(read_metrics(path)) if path.is_file() else 0
    return f"{'running' if is_locked(folder / '.lock') else 'unfinished'}, {done} of {epochs} epochs"
