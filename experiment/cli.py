"""Flags: one table for all scripts; a script has the method flags that its RECIPE gives a number to, and no others."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cifar100_models import check_name
from experiment.entry import batch_of_script, guard

ALIASES = {
    "BDM": "Wang2023Better_WRN-28-10",
    "DEC": "Cui2023Decoupled_WRN-28-10",
    "LTD": "Chen2021LTD_WRN34_10",
}
"""The papers' short names of RobustBench models."""

__all__ = ["guard"]


def settings(recipe: dict[str, Any], *, paper: bool) -> dict[str, Any]:
    """All {flag: value} of a RECIPE's groups: those of --preset paper, or the defaults."""
    groups = (v for k, v in recipe.items() if isinstance(v, dict) and k.startswith("paper") == paper)
    return {name: value for group in groups for name, value in group.items()}


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A parser of numbers or fractions such as 8/255 in [low, high], or in (low, high] with `above`."""

    def parse(text: str) -> float:
        try:
            numerator, slash, denominator = text.partition("/")
            value = float(numerator) / float(denominator if slash else 1)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        # isascii: float() also reads the digits of other scripts, and underscores.
        if (
            not text.isascii()
            or "_" in text
            or not (low <= value <= high)
            or (above and value == low)
            or math.isinf(value)
        ):
            limits = f" above {low:g}" if above else f" from {low:g}" if math.isfinite(low) else ""
            limits += f" up to {high:g}" if math.isfinite(high) else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; a number{limits}, or a fraction such as 8/255")
        return value

    return parse


def whole(low: int) -> Callable[[str], int]:
    """A parser of whole numbers of at least `low` (and below 2**31)."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) < 2**31):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; a whole number from {low}")
        return int(text)

    return parse


