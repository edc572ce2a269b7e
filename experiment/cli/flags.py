"""The table of flags: one entry per name, whichever script has it, by the groups of --help; and the types of values."""

import argparse
import enum
import math
import os
from collections.abc import Callable
from typing import Any

import attacks
from cifar100_models import check_model_name

ALIASES = {
    "BDM": "Wang2023Better_WRN-28-10",
    "DEC": "Cui2023Decoupled_WRN-28-10",
    "LTD": "Chen2021LTD_WRN34_10",
}
"""The papers' short names of RobustBench models, of CIFAR-100 and of CIFAR-10."""


class Role(enum.Flag):
    """What the value of a flag is used for, beside the training itself."""

    NONE = 0
    METHOD = enum.auto()  # in the scripts whose RECIPE has it, with the RECIPE's default; in the run's name if changed
    NAMED = enum.auto()  # in every script; in the run's name if changed
    FREE = enum.auto()  # may change when a run is resumed: it changes no weight and no accuracy that is kept
    AUTOATTACK = enum.auto()  # may change after the training, as long as nothing was attacked
    MAY_DIFFER = enum.auto()  # may differ between compared runs: the experiment is the same
    PRIVATE = enum.auto()  # not published with an exported student
    LATER = enum.auto()  # not in config.json of the first runs of format 1, which did what the default does


class Flag:
    """One entry of the table: help text, roles, and further arguments of argparse's add_argument."""

    def __init__(self, text: str, roles: Role = Role.NONE, **options: Any) -> None:
        self.roles, self.options = roles, {"help": text, **options}


# Types: parsers for argparse, whose errors name the value and what is expected


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A parser of numbers or fractions such as 8/255 in [low, high], or in (low, high] with `above`."""
    limits = f" above {low:g}" if above else f" from {low:g}" if math.isfinite(low) else ""
    limits += f" up to {high:g}" if math.isfinite(high) else ""

    def parse(text: str) -> float:
        try:
            parts = [float(part) for part in text.split("/", 1)]
            value = parts[0] / parts[1] if parts[1:] else parts[0]
        except (ValueError, ZeroDivisionError):
            parts, value = [], math.nan
        if not all(map(math.isfinite, [*parts, value])) or not low <= value <= high or (above and value == low):
            raise _not_allowed(text, f"a number{limits}, or a fraction such as 8/255")
        return value

    return parse


def whole(low: int) -> Callable[[str], int]:
    """A parser of whole numbers of at least `low` (and below 2**31)."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) <= 10 and low <= int(text) < 2**31):
            raise _not_allowed(text, f"a whole number from {low}")
        return int(text)

    return parse


fraction = number(0.0, 1.0)
positive_int = whole(1)


def switch(text: str) -> int:
    """A parser of 0 and 1."""
    if text not in ("0", "1"):
        raise _not_allowed(text, "0 or 1")
    return int(text)


def model_name(text: str) -> str:
    """A parser of the names that ``build_model`` takes; nothing is built."""
    try:
        check_model_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def run_name(text: str) -> str:
    """A parser of folder names."""
    if not text or text in (".", "..") or any(character in text for character in "/\\\0\n") or text.startswith("-"):
        raise _not_allowed(text, "a plain folder name without slashes")
    return text


def _not_allowed(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r} is not allowed; expected {expected}")


# The table

METHOD, NAMED, FREE, AUTOATTACK, MAY_DIFFER, PRIVATE, LATER = Role
_TRACKING = FREE | MAY_DIFFER | PRIVATE
_SWITCH: dict[str, Any] = {"type": switch, "metavar": "{0,1}", "default": 0}
_COUNT: dict[str, Any] = {"type": whole(0), "default": 0}


def own_flag(default: Any) -> Flag:
    """A flag that only this script's RECIPE has: of its default's type, or any number where the default is computed."""
    types = {bool: switch, int: whole(0), float: number(-math.inf)}
    kind = number(-math.inf) if callable(default) else types.get(type(default), str)
    return Flag("this script's own: see RECIPE and training_loss", METHOD, type=kind)


