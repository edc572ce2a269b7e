"""Read what compare.py is given as runs: run folders, folders that hold them, studies, and records files.

A records file keeps finished runs where the run folders are not; tables and figures are the same from either. It is
JSON with one line per run: what config.json and result.json hold, and metrics.jsonl by column.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiment import UserError
from experiment.compare.runs import PendingRun, RunRecord
from experiment.files import advice, read_json, read_metrics
from experiment.records import Config, Evaluation, Result, Row, Settings, checked
from experiment.study import is_locked, read_study

DEPTH = 3
"""Folders of runs are looked for down to this level: runs/STUDY/RUN."""
FORMAT = 1
"""Of a records file."""
DIGITS = 6
"""Significant digits in a records file of what metrics.jsonl holds; the rest is kept whole."""
PICTURES = {".png": "png", ".svg": "svg+xml"}
"""Media types of evaluate.py's figures, by the ending of a file."""


@dataclass
class Runs:
    """Finished and unfinished runs, and the folders further down that were left out."""

    finished: list[RunRecord] = field(default_factory=list)
    pending: list[PendingRun] = field(default_factory=list)
    deeper: list[Path] = field(default_factory=list)


def read_runs(sources: Sequence[Path], run_dir: Path = Path("runs")) -> Runs:
    """Read every run once, in the order given; `run_dir` holds the runs of studies.

    Raises:
        UserError: a source is not of these kinds, or a file in it holds what no run writes.
    """
    runs, seen = Runs(), set()
    for source in sources:
        planned = {}
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
            if (folder / "result.json").is_file():
                runs.finished.append(_read_folder(folder))
            elif (folder / "config.json").is_file():
                runs.pending.append(_read_unfinished(folder))
            else:
                run = planned[folder]
                method, adds = run.recipe["method"], run.recipe.get("adds")
                runs.pending.append(PendingRun(method, adds, run.settings, run.name, run.state()))
    return runs


def _run_folders(source: Path) -> tuple[list[Path], list[Path]]:
    """The runs of the first level that has any, and those below it: another study's, which would not be compared."""
    # os.path.isdir answers False where Path's raises, such as for a name that is too long.
    if not os.path.isdir(source):
        raise UserError(f"{source} is not a run folder, a folder that holds some, a study or a records file")
    levels = [
        [path.parent for path in sorted(source.glob("*/" * level + "config.json")) if not _is_export(path.parent)]
        for level in range(DEPTH)
    ]
    found = next(filter(None, levels), None)
    if found is None:
        raise UserError(f"{source} is not a run folder and holds none. {advice(source)}")
    return found, [folder for level in levels for folder in level if level is not found]


def _is_export(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file()


def _read_unfinished(folder: Path) -> PendingRun:
    path = folder / "config.json"
    config = checked(Config, read_json(path), path)
    epochs, metrics = checked(Settings, config.settings, path).epochs, folder / "metrics.jsonl"
    done = len(read_metrics(metrics)) if metrics.is_file() else 0
    state = f"{'running' if is_locked(folder / '.lock') else 'unfinished'}, {done} of {epochs} epochs"
    return PendingRun(config.method, config.adds, config.settings, folder.name, state)


def _read_folder(folder: Path) -> RunRecord:
    """A finished run, with what evaluate.py measured of its final student."""
    contents = (read_json(folder / name) for name in ("config.json", "result.json"))
    run = _run(folder, *contents, read_metrics(folder / "metrics.jsonl"))
    if not (folder / "evaluations").is_dir():
        return run
    from experiment.evaluation import records

    # Other checkpoints, such as best.pt, and other data leave their records in the same place.
    wanted = (run.result.student_sha256, run.config.dataset_sha256)
    found = [checked(Evaluation, record, Path(record["file"])) for record in records(folder)]
    found = [record for record in found if (record.student_sha256, record.dataset_sha256) == wanted]
    if not found:
        return run
    pictures = tuple(path for path in sorted((folder / "evaluations").iterdir()) if path.suffix in PICTURES)
    teacher, result = run.config.teacher_sha256, run.result
    reports = [
        record.gradients for record in reversed(found) if record.gradients and teacher in (None, record.teacher_sha256)
    ]
    if report := max(reports, key=lambda report: report.examples, default=None):  # of equally many images the newest
        update = {"scalars": report.scalars, "scalars_examples": report.examples}
        result = result.model_copy(update={"gradients": (result.gradients or report).model_copy(update=update)})
    return replace(run, result=result, pictures=pictures)


def _run(folder: Path, config: dict[str, Any], result: dict[str, Any], rows: list[dict[str, Any]]) -> RunRecord:
    """A run from what its files hold; UserError if a file holds what no run writes."""
    made = checked(Config, config, folder / "config.json")
    checked(Settings, made.settings, folder / "config.json")
    ended = checked(Result, result, folder / "result.json")
    epochs = [checked(Row, row, folder / "metrics.jsonl") for row in rows]
    return RunRecord(made.method, made.adds, made.settings, folder, made, ended, epochs)


def _read_records(path: Path) -> list[RunRecord]:
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is not a records file of this version (compare.py --records writes one)")
    try:
        return [
            _run(Path(record["folder"]), record["config"], record["result"], _by_row(record["metrics"]))
            for record in content["runs"]
        ]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: a record is damaged: {type(error).__name__} {error}") from error


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
    return f'{{"format":{FORMAT},"runs":[\n' + ",\n".join(lines) + "\n]}\n"


def _by_column(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [_rounded(row.get(key)) for row in rows] for key in keys}


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _by_row(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    rows = zip(*columns.values(), strict=True)
    return [{key: value for key, value in zip(columns, row, strict=True) if value is not None} for row in rows]