def switch(text: str) -> int:
    """A parser of 0 and 1."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; 0 or 1")
    return int(text)


fraction = number(0.0, 1.0)
positive_int = whole(1)


def _model_name(text: str) -> str:
    try:
        check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _run_name(text: str) -> str:
    if not text or text in (".", "..") or any(character in text for character in "/\\\0\n") or text.startswith("-"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; a plain folder name without slashes")
    return text


# Flags that exist in the scripts whose RECIPE has the key; the default is the recipe's.
METHOD_FLAGS: dict[str, dict[str, Any]] = {
    "teacher": {"help": "BDM, DEC, LTD, any RobustBench CIFAR-100 Linf name, or a path to a checkpoint or run folder"},
    "student": {"type": _model_name, "help": "RES-18, MN-V2, RES-20, RES-8 or WRN-d-w"},
    "epochs": {"type": positive_int, "help": "number of epochs"},
    "batch": {"type": positive_int, "help": "images per optimizer step, over all GPUs together"},
    "lr": {"type": number(above=True), "help": "learning rate of SGD"},
    "momentum": {"type": number(0, 1), "help": "momentum of SGD"},
    "wd": {"type": number(), "help": "weight decay; the released code's is 2e-4"},
    "lr_milestones": {
        "type": positive_int,
        "nargs": "*",
        "help": "epochs after which lr is divided by 10; default 1/2 and 3/4 of the epochs",
    },
    "epsilon": {"type": fraction, "help": "Linf budget, pixels in [0, 1]"},
    "step_size": {"type": fraction, "help": "attack step, pixels in [0, 1]"},
    "steps": {"type": positive_int, "help": "attack steps"},
    "attack": {
        "choices": ("pgd", "rslad", "adaad", "igdm"),
        "help": "inner maximisation; the default is the method's own; pgd and rslad run without the teacher",
    },
    "objective": {"choices": ("TRADES", "PGD-AT"), "help": "adversarial training objective"},
    "trades_weight": {"type": number(), "help": "weight of TRADES' robust term (1/lambda in its paper)"},
    "target": {"choices": ("adversarial", "clean"), "help": "teacher's target: T(x_adv) or T(x)"},
    "ce_weight": {"type": number(), "help": "lambda, the weight of CE(S(x_adv), y)"},
    "clean_weight": {"type": number(0, 1), "help": "share of the clean term KL(T(x) || S(x)); 1/6 in the paper"},
    "loss_scale": {"type": number(above=True), "help": "factor on the base loss; 0.1 in the paper"},
    "alpha": {"type": number(), "help": "weight of the IGDM term when its ramp is complete"},
    "beta": {"type": number(), "help": "the plus point is x + beta delta"},
    "gamma": {"type": number(), "help": "the minus point is x - gamma delta"},
    "ramp_epochs": {"type": positive_int, "help": "the IGDM term's weight is alpha * epoch / ramp_epochs"},
}

# Flags of every training script.
RUN_FLAGS: dict[str, dict[str, Any]] = {
    "dataset": {"default": "cifar100", "help": "cifar100, cifar10, digits (ships with scikit-learn), or an .npz file"},
    "data_dir": {"default": "data", "help": "where CIFAR lies or is downloaded to"},
    "side": {
        "type": whole(0),
        "default": 0,
        "help": "reduce the images to N x N pixels, each the mean of a block; 0 leaves them as they are",
    },
    "holdout": {
        "type": whole(0),
        "default": 0,
        "help": "training images to set aside, balanced over the classes, and to measure on instead; 0 for none",
    },
    "eval_after": {
        "type": whole(0),
        "default": 90,
        "help": "clean and PGD-20 accuracy in every epoch after this one, and in the last",
    },
    "aa_examples": {"type": whole(0), "default": 10_000, "help": "test images for AutoAttack at the end; 0 for none"},
    "aa_batch": {
        "type": positive_int,
        "default": 250,
        "help": "images per AutoAttack chunk; random draws and resume go by chunks",
    },
    "aa_best": {
        "type": switch,
        "metavar": "{0,1}",
        "default": 0,
        "help": "1 runs AutoAttack on the best epoch of --holdout too",
    },
    "swa_after": {
        "type": whole(0),
        "default": 0,
        "help": "average the weights from epoch N on and measure the average too; 0 for none",
    },
    "seed": {"type": whole(0), "default": 0, "help": "seed of weights, order, augmentation, attacks and AutoAttack"},
    "device": {"default": "auto", "help": "auto, cpu, cuda or cuda:N"},
    "precision": {"choices": ("fp32", "tf32", "bf16"), "help": "default fp32 on the CPU, tf32 on CUDA"},
    "compile": {"type": switch, "metavar": "{0,1}", "default": 0, "help": "torch.compile the networks"},
    "deterministic": {
        "type": switch,
        "metavar": "{0,1}",
        "default": 0,
        "help": "bit-identical runs on CUDA too, slower",
    },
    "checkpoint_minutes": {
        "type": number(above=True),
        "default": 10.0,
        "help": "most minutes of training that a kill can lose",
    },
    "run_dir": {"default": "runs", "help": "folder of the run folders"},
    "run_name": {
        "type": _run_name,
        "help": "name of the run folder; default made of script, dataset, teacher, student, seed",
    },
    "nowand": {
        "type": switch,
        "metavar": "{0,1}",
        "nargs": "?",
        "const": 1,
        "default": 1,
        "help": "0 mirrors the metrics to Weights & Biases",
    },
    "wandb_project": {"default": "robust-distillation", "help": "W&B project"},
    "wandb_entity": {"default": None, "help": "W&B entity"},
    "wandb_name": {"default": None, "help": "W&B run name; default the run folder's"},
    "wandb_tags": {"nargs": "*", "default": [], "help": "W&B tags"},
    "wandb_artifact": {
        "type": switch,
        "metavar": "{0,1}",
        "default": 0,
        "help": "1 uploads the final student to Weights & Biases",
    },
    "tensorboard": {
        "type": switch,
        "metavar": "{0,1}",
        "default": 0,
        "help": "1 mirrors the metrics to TensorBoard, in the run folder",
    },
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults as they would be typed: 8/255, and none where the text says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str:
        value = action.default
        if value is None or value == []:
            return action.help
        if isinstance(value, float) and not value.is_integer() and math.isclose(round(255 * value), 255 * value):
            return f"{action.help} (default: {255 * value:.0f}/255)"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Strict parsing; an error is one line on stderr and exit status 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def _flag_like(value: Any) -> dict[str, Any]:
    """A flag for a number that only this RECIPE has: whole or not, as its default is."""
    kinds = {bool: switch, int: whole(0), float: number(-math.inf)}
    kind = kinds.get(type(value), str)
    return {"type": kind, "help": "of this script's RECIPE"}


def build_parser(script: str, recipe: dict[str, Any]) -> Parser:
    """The parser of one script, before presets and run-dependent defaults are filled in."""
    title = f"{recipe['method']}{'+' + recipe['adds'] if 'adds' in recipe else ''} on CIFAR-100 and friends"
    parser = Parser(prog=Path(script).name, description=title)
    if any(group.startswith("paper") for group in recipe):
        parser.add_argument(
            "--preset",
            choices=("default", "paper"),
            default="default",
            help="the documented recipe, or the papers' published one",
        )
    if "teacher" in recipe["networks"]:
        parser.add_argument("--teacher_path", default=None, help="the downloaded RobustBench .pt file of --teacher")
    for name, value in settings(recipe, paper=False).items():
        # train_teacher.py's only network is no one's student: --model says the same there.
        alias = ["--model"] if name == "student" and "teacher" not in recipe["networks"] else []
        parser.add_argument(*alias, f"--{name}", dest=name, **METHOD_FLAGS.get(name, _flag_like(value)), default=value)
    for name, options in RUN_FLAGS.items():
        parser.add_argument(f"--{name}", **options)
    return parser


def parse_args(script: str, recipe: dict[str, Any], argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a script's flags and resolve every default.

    Args:
        script: the script's ``__file__``; names the program and, without --run_name, the run.
        recipe: the script's RECIPE: ``method``, ``adds`` where it adds something to that method, and groups of
            {flag: value}. Those whose name begins with ``paper`` are what --preset paper changes (a value may be a
            table {student: {teacher: value}} or the name of another flag); the others are the defaults.
        argv: arguments; those of the process if None.

    Returns:
        A namespace with one attribute per flag. A flag given on the command line beats the preset.

    Raises:
        SystemExit: status 2 after one line on stderr, for any argument that is not allowed.
    """
    parser = build_parser(script, recipe)
    args = parser.parse_args(argv)
    if getattr(args, "preset", "default") == "paper":
        # argparse leaves an attribute that exists alone unless the flag is given: this finds what the user gave.
        unset = object()
        given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
        for name, value in settings(recipe, paper=True).items():
            if getattr(given, name) is unset:
                setattr(args, name, _preset_value(parser, args, name, value))
        if given.epochs is not unset and given.lr_milestones is unset:
            args.lr_milestones = None  # the preset's are those of its own number of epochs
    _resolve(parser, args, Path(script).stem)
    batch_of_script.set(args.batch)
    return args