GROUPS: dict[str, dict[str, Flag]] = {
    "method": {
        "preset": Flag("default: as IGDM's release documents; paper: as the papers", choices=("default", "paper"),
                       default="default"),
        "teacher": Flag("BDM, DEC, LTD, a RobustBench Linf name, checkpoint or run folder; or architecture of "
                        "--teacher_path", METHOD),
        "teacher_path": Flag("weights file of --teacher: RobustBench's .pt, or bare weights", FREE | MAY_DIFFER,
                             default=None),
        "student": Flag("RES-18, MN-V2, RES-20, RES-8, WRN-d-w, or FILE.py:function", METHOD, type=model_name),
        "objective": Flag("adversarial training objective", METHOD, choices=("TRADES", "PGD-AT")),
        "trades_weight": Flag("weight of TRADES' robust term (1/lambda in its paper)", METHOD, type=number()),
        "target": Flag("teacher's target: T(x_adv) or T(x)", METHOD, choices=("adversarial", "clean")),
        "ce_weight": Flag("lambda, the weight of CE(S(x_adv), y)", METHOD, type=number()),
        "clean_weight": Flag("share of the clean term KL(T(x) || S(x)); 1/6 in the paper", METHOD, type=number(0, 1)),
        "loss_scale": Flag("factor on the base loss; 0.1 with --preset paper", METHOD, type=number(above=True)),
        "alpha": Flag("weight of the IGDM term at epoch ramp_epochs", METHOD, type=number()),
        "beta": Flag("the plus point is x + beta delta", METHOD, type=number()),
        "gamma": Flag("the minus point is x - gamma delta", METHOD, type=number()),
        "ramp_epochs": Flag("the IGDM term's weight is alpha * epoch / ramp_epochs, not capped", METHOD,
                            type=positive_int),
    },
    "optimisation": {
        "epochs": Flag("number of epochs", METHOD, type=positive_int),
        "batch": Flag("images per optimizer step, over all GPUs together", METHOD, type=positive_int),
        "lr": Flag("learning rate of SGD", METHOD, type=number(above=True)),
        "momentum": Flag("momentum of SGD", METHOD, type=number(0, 1)),
        "wd": Flag("weight decay of SGD", METHOD, type=number()),
        "lr_milestones": Flag("epochs after which lr is divided by 10 (default: 1/2 and 3/4 of the epochs)", METHOD,
                              type=positive_int, nargs="*"),
    },
    "attack": {
        "attack": Flag("objective of inner maximisation (attacks.py)", METHOD, choices=attacks.INNER_MAXIMISATIONS),
        "epsilon": Flag("Linf budget, pixels in [0, 1]", METHOD, type=fraction),
        "step_size": Flag("size of an attack step, pixels in [0, 1]", METHOD, type=fraction),
        "steps": Flag("number of attack steps", METHOD, type=positive_int),
        "teacher_every": Flag("evaluate the teacher at every K-th attack step; 1 in the paper",
                              METHOD | LATER, type=positive_int, default=1),
    },
    "data": {
        "dataset": Flag("cifar100, cifar10, svhn, digits (in scikit-learn), an .npz file, or a folder of images",
                        default="cifar100"),
        "data_dir": Flag("data directory; CIFAR and SVHN are downloaded here if missing", _TRACKING,
                         type=os.path.expanduser, default="data"),
        "side": Flag("side in pixels to which images are reduced, by block means (0: unchanged)",
                     NAMED | LATER, **_COUNT),
        "train_examples": Flag("size of a fixed subset of the training set, stratified by class (0: all)",
                               NAMED | LATER, **_COUNT),
        "holdout": Flag("training images held out, stratified by class, to measure PGD-10 on (0: none)",
                        NAMED | LATER, **_COUNT),
    },
    "evaluation": {
        "eval_after": Flag("epoch after which clean and PGD-20 accuracy are measured; the last epoch always is",
                           MAY_DIFFER, type=whole(0), default=90),
        "aa_examples": Flag("test images for AutoAttack (standard), the first N (0: none)", AUTOATTACK,
                            type=whole(0), default=10_000),
        "aa_batch": Flag("images per AutoAttack chunk; each has its own random draws and is saved when done",
                         AUTOATTACK | MAY_DIFFER, type=positive_int, default=250),
        "aa_best": Flag("1 runs AutoAttack also on the best epoch of --holdout and the mean of --swa_after",
                        AUTOATTACK | MAY_DIFFER | LATER, **_SWITCH),
        "swa_after": Flag("epoch after which the weights are averaged; the average is measured too (0: none)",
                          NAMED | LATER, **_COUNT),
    },
    "run": {
        "seed": Flag("seed of weights, order, augmentation, attacks and AutoAttack", MAY_DIFFER, **_COUNT),
        "device": Flag("auto, cpu, cuda or cuda:N", MAY_DIFFER, default="auto"),
        "compile": Flag("1 compiles the networks with torch.compile", NAMED, **_SWITCH),
        "deterministic": Flag("1 makes runs on CUDA bit-identical too, slower", NAMED, **_SWITCH),
        "precision": Flag("arithmetic of the networks (default: fp32 on the CPU, tf32 on CUDA)", NAMED,
                          choices=("fp32", "tf32", "bf16")),
        "stop_on_collapse": Flag("0 continues with a student that predicts one class only", FREE | MAY_DIFFER | LATER,
                                 **_SWITCH | {"default": 1}),
        "checkpoint_minutes": Flag("minutes between checkpoints", FREE | MAY_DIFFER, type=number(above=True),
                                   default=10.0),
        "run_dir": Flag("folder of the run folders", _TRACKING, type=os.path.expanduser, default="runs"),
        "run_name": Flag("name of the run folder (default: made of script, dataset, networks, changed flags and seed)",
                         MAY_DIFFER, type=run_name),
    },
    "tracking": {
        "nowand": Flag("inverse of --wandb, as in the released code", _TRACKING,
                       **_SWITCH | {"nargs": "?", "const": 1, "default": 1}),
        "wandb": Flag("1 logs the metrics to Weights & Biases (default: 0)", PRIVATE,
                      **_SWITCH | {"nargs": "?", "const": 1, "default": None}),
        "wandb_project": Flag("W&B project", _TRACKING, default="robust-distillation"),
        "wandb_entity": Flag("W&B entity (default: your own)", _TRACKING, default=None),
        "wandb_name": Flag("W&B run name (default: the run folder's)", _TRACKING, default=None),
        "wandb_tags": Flag("W&B tags", _TRACKING, nargs="*", default=[]),
        "wandb_artifact": Flag("1 uploads the final student to Weights & Biases", _TRACKING | LATER, **_SWITCH),
        "tensorboard": Flag("1 logs the metrics to TensorBoard, in the run folder", FREE | MAY_DIFFER | LATER,
                            **_SWITCH),
    },
}  # fmt: skip
"""By group and name. The default of a METHOD flag is the RECIPE's."""

FLAGS = {name: flag for group in GROUPS.values() for name, flag in group.items()}


def options(name: str) -> dict[str, Any]:
    """Arguments of argparse's add_argument for one flag."""
    return FLAGS[name].options


def settings_with(role: Role) -> tuple[str, ...]:
    """Names of the flags that have a role, in the order of the table."""
    return tuple(name for name, flag in FLAGS.items() if role in flag.roles)


LATER_SETTINGS = {name: options(name)["default"] for name in settings_with(Role.LATER)}
"""Settings that are missing in the config.json of an earlier version, with the values that describe what it did."""
