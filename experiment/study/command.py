"""The command line of a study: shows its grid, and runs what is not finished."""

import os
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from experiment import UserError, cli
from experiment.study.costs import EXPECTED, cost_of, counted
from experiment.study.live import LiveTable
from experiment.study.plan import FINISHED, ROOT, Study, read_study
from experiment.study.processes import Processes
from experiment.text import as_text


def main(argv: Sequence[str] | None = None) -> None:
    """Parse FILE.toml and the flags, print the grid and run it."""
    parser = cli.Parser(
        "study.py",
        description="Train a grid of runs. Finished runs are skipped, unfinished ones resume.",
        examples=("studies/digits.toml --dry_run 1", "studies/digits.toml --jobs 2"),
    )
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="the study, such as studies/digits.toml")
    parser.add_argument("--run_dir", type=Path, default=Path("runs"), metavar="DIR", help="the study is a folder in it")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="only runs with these names; * stands for any text"
    )
    parser.add_argument(
        "--dry_run", type=cli.switch, default=0, metavar="{0,1}", help="1 prints each command and what it would cost"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=cli.whole(1), default=1, metavar="N", help="runs side by side, threads divided")
    where.add_argument("--devices", nargs="+", default=[], metavar="DEVICE", help="one run at a time on each: cuda:0 …")
    parser.add_argument(
        "--slurm",
        type=cli.switch,
        default=0,
        metavar="{0,1}",
        help="1 sends the runs to SLURM as an array, --jobs wide",
    )
    parser.add_argument(
        "--slurm_cluster", choices=("slurm", "local", "debug"), default="slurm", help="local and debug try it out here"
    )
    parser.add_argument(
        "--slurm_options",
        nargs="+",
        type=_option,
        default=[],
        metavar="KEY=VALUE",
        help="parameters of submitit, such as slurm_partition=gpu timeout_min=600 gpus_per_node=1",
    )
    args = parser.parse_args(argv)
    study = read_study(args.file, args.run_dir)
    if args.only:
        study = chosen(study, args.only)
    if args.dry_run:
        show_costs(study)
        return
    show_grid(study)
    # The runs import this project wherever they start.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if args.slurm:
        from experiment.study.slurm import submit

        submit(study, cluster=args.slurm_cluster, jobs=args.jobs, options=dict(args.slurm_options))
    else:
        check_machine(study, args.devices)
        run_study(study, jobs=args.jobs, devices=args.devices)


def _option(text: str) -> tuple[str, Any]:
    import argparse

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; KEY=VALUE")
    return key, int(value) if value.isdecimal() else value


def chosen(study: Study, names: Sequence[str]) -> Study:
    """The study with only the runs whose names match.

    Raises:
        UserError: a name matches none.
    """
    for name in names:
        if not any(fnmatch(run.name, name) for run in study.runs):
            raise UserError(f"--only {name} matches no run of {study.name}, which has {study.runs[0].name}, …")
    runs = tuple(run for run in study.runs if any(fnmatch(run.name, name) for name in names))
    return Study(study.name, study.folder, study.teacher, runs)


def show_grid(study: Study) -> None:
    """Print every run with its state."""
    states = [[run.name, run.state()] for run in study.all_runs]
    print(as_text([["run", "state"], *states]))
    finished = sum(state == FINISHED for _, state in states)
    print(f"\n{study.folder}: {finished} of {len(states)} runs finished", flush=True)


def show_costs(study: Study) -> None:
    """Print each run's command and state, and what it would cost."""
    table = [["run", "state", "hours", "from"]]
    total, unknown = 0.0, 0
    for run in study.all_runs:
        print(run.command)
        cost, state = cost_of(run, study), run.state()
        total += cost.hours if cost and state != FINISHED else 0.0
        unknown += cost is None and state != FINISHED
        hours, source = (f"{cost.hours:.2f}", cost.source) if cost else ("-", UNKNOWN)
        table.append([run.name, state, hours, source])
    print("\n" + as_text(table))
    unfinished = sum(row[1] != FINISHED for row in table[1:])
    known = UNKNOWN if unknown == unfinished > 0 else f"{total:.1f} hours, one run at a time"
    more = f"; {unknown} of them {UNKNOWN}" if 0 < unknown < unfinished else ""
    print(f"\n{unfinished} unfinished runs: {known}{more}")
    if any(row[3].startswith(EXPECTED) for row in table[1:]):
        print(f"{EXPECTED}: operations counted, at the speed expected (not measured) of {counted()['expected']['on']}")


UNKNOWN = "not known before the first epoch"


def check_machine(study: Study, devices: Sequence[str] = ()) -> None:
    """Refuse what this machine cannot run, before any run starts.

    Raises:
        SystemExit: status 2, after the line with which the run would refuse it.
    """
    for run in (run for run in study.all_runs if run.state() != FINISHED):
        for device in ([f"--device={device}"] for device in devices) if devices else [[]]:
            cli.parse_args(str(run.script), run.recipe, [*run.arguments, *device])


def run_study(study: Study, *, jobs: int = 1, devices: Sequence[str] = ()) -> None:
    """Run what is not finished, the teacher first.

    Raises:
        UserError: runs failed; all others have ended.
        RunStopped: a signal came; the runs at work have saved themselves.
    """
    waiting = [run for run in study.runs if run.state() != FINISHED]
    done = sum(run.state() == FINISHED for run in study.all_runs)
    with LiveTable(len(study.all_runs), done) as table:
        processes = Processes(study.folder / "logs", jobs, devices, tell=table.tell, watch=table.show)
        if study.teacher and study.teacher.state() != FINISHED:
            processes.work([study.teacher])
            if study.teacher.state() != FINISHED:
                reason = processes.outcome.failed.get(study.teacher.name, "another process is training it")
                raise UserError(f"the teacher {study.teacher.folder} is not finished: {reason}")
        outcome = processes.work(waiting)
    _conclude(study, outcome.failed)


def _conclude(study: Study, failed: Mapping[str, str]) -> None:
    finished = sum(run.state() == FINISHED for run in study.all_runs)
    print(f"{study.folder}: {finished} of {len(study.all_runs)} runs finished, {len(failed)} failed", flush=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(study.runs)} runs failed: "
            + "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        )
    sys.stdout.flush()
