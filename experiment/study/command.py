"""study.py: print the runs of a study and their estimated hours, and run those that are not finished."""

import argparse
import functools
import math
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

from cifar100_models import build_model
from experiment import UserError, cli
from experiment.evaluation import MONITOR_PASSES
from experiment.study.plan import FINISHED, ROOT, PlannedRun, Study, read_study
from experiment.study.processes import Processes, submit
from experiment.text import as_text

COUNTED_STEPS = 10
"""Steps of the attack in the passes of costs.toml."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, read FILE.toml, print the runs and run them."""
    parser = cli.Parser(
        "study.py",
        description="Train a grid of runs. Finished runs are skipped, unfinished ones resume.",
        examples=("studies/digits.toml --dry_run 1", "studies/digits.toml --jobs 2"),
    )
    add, where = parser.add_argument, parser.add_mutually_exclusive_group()
    switch = {"type": cli.switch, "default": 0, "metavar": "{0,1}"}
    add("file", type=Path, metavar="FILE.toml", help="the study, such as studies/digits.toml")
    add("--run_dir", type=Path, default=Path("runs"), metavar="DIR", help="parent of the study folder")
    add("--only", nargs="+", default=[], metavar="NAME", help="only runs with these names; * matches any text")
    add("--dry_run", **switch, help="1 prints each command and, where known, its estimated hours")
    where.add_argument("--jobs", type=cli.whole(1), default=1, metavar="N", help="runs at a time, sharing the threads")
    where.add_argument("--devices", nargs="+", default=[], metavar="DEVICE", help="one run at a time on each: cuda:0 …")
    add("--slurm", **switch, help="1 submits the runs to SLURM as an array, --jobs at a time")
    slurm = "parameters of submitit, such as slurm_partition=gpu timeout_min=600 gpus_per_node=1"
    add("--slurm_options", nargs="+", type=_option, default=[], metavar="KEY=VALUE", help=slurm)
    args = parser.parse_args(argv)
    if args.slurm_options and not args.slurm:
        parser.error("argument --slurm_options: not allowed without --slurm 1")
    if args.slurm and args.devices:
        parser.error("argument --devices: not allowed with --slurm 1; expected --jobs")
    study = read_study(args.file, args.run_dir)
    if args.only:
        study = _chosen(study, args.only)
    if args.dry_run:
        _show_costs(study)
        return
    states = [[run.name, run.state()] for run in study.all_runs]
    print(as_text([["run", "state"], *states]))
    print(f"\n{_progress(study)}", flush=True)
    # The runs import this project wherever they start.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if args.slurm:
        submit(study, args.jobs, dict(args.slurm_options))
    else:
        _run(study, args.jobs, args.devices)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected KEY=VALUE")
    return key, int(value) if value.isdecimal() else value


def _chosen(study: Study, names: Sequence[str]) -> Study:
    for name in names:
        if not any(fnmatch(run.name, name) for run in study.runs):
            raise UserError(f"--only {name} matches no run of {study.name}, which has {study.runs[0].name}, …")
    return replace(study, runs=tuple(run for run in study.runs if any(fnmatch(run.name, name) for name in names)))


def _progress(study: Study) -> str:
    finished = sum(run.state() == FINISHED for run in study.all_runs)
    return f"{study.folder}: {finished} of {len(study.all_runs)} runs finished"


def _show_costs(study: Study) -> None:
    """Print each run's command, state and estimated hours, and the total of the unfinished runs."""
    rows, hours = [], []
    for run in study.all_runs:
        print(run.command)
        state, expected = run.state(), hours_of(run)
        rows.append([run.name, state, f"{expected:.2f}" if expected else "-"])
        if state != FINISHED:
            hours.append(expected)
    known = [value for value in hours if value]
    total = f": {sum(known):.1f} hours, one run at a time" if known else ""
    unknown = f"; the hours of {len(hours) - len(known)} are not known" if len(known) < len(hours) else ""
    print("\n" + as_text([["run", "state", "hours"], *rows]))
    print(f"\n{len(hours)} unfinished runs{total}{unknown}")
    if known:
        print(f"hours: operations counted, at the speed expected (not measured) of {counted()['expected']['on']}")


@functools.cache
def counted() -> dict[str, Any]:
    """The content of costs.toml."""
    return tomllib.loads(Path(__file__).with_name("costs.toml").read_text(encoding="utf-8"))


def hours_of(run: PlannedRun) -> float | None:
    """Estimated hours of a whole run; None if costs.toml lacks its method, attack, network or data set."""
    table, settings = counted(), run.settings
    passes, images = table["passes"].get(run.method), table["training_images"].get(settings["dataset"])
    student, teacher = forward_macs(settings["student"]), forward_macs(str(settings.get("teacher")))
    other_attack = settings.get("attack") != run.recipe.get("inner", {}).get("attack")
    if None in (passes, images, student, teacher) or settings["side"] or other_attack:
        return None
    images = (settings["train_examples"] or images) - settings["holdout"]
    of_student = passes[0] + passes[1] + 2 * passes[2] + 2 * (settings["steps"] - COUNTED_STEPS)
    of_teacher = passes[3] + passes[4]
    if passes[4]:  # the attack evaluates the teacher, forward and backward
        of_teacher += 2 * (math.ceil(settings["steps"] / settings.get("teacher_every", 1)) - COUNTED_STEPS)
    training = 2 * (of_student * student + of_teacher * teacher) * images * settings["epochs"]
    evaluated = max(1, settings["epochs"] - settings["eval_after"])
    measuring = 2 * MONITOR_PASSES * student * table["test_images"][settings["dataset"]] * evaluated
    measuring += table["autoattack"]["flops_per_image_and_mac"] * student * settings["aa_examples"]
    # The plan is for a GPU, whose default is tf32, also where it is made on a machine without one.
    precision = settings["precision"] if "precision" in run.given else "tf32"
    speeds = table["expected"]["flops_per_second"]
    # Evaluation and AutoAttack never run in bfloat16.
    return (training / speeds[precision] + measuring / speeds["fp32" if precision == "fp32" else "tf32"]) / 3600


@functools.cache
def forward_macs(name: str, side: int = 32) -> float | None:
    """Multiply-accumulate operations of one forward pass of one image; None for a network that is not known.

    RobustBench's names end with their architecture: Wang2023Better_WRN-28-10.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if found := re.search(r"WRN-?(\d+)[-_](\d+)$", cli.ALIASES.get(name, name)):
        name = f"WRN-{found[1]}-{found[2]}"
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            build_model(name, 100).eval()(torch.empty(1, 3, side, side))
    except (ValueError, UserError):
        return None
    return counter.get_total_flops() / 2


def _run(study: Study, jobs: int, devices: Sequence[str]) -> None:
    """Run the unfinished runs, the teacher first; flags that this machine cannot use are an error before any run."""
    places = [["--device", device] for device in devices] or [[]]
    for run, place in product((run for run in study.all_runs if run.state() != FINISHED), places):
        cli.parse_args(str(run.script), run.recipe, [*run.arguments, *place])
    processes = Processes(study.folder / "logs", jobs, devices)
    if study.teacher and study.teacher.state() != FINISHED:
        failed = processes.work([study.teacher])
        if study.teacher.state() != FINISHED:
            reason = failed.get(study.teacher.name, "another process is training it")
            raise UserError(f"the teacher {study.teacher.folder} is not finished: {reason}")
    failed = processes.work([run for run in study.runs if run.state() != FINISHED])
    print(f"{_progress(study)}, {len(failed)} failed", flush=True)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(study.runs)} runs failed: {reasons}")
