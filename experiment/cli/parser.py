"""A script's parser: the flags of its RECIPE and those of every script, parsed strictly, every default resolved."""

import argparse
import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiment import UserError
from experiment.cli.flags import ALIASES, FLAGS, GROUPS, Role, own_flag, settings_with
from experiment.text import budget, short_name, started_as

PAPER = "preset paper"
"""The group of a RECIPE with what ``--preset paper`` changes."""

LONGEST = 160
"""Characters of a default run name before the seed; file systems allow 255 bytes."""

Defaults = dict[str, Any]
"""By flag: its value, or a function that computes it from the namespace of all flags."""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults as they are typed, such as 8/255; none where the help text describes it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default == []:
            return action.help
        if isinstance(action.default, float) and not action.default.is_integer():
            return f"{action.help} (default: {budget(action.default)})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Strict parsing: no abbreviations; an error is one line on stderr and exit status 2."""

    def __init__(self, prog: str, *, examples: Sequence[str] = (), **kwargs: Any) -> None:
        """Take argparse's arguments, and the arguments of example commands for the end of --help."""
        command = f"python {prog.removeprefix('python ')}"
        epilog = "\n".join(["examples:", *(f"  {command} {arguments}" for arguments in examples)])
        super().__init__(prog, epilog=epilog if examples else None, allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def defaults_of(recipe: dict[str, Any], preset: str) -> Defaults:
    """The defaults of a RECIPE's flags under a preset."""
    groups = [group for name, group in recipe.items() if isinstance(group, dict) and name != PAPER]
    defaults = {flag: value for group in groups for flag, value in group.items()}
    if preset == "paper":
        defaults |= recipe[PAPER]
    if "lr_milestones" in defaults:
        defaults["lr_milestones"] = functools.partial(_milestones, defaults["lr_milestones"], defaults["epochs"])
    return defaults


def _milestones(milestones: list[int] | None, epochs: int, args: argparse.Namespace) -> list[int]:
    """The recipe's milestones for the recipe's number of epochs; for any other, 1/2 and 3/4 of the epochs."""
    if milestones is not None and args.epochs == epochs:
        return list(milestones)
    # Rounded up: the first epoch at a lower rate starts after the fraction has passed.
    return [math.ceil(args.epochs / 2), math.ceil(args.epochs * 3 / 4)]


def fill(args: argparse.Namespace, given: set[str], defaults: Defaults) -> dict[str, Any]:
    """Set every flag that was not given to its default; return the value of each default.

    Raises:
        UserError: the preset has no default for these networks.
    """
    values = dict.fromkeys(defaults)
    for flag, default in sorted(defaults.items(), key=lambda item: callable(item[1])):  # computed ones come last
        try:
            values[flag] = default(args) if callable(default) else default
        except UserError as error:
            if flag not in given:
                raise UserError(f"--preset paper has no {flag} {error}: give --{flag}") from error
        if flag not in given:
            setattr(args, flag, values[flag])
    return values


def by_teacher_and_student(students: tuple[str, ...], **teachers: tuple[float, ...]) -> Callable[..., float]:
    """A preset's default that depends on the networks.

    Args:
        teachers: by the teacher's short name, one value per student.

    Returns:
        A function that looks the value up for a namespace of flags.
    """

    def look_up(args: argparse.Namespace) -> float:
        if args.dataset != "cifar100":
            raise UserError(f"for {args.dataset}; its table is of cifar100")
        teacher = {name: alias for alias, name in ALIASES.items()}.get(args.teacher, args.teacher)
        if teacher not in teachers or args.student not in students:
            raise UserError(
                f"for teacher {args.teacher} and student {args.student}; the paper has it for "
                f"{', '.join(teachers)} and {', '.join(students)} only"
            )
        return teachers[teacher][students.index(args.student)]

    return look_up


def default_run_name(script: str, args: argparse.Namespace, changed: Iterable[str]) -> str:
    """Script, data set, teacher, student, the values of changed flags, and the seed."""
    networks = [flag for flag in ("dataset", "teacher", "student") if flag in args]
    parts = [Path(script).stem.removesuffix("_cifar100"), *(short_name(getattr(args, flag)) for flag in networks)]
    parts += ["paper"] if getattr(args, "preset", "default") == "paper" else []
    parts += [f"{flag}{_compact(getattr(args, flag))}" for flag in changed if flag not in networks]
    name = "_".join(part for part in parts if part)
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}_seed{args.seed}"


def _compact(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(str, value)) or "-none"
    if isinstance(value, float):
        return min(f"{value:g}", budget(value).replace("/", "-"), key=len)
    return f"-{value}" if isinstance(value, str) else str(value)


