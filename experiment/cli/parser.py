"""A script's parser: the flags of its RECIPE and those of every script, parsed strictly, every default resolved."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiment import UserError
from experiment.cli.defaults import PAPER, default_run_name, defaults_of, fill
from experiment.cli.flags import FLAGS, GROUPS, Role, settings_with
from experiment.cli.values import flag_like
from experiment.entry import batch_of_script
from experiment.text import budget, started_as


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

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Parse all arguments; for an unknown flag the error suggests the nearest one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((text.partition("=")[0] for text in unknown if text.startswith("-")), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_suggestion(flag, self._option_string_actions)}")
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            message = f"{error.message}{_suggestion(value, action.choices)}"
            raise argparse.ArgumentError(action, message) from error

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def _suggestion(given: str, allowed: Iterable[str]) -> str:
    """The allowed word nearest to the given one, as the end of an error line; empty if none is near."""
    by_lower_case = {word.lower(): word for word in allowed}
    near = difflib.get_close_matches(given.lower(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[near[0]]}?" if near else ""


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
    needs = {"preset": PAPER in recipe, "teacher_path": distils}
    groups = {heading: parser.add_argument_group(heading) for heading in GROUPS}
    for heading, flags in GROUPS.items():
        for name, flag in flags.items():
            if Role.METHOD not in flag.roles and needs.get(name, True):
                groups[heading].add_argument(f"--{name}", **flag.options)
            elif name in defaults:
                # Without a teacher, as in train_teacher.py: --model is another name of --student.
                alias = ["--model"] if name == "student" and not distils else []
                options = flag.options | {"default": shown[name]}
                groups[heading].add_argument(*alias, f"--{name}", dest=name, **options)
    for name in (name for name in defaults if name not in FLAGS):
        options = {"type": flag_like(defaults[name]), "default": shown[name]}
        groups["method"].add_argument(f"--{name}", help="this script's own: see RECIPE and training_loss", **options)
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
        changed = fill(args, given, defaults)
    except UserError as error:
        parser.error(str(error))
    _check(parser, args, given, defaults.get("attack"))
    args.device = resolve_device(parser, args.device, elsewhere=elsewhere)
    precision = "tf32" if args.device.startswith("cuda") else "fp32"
    args.precision = args.precision or precision
    if args.precision == "tf32" and args.device == "cpu":
        parser.error("argument --precision: 'tf32' is not allowed on the CPU; expected fp32 or bf16")
    if args.run_name is None:
        usual = {name: FLAGS[name].options.get("default") for name in settings_with(Role.NAMED)}
        usual["precision"] = precision
        named = [name for name in changed if name not in ("teacher", "student")]
        named += [name for name, value in usual.items() if getattr(args, name) != value]
        args.run_name = default_run_name(script, args, named)
    batch_of_script.set(args.batch)
    return args


def _check(parser: Parser, args: argparse.Namespace, given: set[str], recipe_attack: str | None) -> None:
    """Replace --wandb by --nowand, which a run's settings have; exit with an error if flags contradict each other."""
    if "wandb" in given:
        if "nowand" in given and args.nowand == args.wandb:
            parser.error(f"argument --wandb: {args.wandb} contradicts --nowand {args.nowand}; give one of the two")
        args.nowand = 1 - args.wandb
    del args.wandb
    if "lr_milestones" in given and sorted(set(args.lr_milestones)) != args.lr_milestones:
        parser.error(f"argument --lr_milestones: {args.lr_milestones} is not allowed; expected epochs in rising order")
    if getattr(args, "teacher_every", 1) > 1 and args.attack != recipe_attack:
        allowed = f"is not allowed with --attack {args.attack} (expected --attack {recipe_attack})"
        parser.error(f"argument --teacher_every: {args.teacher_every} {allowed}")
    if args.aa_best and not args.holdout:
        parser.error("argument --aa_best: 1 is not allowed without --holdout, which selects the best epoch")
    if args.swa_after >= args.epochs:
        expected = f"expected less than --epochs {args.epochs}"
        parser.error(f"argument --swa_after: {args.swa_after} is not allowed; {expected}")
    if args.wandb_artifact and args.nowand:
        parser.error("argument --wandb_artifact: 1 is not allowed without --wandb 1")


def resolve_device(parser: Parser, device: str, *, elsewhere: bool = False) -> str:
    """The device that --device means on this machine; `elsewhere` leaves it open, as it is another machine's."""
    kind, _, index = device.partition(":")
    if device not in ("auto", "cpu") and (kind != "cuda" or (":" in device and not index.isdecimal())):
        parser.error(f"argument --device: {device!r} is not allowed; expected auto, cpu, cuda or cuda:N")
    if device == "cpu" or elsewhere:
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.cuda.is_available():
        parser.error(f"argument --device: {device!r} is not allowed; torch sees no CUDA device here (auto or cpu)")
    if index and int(index) >= torch.cuda.device_count():
        seen = f"torch sees {torch.cuda.device_count()} CUDA device(s)"
        parser.error(f"argument --device: {device!r} is not allowed; {seen}")
    return device
