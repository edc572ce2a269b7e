"""Read what compare.py is given as runs: run folders, folders that hold them, studies, and records files.

A records file keeps finished runs where the run folders are not; tables and figures are the same from either. It is
JSON with one line per run: what config.json and result.json hold, and metrics.jsonl by column.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from experiment import UserError
from experiment.compare.runs import PendingRun, RunRecord
from experiment.evaluation import records
from experiment.files import advice, read_json, read_metrics
from experiment.records import Config, Evaluation, Record, Result, Row, Settings, checked, read_config, read_result
from experiment.study import is_locked, read_study

DEPTH = 3
"""Folders of runs are looked for down to this level: runs/STUDY/RUN."""
DIGITS = 6
"""Significant digits in a records file of what metrics.jsonl holds; the rest is kept whole."""
PICTURES = {".png": "png", ".svg": "svg+xml"}
"""Media types of evaluate.py's figures, by the ending of a file."""


class KeptRun(Record):
    """A run in a records file."""

    folder: str
    config: Config
    result: Result
    metrics: dict[str, list[Any]]
    """By column; None where a row has no value."""


class RecordsFile(Record):
    """What ``compare.py --records`` writes."""

    format: Literal[1]
    runs: list[KeptRun]


@dataclass
class Runs:
    """Finished and unfinished runs, and the folders further down that were left out."""

    finished: list[RunRecord] = field(default_factory=list)
    pending: list[PendingRun] = field(default_factory=list)
    deeper: list[Path] = field(default_factory=list)


def read_runs(sources: Sequence[Path], run_dir: Path = Path("runs")) -> Runs:
    """Read every run once, in the order given; `run_dir` holds the runs of studies."""
    runs, seen, planned = Runs(), set(), {}
    for source in sources:
        if source.suffix == ".json" and os.path.isfile(source):
            runs.finished += _read_records(source)
            continue
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
            run = _read_folder(folder) if (folder / "result.json").is_file() else None
            # A run that ended without AutoAttack and was started again with --aa_examples is not finished.
            if run and (run.attack or not run.settings.model_extra.get("aa_examples")):
                runs.finished.append(run)
            elif (folder / "config.json").is_file():
                runs.pending.append(_read_unfinished(folder))
            else:
                plan = planned[folder]
                settings = Settings.model_validate(plan.settings)
                runs.pending.append(
                    PendingRun(plan.recipe["method"], plan.recipe.get("adds"), settings, plan.name, plan.state())
                )
    return runs


def _run_folders(source: Path) -> tuple[list[Path], list[Path]]:
    """The runs of the first level that has any, and those below it: another study's, which would not be compared."""
    # os.path.isdir answers False where Path's raises, such as for a name that is too long.
    if not os.path.isdir(source):
        raise UserError(f"{source} is not a run folder, a folder that holds some, a study or a records file")
    levels = []
    for depth in range(DEPTH):
        folders = [path.parent for path in sorted(source.glob("*/" * depth + "config.json"))]
        levels.append([folder for folder in folders if not (folder / "model.safetensors").is_file()])  # no exports
    found = next(filter(None, levels), None)
    if found is None:
        raise UserError(f"{source} is not a run folder and holds none. {advice(source)}")
    return found, [folder for level in levels for folder in level if level is not found]


def _read_unfinished(folder: Path) -> PendingRun:
    config, metrics = read_config(folder), folder / "metrics.jsonl"
    settings = checked(Settings, config.settings, folder / "config.json")
    done = len(read_metrics(metrics)) if metrics.is_file() else 0
    state = f"{'running' if is_locked(folder / '.lock') else 'unfinished'}, {done} of {settings.epochs} epochs"
    return PendingRun(config.method, config.adds, settings, folder.name, state)


def _read_folder(folder: Path) -> RunRecord:
    """A finished run, with what evaluate.py measured of its final student."""
    config, result = read_config(folder), read_result(folder)
    run = _run(folder, config, result, read_metrics(folder / "metrics.jsonl"))
    if not (folder / "evaluations").is_dir():
        return run
    # Other checkpoints, such as best.pt, and other data leave their records in the same place.
    wanted = (result.student_sha256, config.dataset_sha256)
    found = [checked(Evaluation, record, Path(record["file"])) for record in records(folder)]
    found = [record for record in found if (record.student_sha256, record.dataset_sha256) == wanted]
    if not found:
        return run
    pictures = tuple(path for path in sorted((folder / "evaluations").iterdir()) if path.suffix in PICTURES)
    found = [record for record in found if config.teacher_sha256 in (None, record.teacher_sha256)]
    reports = [record.gradients for record in reversed(found) if record.gradients]
    if report := max(reports, key=lambda report: report.examples, default=None):  # of equally many images the newest
        update = {"scalars": report.scalars, "scalars_examples": report.examples}
        result = result.model_copy(update={"gradients": (result.gradients or report).model_copy(update=update)})
    return replace(run, result=result, pictures=pictures)


def _run(folder: Path, config: Config, result: Result, rows: list[dict[str, Any]]) -> RunRecord:
    settings = checked(Settings, config.settings, folder / "config.json")
    epochs = [checked(Row, row, folder / "metrics.jsonl") for row in rows]
    return RunRecord(config.method, config.adds, settings, folder, config, result, epochs)


def _read_records(path: Path) -> list[RunRecord]:
    kept = checked(RecordsFile, read_json(path), path).runs
    try:
        return [_run(Path(run.folder), run.config, run.result, _by_row(run.metrics)) for run in kept]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def records_of(runs: Sequence[RunRecord]) -> str:
    """The text of a records file."""
    lines = []
    for run in runs:
        config, result = (model.model_dump(exclude_unset=True) for model in (run.config, run.result))
        for content in (config, result):
            if "command" in content:  # without the script's folder, which is the machine's own
                content["command"] = re.sub(r"\S*/(?=\w+\.py(\s|$))", "", content["command"], count=1)
        metrics = _by_column([row.model_dump(exclude_unset=True) for row in run.rows])
        record = {"folder": run.folder.as_posix(), "config": config, "result": result, "metrics": metrics}
        lines.append(json.dumps(record, separators=(",", ":")))
    return '{"format":1,"runs":[\n' + ",\n".join(lines) + "\n]}\n"


def _by_column(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key) for row in rows] for key in keys}
    return {key: [float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for v in columns[key]] for key in keys}


def _by_row(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    rows = zip_longest(*columns.values())
    return [{key: value for key, value in zip(columns, row, strict=True) if value is not None} for row in rows]
