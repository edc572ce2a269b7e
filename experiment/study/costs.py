"""Hours that a run is expected to take on a GPU: its operations, counted, at the speed that costs.toml expects."""

import functools
import math
import re
import tomllib
from importlib import resources
from typing import Any

from cifar100_models import build_model
from experiment import UserError, cli
from experiment.study.plan import PlannedRun

COUNTED_STEPS = 10
"""Steps of the attack in the passes of costs.toml."""


@functools.cache
def counted() -> dict[str, Any]:
    """The content of costs.toml."""
    return tomllib.loads(resources.files("experiment.study").joinpath("costs.toml").read_text(encoding="utf-8"))


def hours_of(run: PlannedRun) -> float | None:
    """Hours of a run from its start; None for a method, a network or data that costs.toml does not know."""
    from experiment.evaluation import MONITOR_PASSES

    table, settings = counted(), run.settings
    passes, images = table["passes"].get(run.method), table["training_images"].get(settings["dataset"])
    student, teacher = forward_macs(settings["student"]), forward_macs(str(settings.get("teacher")))
    if None in (passes, images, student, teacher) or settings["side"]:
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