def _preset_value(parser: Parser, args: argparse.Namespace, name: str, value: Any) -> Any:
    """A preset's number: as it is, looked up in a table by teacher and student, or that of another flag."""
    if isinstance(value, str) and hasattr(args, value):
        return getattr(args, value)
    if not isinstance(value, dict):
        return value
    short = {name: alias for alias, name in ALIASES.items()}.get(args.teacher, args.teacher)
    if args.student not in value or short not in value[args.student]:
        parser.error(
            f"--preset paper has no {name} for teacher {args.teacher} and student {args.student}; the paper has it for "
            f"{', '.join(next(iter(value.values())))} and {', '.join(value)} only: give --{name}"
        )
    return value[args.student][short]


def _resolve(parser: Parser, args: argparse.Namespace, stem: str) -> None:
    """Fill in the defaults that depend on other flags or on the machine; refuse what contradicts itself."""
    if args.lr_milestones is None:
        # An epoch that starts after the fraction has passed is the first to be lowered: ceil.
        args.lr_milestones = [math.ceil(args.epochs / 2), math.ceil(args.epochs * 3 / 4)]
    elif sorted(set(args.lr_milestones)) != args.lr_milestones:
        parser.error(f"argument --lr_milestones: {args.lr_milestones} is not allowed; epochs in rising order")
    if args.aa_best and not args.holdout:
        parser.error("argument --aa_best: 1 is not allowed without --holdout, whose images tell the best epoch")
    if args.swa_after >= args.epochs:
        parser.error(f"argument --swa_after: {args.swa_after} is not allowed; below --epochs {args.epochs}")
    if args.wandb_artifact and args.nowand:
        parser.error("argument --wandb_artifact: 1 is not allowed without --nowand 0")
    args.device = resolve_device(parser, args.device)
    cuda = args.device.startswith("cuda")
    if args.precision is None:
        args.precision = "tf32" if cuda else "fp32"
    elif args.precision == "tf32" and not cuda:
        parser.error("argument --precision: 'tf32' is not allowed on the CPU; fp32 or bf16")
    if args.run_name is None:
        method = stem.removesuffix("_cifar100")
        parts = [method, args.dataset, getattr(args, "teacher", None), args.student, f"seed{args.seed}"]
        args.run_name = "_".join(
            Path(part).stem if "/" in part or part.endswith(".npz") else part for part in parts if part
        )


def resolve_device(parser: Parser, device: str) -> str:
    """The device that --device means on this machine; one that it has not is refused by the parser."""
    import torch

    kind, _, index = device.partition(":")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    if kind != "cuda" or (":" in device and not index.isdecimal()):
        parser.error(f"argument --device: {device!r} is not allowed; auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        parser.error(f"argument --device: {device!r} is not allowed; torch sees no CUDA device here (auto or cpu)")
    if index and int(index) >= torch.cuda.device_count():
        parser.error(
            f"argument --device: {device!r} is not allowed; torch sees {torch.cuda.device_count()} CUDA device(s)"
        )
    return device
