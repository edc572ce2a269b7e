"""The command line of a study: shows its grid, and runs what is not finished."""

from collections.abc import Sequence
from pathlib import Path

from experiment import UserError, cli
from experiment.report.plan import FINISHED, Study, read_study
from experiment.report.processes import Processes


def main(argv: Sequence[str] | None = None) -> None:
    """Parse FILE.toml and the flags, print the grid and run it."""
    parser = cli.Parser(prog="study.py", description="a grid of runs: what is finished is skipped, the rest goes on")
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="the study, such as studies/digits.toml")
    parser.add_argument("--jobs", type=cli.whole(1), default=1, metavar="N", help="runs side by side")
    parser.add_argument("--run_dir", type=Path, default=Path("runs"), metavar="DIR", help="the study is a folder in it")
    args = parser.parse_args(argv)
    study = read_study(args.file, args.run_dir)
    show_grid(study)
    run_study(study, jobs=args.jobs)


def show_grid(study: Study) -> None:
    """Print every run with its state."""
    states = {run.name: run.state() for run in study.all_runs}
    width = max(map(len, states))
    for name, state in states.items():
        print(f"  {name:<{width}}  {state}")
    finished = sum(state == FINISHED for state in states.values())
    print(f"{study.folder}: {finished} of {len(states)} runs finished", flush=True)


def run_study(study: Study, *, jobs: int = 1) -> None:
    """Run what is not finished, the teacher first.

    Raises:
        UserError: runs failed; all others have ended.
        RunStopped: a signal came; the runs at work have saved themselves.
    """
    processes = Processes(study.folder / "logs", jobs, tell=lambda line: print(line, flush=True))
    if study.teacher and study.teacher.state() != FINISHED:
        processes.work([study.teacher])
        if study.teacher.state() != FINISHED:
            reason = processes.outcome.failed.get(study.teacher.name, "another process is training it")
            raise UserError(f"the teacher {study.teacher.folder} is not finished: {reason}")
    outcome = processes.work([run for run in study.runs if run.state() != FINISHED])
    print(f"{study.folder}: {len(outcome.done)} runs done, {len(outcome.failed)} failed", flush=True)
    if outcome.failed:
        raise UserError(
            f"{len(outcome.failed)} of {len(study.runs)} runs failed: "
            + "; ".join(f"{name}: {reason}" for name, reason in outcome.failed.items())
        )