def build_parser(script: str, recipe: dict[str, Any]) -> Parser:
    """The parser of one script. Defaults that depend on other flags are not in it."""
    *module, name = started_as(script)
    program = f"python -m {name}" if module else Path(name).name
    defaults = defaults_of(recipe, "default")
    shown = {name: None if callable(value) else value for name, value in defaults.items()}  # None if computed
    distils = "teacher" in defaults
    title = f"{recipe['method']}{'+' + recipe['adds'] if 'adds' in recipe else ''} on CIFAR-100 and other data sets"
    networks = "--teacher BDM --student RES-18" if distils else "--student RES-18"
    examples = (networks, f"{networks} --epochs 100 --seed 1 --wandb 1")
    parser = Parser(program, examples=examples, usage="%(prog)s [--FLAG VALUE ...]", description=title)
    absent = {"preset": PAPER not in recipe, "teacher_path": not distils}
    own = {name: own_flag(value) for name, value in defaults.items() if name not in FLAGS}
    for heading, flags in GROUPS.items():
        group = parser.add_argument_group(heading)
        for name, flag in (flags | own if heading == "method" else flags).items():
            if absent.get(name, Role.METHOD in flag.roles and name not in defaults):
                continue
            # Without a teacher, as in train_teacher.py: --model is another name of --student.
            alias = ["--model"] if name == "student" and not distils else []
            options = flag.options | ({"default": shown[name]} if name in shown else {})
            group.add_argument(*alias, f"--{name}", dest=name, **options)
    return parser


def parse_args(
    script: str, recipe: dict[str, Any], argv: Sequence[str] | None = None, *, elsewhere: bool = False
) -> argparse.Namespace:
    """Parse a script's flags and resolve every default. A given flag has precedence over the preset.

    Args:
        script: the script's ``__file__``; names the program and, without --run_name, the run.
        recipe: the script's RECIPE: ``method``, optionally ``adds`` (what it adds to that method), and groups
            {flag: default}; the group ``preset paper`` has the defaults of --preset paper. A default may be a function
            of the namespace of all flags.
        argv: arguments; those of the process if None.
        elsewhere: the run may start on another machine, so any device is allowed.

    Raises:
        SystemExit: status 2 after one line on stderr, for any argument that is not allowed.
    """
    parser = build_parser(script, recipe)
    args = parser.parse_args(argv)
    # argparse does not overwrite an existing attribute with a default: what is still unset was not given.
    unset = object()
    marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {name for name, value in vars(marked).items() if value is not unset}
    defaults = defaults_of(recipe, getattr(args, "preset", "default"))
    try:
        usual = fill(args, given, defaults)
    except UserError as error:
        parser.error(str(error))
    args.device = resolve_device(parser, args.device, elsewhere=elsewhere)
    precision = "tf32" if args.device.startswith("cuda") else "fp32"
    args.precision = args.precision or precision
    _check(parser, args, given, defaults.get("attack"))
    if args.run_name is None:
        usual |= {name: FLAGS[name].options.get("default") for name in settings_with(Role.NAMED)}
        usual["precision"] = precision
        args.run_name = default_run_name(script, args, [name for name in usual if getattr(args, name) != usual[name]])
    return args


def _check(parser: Parser, args: argparse.Namespace, given: set[str], recipe_attack: str | None) -> None:
    """Replace --wandb by --nowand, which a run's settings have; exit with an error if flags contradict each other."""

    def not_allowed(flag: str, reason: str) -> None:
        parser.error(f"argument --{flag}: {getattr(args, flag)!r} is not allowed{reason}")

    if "wandb" in given:
        if "nowand" in given and args.nowand == args.wandb:
            parser.error(f"argument --wandb: {args.wandb} contradicts --nowand {args.nowand}; give one of the two")
        args.nowand = 1 - args.wandb
    del args.wandb
    if "lr_milestones" in given and sorted(set(args.lr_milestones)) != args.lr_milestones:
        not_allowed("lr_milestones", "; expected epochs in rising order")
    if getattr(args, "teacher_every", 1) > 1 and args.attack != recipe_attack:
        not_allowed("teacher_every", f" with --attack {args.attack} (expected --attack {recipe_attack})")
    if args.aa_best and not args.holdout:
        not_allowed("aa_best", " without --holdout, which selects the best epoch")
    if args.swa_after >= args.epochs:
        not_allowed("swa_after", f"; expected less than --epochs {args.epochs}")
    if args.wandb_artifact and args.nowand:
        not_allowed("wandb_artifact", " without --wandb 1")
    if args.precision == "tf32" and args.device == "cpu":
        not_allowed("precision", " on the CPU; expected fp32 or bf16")


def resolve_device(parser: Parser, device: str, *, elsewhere: bool = False) -> str:
    """The device that --device means on this machine; `elsewhere` leaves it open, as it is another machine's."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        parser.error(f"argument --device: {device!r} is not allowed; expected auto, cpu, cuda or cuda:N")
    if device == "cpu" or elsewhere:
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    if int(device.partition(":")[2] or 0) >= count:
        parser.error(f"argument --device: {device!r} is not allowed; torch sees {count or 'no'} CUDA device(s) here")
    return device
