"""Flags: the frozen set of every script, its defaults, the papers' preset, and one line for each value not allowed."""

import importlib
import re
import runpy
import sys

import pytest
import torch
from evaluation_cases import OUT_OF_MEMORY
from fault_server import ROOT

from cifar100_models import ModelError
from experiment import RunStopped, UserError, cli, optim

BASELINES = ("ard", "rslad", "adaad")
METHODS = tuple(f"{method}{added}" for method in BASELINES for added in ("", "_IGDM"))
SCRIPTS = (*(f"{method}_cifar100" for method in METHODS), "train_teacher")
every_method = pytest.mark.parametrize("method", METHODS)


def parse(script, *argv):
    """The flags of a script, on the CPU unless given: defaults must not depend on this machine's devices."""
    script = script if script in SCRIPTS else f"{script}_cifar100"
    module = importlib.import_module(script)
    device = () if "--device" in argv else ("--device", "cpu")
    return cli.parse_args(module.__file__, module.RECIPE, [*device, *argv])


def error_of(capsys, script, *argv):
    """Return the one line on stderr for arguments that are an error."""
    with pytest.raises(SystemExit) as caught:
        parse(script, *argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


# The flags of a script


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag_by_groups_with_defaults_as_they_are_typed(script, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(script, "--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    printed = re.findall(r"^ +(?:-h, )?--(\w+)(?: [A-Z_\d]+, --(\w+))?", out, flags=re.MULTILINE)
    expected = {*vars(parse(script)), "help", "wandb"} | ({"model"} if script == "train_teacher" else set())
    assert {name for names in printed for name in names if name} == expected
    text = " ".join(out.split())
    assert all(f"(default: {value})" in text for value in ("8/255", "2/255", "0.1"))
    assert "default: None" not in text
    titles = ("method:", "optimisation:", "attack:", "data:", "evaluation:", "run:", "tracking:", "examples:")
    places = [text.index(f" {title} ") for title in titles if title != "method:" or script != "train_teacher"]
    assert places == sorted(places)


# Defaults

OPTIMISATION = {"student": "RES-18", "batch": 128, "lr": 0.1, "momentum": 0.9, "wd": 5e-4}
ATTACK = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10}
DATA = {"dataset": "cifar100", "data_dir": "data", "side": 0, "holdout": 0, "train_examples": 0}
EVALUATION = {"eval_after": 90, "aa_examples": 10_000, "aa_batch": 250, "aa_best": 0, "swa_after": 0}
RUN = {"seed": 0, "device": "cpu", "precision": "fp32", "compile": 0, "deterministic": 0, "run_dir": "runs"}
RUN |= {"stop_on_collapse": 1, "checkpoint_minutes": 10.0}
TRACKING = {"nowand": 1, "wandb_project": "robust-distillation", "wandb_entity": None, "wandb_name": None}
TRACKING |= {"wandb_tags": [], "wandb_artifact": 0, "tensorboard": 0}
COMMON = OPTIMISATION | ATTACK | DATA | EVALUATION | RUN | TRACKING
LONG = {"epochs": 200, "lr_milestones": [100, 150]}
TAUGHT = {"preset": "default", "teacher": "BDM", "teacher_path": None}
DEFAULTS = {
    "ard": {"attack": "pgd", "target": "adversarial", "ce_weight": 0.0},
    "rslad": {"attack": "rslad", "target": "adversarial", "clean_weight": 0.0, "loss_scale": 1.0},
    "adaad": {"attack": "adaad", "teacher_every": 1},
}
IGDM_DEFAULTS = {"alpha": 20.0, "beta": 1.0, "gamma": 1.0, "ramp_epochs": 200}


@every_method
def test_defaults_are_the_documented_recipe(method):
    expected = COMMON | LONG | TAUGHT | DEFAULTS[method.removesuffix("_IGDM")]
    expected["run_name"] = f"{method}_cifar100_BDM_RES-18_seed0"
    if method.endswith("_IGDM"):
        expected |= IGDM_DEFAULTS
    assert vars(parse(method)) == expected
    assert vars(parse(method, "--preset", "default")) == expected


def test_defaults_of_train_teacher():
    own = {"student": "WRN-28-10", "epochs": 100, "lr_milestones": [50, 75], "objective": "TRADES"}
    own |= {"trades_weight": 6.0, "run_name": "train_teacher_cifar100_WRN-28-10_seed0"}
    assert vars(parse("train_teacher")) == COMMON | own
    assert parse("train_teacher", "--model", "RES-20").student == "RES-20"


def test_device_and_precision_follow_the_machine(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = parse("adaad", "--device", "auto")
    assert (args.device, args.precision) == ("cpu", "fp32")
    assert parse("adaad", "--precision", "bf16").precision == "bf16"
    for device in ("cuda", "cuda:0"):
        assert f"{device!r} is not allowed; torch sees no CUDA device(s) here" in error_of(
            capsys, "adaad", "--device", device
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = parse("adaad", "--device", "auto")
    assert (args.device, args.precision) == ("cuda", "tf32")
    assert parse("adaad", "--device", "cuda:1", "--precision", "fp32").precision == "fp32"
    assert "'cuda:2' is not allowed; torch sees 2 CUDA device(s)" in error_of(capsys, "adaad", "--device", "cuda:2")


# The papers' preset

ALPHA = {
    "ard": {"RES-18": {"BDM": 100, "LTD": 50, "DEC": 100}, "MN-V2": {"BDM": 70, "LTD": 70, "DEC": 70}},
    "rslad": {"RES-18": {"BDM": 10, "LTD": 3, "DEC": 10}, "MN-V2": {"BDM": 4, "LTD": 3, "DEC": 10}},
    "adaad": {"RES-18": {"BDM": 70, "LTD": 15, "DEC": 50}, "MN-V2": {"BDM": 50, "LTD": 20, "DEC": 40}},
}
RSLAD = {"clean_weight": 1 / 6, "loss_scale": 0.1, "epochs": 300, "lr_milestones": [215, 260, 285]}
PAPER = {"ard": {"target": "clean", "ce_weight": 0.0}, "rslad": {"target": "clean", **RSLAD}, "adaad": {}}


@pytest.mark.parametrize("student", ["RES-18", "MN-V2"])
@pytest.mark.parametrize("teacher", ["BDM", "LTD", "DEC"])
@pytest.mark.parametrize("method", BASELINES)
def test_the_papers_preset(method, teacher, student):
    networks = ("--teacher", teacher, "--student", student)
    paper = vars(parse(method, *networks, "--preset", "paper"))
    default = vars(parse(method, *networks))
    name = f"{method}_cifar100_{teacher}_{student}_paper_seed0"
    assert paper == default | PAPER[method] | {"preset": "paper", "run_name": name}
    igdm = vars(parse(f"{method}_IGDM", *networks, "--preset", "paper"))
    own = {"alpha": ALPHA[method][student][teacher], "beta": 1.0, "gamma": 1.0, "ramp_epochs": paper["epochs"]}
    assert igdm == paper | own | {"run_name": name.replace(method, f"{method}_IGDM")}


@every_method
def test_the_command_line_beats_the_preset(method):
    """Also with a value that happens to be the default, and before or after --preset."""
    given = {"epochs": "150", "lr_milestones": "70"}
    if not method.startswith("adaad"):
        given |= {"target": "adversarial"}
    if method.startswith("rslad"):
        given |= {"clean_weight": "0", "loss_scale": "1"}
    if method.endswith("_IGDM"):
        given |= {"alpha": "20", "ramp_epochs": "200"}
    argv = [part for name, value in given.items() for part in (f"--{name}", value)]
    default, paper = vars(parse(method, *argv)), vars(parse(method, *argv, "--preset", "paper"))
    assert {name for name, value in paper.items() if value != default[name]} == {"preset", "run_name"}
    assert vars(parse(method, "--preset", "paper", *argv)) == paper


def test_the_papers_ramp_is_over_all_epochs_of_this_run():
    assert parse("rslad_IGDM", "--preset", "paper").ramp_epochs == 300
    assert parse("adaad_IGDM", "--preset", "paper", "--epochs", "30").ramp_epochs == 30
    assert parse("adaad_IGDM", "--epochs", "30").ramp_epochs == 200


@pytest.mark.parametrize(
    ("argv", "milestones"),
    [
        ("--epochs 200", [100, 150]),
        ("--epochs 1", [1, 1]),
        ("--epochs 3", [2, 3]),
        ("--epochs 99", [50, 75]),
        ("--lr_milestones 3 5 9", [3, 5, 9]),
        ("--lr_milestones", []),
        ("--preset paper", [215, 260, 285]),
        ("--preset paper --epochs 300", [215, 260, 285]),
        ("--epochs 100 --preset paper", [50, 75]),
        ("--preset paper --epochs 100 --lr_milestones 70 90", [70, 90]),
        ("--preset paper --lr_milestones", []),
    ],
)
def test_milestones_are_given_or_the_recipes_or_half_and_three_quarters_rounded_up(argv, milestones):
    assert parse("rslad_IGDM", *argv.split()).lr_milestones == milestones


@pytest.mark.parametrize(
    "networks", [("--teacher", "runs/teacher"), ("--student", "RES-8"), ("--teacher", "Wang2023Better_WRN-70-16")]
)
def test_an_alpha_that_no_paper_has_must_be_given(networks, capsys):
    line = error_of(capsys, "adaad_IGDM", *networks, "--preset", "paper")
    assert networks[1] in line
    assert "the paper has it for BDM, LTD, DEC and RES-18, MN-V2 only: give --alpha" in line
    assert "for cifar10; its table is of cifar100" in error_of(
        capsys, "adaad_IGDM", "--preset", "paper", "--dataset", "cifar10"
    )
    assert parse("adaad_IGDM", *networks, "--preset", "paper", "--alpha", "5").alpha == 5
    assert parse("adaad", *networks, "--preset", "paper").preset == "paper"
    assert (
        parse("adaad_IGDM", "--preset", "paper", "--teacher", cli.ALIASES["LTD"]).alpha
        == ALPHA["adaad"]["RES-18"]["LTD"]
    )


def test_a_number_of_ones_own_in_a_recipe_is_a_flag(capsys):
    """What README promises who adds a method."""
    script = importlib.import_module("adaad_cifar100")
    recipe = {**script.RECIPE, "outer": {"tv_weight": 0.5, "layers": 3, "norm": "l2"}}
    args = cli.parse_args(script.__file__, recipe, ["--tv_weight=-1/4", "--norm", "l1"])
    assert (args.tv_weight, args.layers, args.norm) == (-0.25, 3, "l1")
    with pytest.raises(SystemExit):
        cli.parse_args(script.__file__, recipe, ["--tv_weight", "much"])
    assert "'much' is not allowed; expected a number, or a fraction such as 8/255" in capsys.readouterr().err


def test_a_default_may_be_computed_from_other_flags():
    script = importlib.import_module("adaad_cifar100")
    recipe = {**script.RECIPE, "outer": {"warmup": lambda args: args.epochs // 10}}
    recipe["preset paper"] = {"epochs": 50}
    assert cli.parse_args(script.__file__, recipe, []).warmup == 20
    assert cli.parse_args(script.__file__, recipe, ["--preset", "paper"]).warmup == 5
    assert cli.parse_args(script.__file__, recipe, ["--warmup", "3"]).warmup == 3


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), ("0.03", 0.03), ("0", 0), ("1", 1), ("1/1", 1), ("3e-2", 0.03), ("0.15/4", 0.0375)],
)
def test_fractions(text, value):
    assert parse("adaad", "--epsilon", text).epsilon == value
    assert parse("adaad", "--step_size", text).step_size == value


@pytest.mark.parametrize(
    ("argv", "rates"),
    [
        ((), {1: 0.1, 100: 0.1, 101: 0.01, 150: 0.01, 151: 0.001, 200: 0.001}),
        (("--lr", "1/4", "--epochs", "4"), {1: 0.25, 2: 0.25, 3: 0.025, 4: 0.0025}),
        (("--preset", "paper"), {215: 0.1, 216: 0.01, 260: 0.01, 261: 1e-3, 285: 1e-3, 286: 1e-4, 300: 1e-4}),
        (("--lr_milestones",), {1: 0.1, 200: 0.1}),
    ],
)
def test_the_rate_falls_after_each_milestone(argv, rates):
    args = parse("rslad", *argv)
    optimizer = optim.sgd(torch.nn.Linear(2, 2), args)
    for epoch, rate in rates.items():
        optim.set_lr(optimizer, args, epoch)
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(rate, rel=1e-12)]


@pytest.mark.parametrize(
    ("argv", "nowand"),
    [
        ("", 1),
        ("--nowand", 1),
        ("--nowand 0", 0),
        ("--wandb", 0),
        ("--wandb 0", 1),
        ("--wandb 0 --nowand 1", 1),
    ],
)
def test_wandb_is_nowand_without_the_negative(argv, nowand):
    assert parse("adaad", *argv.split(), "--seed", "3").nowand == nowand
    assert parse("adaad", *argv.split()) == parse("adaad", "--nowand", str(nowand))


@pytest.mark.parametrize("argv", ["--epoch 3", "--epo=3", "--wandb_tag a", "--ramp-epochs 3"])
def test_no_abbreviations(argv, capsys):
    assert f"unrecognized arguments: {argv} (see" in error_of(capsys, "adaad_IGDM", *argv.split())


@pytest.mark.parametrize("script", ["evaluate", "compare", "study", "export"])
def test_help_of_the_other_commands_ends_with_two_examples(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    heading, *examples = capsys.readouterr().out.splitlines()[-3:]
    assert heading == "examples:"
    assert all(example.startswith(f"  python {script}.py ") for example in examples)


BDM = "cifar100_BDM_RES-18"


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ("", BDM),
        ("--dataset digits", "digits_BDM_RES-18"),
        ("--teacher runs/demo/teacher/", "cifar100_teacher_RES-18"),
        ("--teacher /a/b/best.pt", "cifar100_best_RES-18"),
        ("--teacher /a/b/student.pt", "cifar100_b_RES-18"),
        ("--teacher runs/eps0.1", "cifar100_eps0.1_RES-18"),
        ("--teacher nets.py:build", "cifar100_nets.build_RES-18"),
        ("--teacher student.pt", "cifar100_student_RES-18"),
        ("--dataset some/where/sample.npz", "sample_BDM_RES-18"),
        ("--alpha 50", f"{BDM}_alpha50"),
        ("--alpha 20 --epochs 200 --precision fp32 --side 0", BDM),
        ("--epochs 100", f"{BDM}_epochs100"),
        ("--epochs 100 --lr_milestones 70 90 --wd 2e-4", f"{BDM}_epochs100_wd0.0002_lr_milestones70-90"),
        ("--lr_milestones", f"{BDM}_lr_milestones-none"),
        ("--epsilon 4/255 --lr 0.05", f"{BDM}_lr0.05_epsilon4-255"),
        ("--target clean --attack adaad", f"{BDM}_attack-adaad_target-clean"),
        ("--preset paper", f"{BDM}_paper"),
        ("--preset paper --alpha 100 --ramp_epochs 200", f"{BDM}_paper"),
        ("--preset paper --alpha 20", f"{BDM}_paper_alpha20"),
        ("--preset paper --epochs 30", f"{BDM}_paper_epochs30"),
        ("--preset paper --alpha 20 --student RES-8 --holdout 5", "cifar100_BDM_RES-8_paper_alpha20_holdout5"),
        ("--swa_after 3 --precision bf16", f"{BDM}_swa_after3_precision-bf16"),
        ("--nowand 0 --eval_after 3 --aa_examples 5 --data_dir x --teacher_path y", BDM),
    ],
)
def test_the_run_name_contains_what_is_not_the_default(argv, name):
    assert parse("ard_IGDM", "--seed", "3", *argv.split()).run_name == f"ard_IGDM_{name}_seed3"


def test_a_run_name_that_would_be_too_long():
    milestones = [str(n) for n in range(1, 90)]
    name = parse("ard", "--epochs", "100", "--lr_milestones", *milestones).run_name
    other = parse("ard", "--epochs", "100", "--lr_milestones", *milestones, "90").run_name
    assert len(name) < 200
    assert name != other


WHOLE = ("0", "-1", "1.5", "1e3", "ten", "", "2147483648", "99999999999", "1_000")
NOT_NEGATIVE = tuple(text for text in WHOLE if text != "0")
FRACTION = ("1/inf", "inf/inf", "8/0", "-1/255", "1.5", "256/255", "nan", "a", "", "8/255/2", "8:255", "/255", "1/")
RATE = ("0", "-0.1", "nan", "inf", "1e999", "fast", "")
WEIGHT = ("-1", "nan", "inf", "-inf", "much")
MODELS = "choose from RES-18, RES-20, RES-8, MN-V2 or WRN-d-w"
FROM_ONE = "epochs batch steps aa_batch ramp_epochs lr_milestones teacher_every"
FROM_ZERO = "seed aa_examples side holdout train_examples swa_after eval_after"
BAD = [
    ("adaad_IGDM", FROM_ONE, WHOLE, "a whole number from 1"),
    ("adaad", FROM_ZERO, NOT_NEGATIVE, "a whole number from 0"),
    ("adaad", "epsilon step_size", FRACTION, "a number from 0 up to 1, or a fraction such as 8/255"),
    ("rslad", "lr checkpoint_minutes loss_scale", RATE, "a number above 0"),
    ("ard_IGDM", "wd ce_weight alpha beta gamma", WEIGHT, "a number from 0"),
    ("train_teacher", "trades_weight", WEIGHT, "a number from 0"),
    ("rslad", "momentum clean_weight", ("7/6", "1.1", "-0.1", "nan"), "a number from 0 up to 1"),
    ("adaad", "nowand compile deterministic aa_best tensorboard", ("2", "-1", "yes", ""), r"0(,| or) 1"),
    ("adaad", "attack", ("PGD", "fgsm", ""), "'?pgd'?, '?rslad'?, '?adaad'?, '?igdm'?"),
    ("rslad", "target", ("x", "Clean"), "'?adversarial'?, '?clean'?"),
    ("adaad", "preset", ("papers", ""), "'?default'?, '?paper'?"),
    ("adaad", "precision", ("fp16", "FP32"), "'?fp32'?, '?tf32'?, '?bf16'?"),
    ("adaad", "precision", ("tf32",), "'tf32' is not allowed on the CPU; expected fp32 or bf16"),
    ("train_teacher", "objective", ("trades", "FGSM"), "'?TRADES'?, '?PGD-AT'?"),
    ("train_teacher", "student model", ("RES-19", "WRN-27-10", "res-18", ""), MODELS),
    ("adaad", "device", ("gpu", "cuda0", "cuda:x", "cuda:", "cpu:0", "mps", ""), "auto, cpu, cuda or cuda:N"),
    ("adaad", "run_name", ("a/b", "..", ".", "", "a\\b", "a\nb", "-x"), "a plain folder name without slashes"),
]


@pytest.mark.parametrize(("script", "flags", "values", "allowed"), BAD)
def test_a_bad_value_is_one_line_that_names_it_and_what_is_allowed(script, flags, values, allowed, capsys):
    for flag in flags.split():
        for value in values:
            line = error_of(capsys, script, f"--{flag}={value}")
            assert f"--{flag}" in line
            assert repr(value) in line or f" {value} " in line, value
            assert re.search(allowed, line), line


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--aa_best 1", "argument --aa_best: 1 is not allowed without --holdout"),
        ("--swa_after 5 --epochs 5", "argument --swa_after: 5 is not allowed; expected less than --epochs 5"),
        ("--wandb_artifact 1", "argument --wandb_artifact: 1 is not allowed without --wandb 1"),
        ("--lr_milestones 5 3", "[5, 3] is not allowed; expected epochs in rising order"),
        ("--lr_milestones 5 5", "[5, 5] is not allowed; expected epochs in rising order"),
        ("--teacher_every 5 --attack rslad", "--teacher_every: 5 is not allowed with --attack rslad"),
        ("--wandb 1 --nowand 1", "--wandb: 1 contradicts --nowand 1"),
        ("--nowand 0 --wandb 0", "--wandb: 0 contradicts --nowand 0"),
        ("--epochs", "--epochs: expected one argument"),
        ("cifar100", "unrecognized arguments: cifar100 (see adaad_cifar100.py --help)"),
    ],
)
def test_arguments_that_need_or_contradict_others(argv, reason, capsys):
    assert reason in error_of(capsys, "adaad", *argv.split())


# The frame of every script


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such\n  file"), 2, "error: no such file\n"),
        (ModelError("model 'a.py:b' cannot be built"), 2, "error: model 'a.py:b' cannot be built\n"),
        (RunStopped("stopped after epoch 3", RunStopped.INTERRUPTED), 75, "stopped after epoch 3\n"),
        (RunStopped("loss is nan", RunStopped.DIVERGED), 3, "loss is nan\n"),
    ],
)
def test_guard_turns_a_mistake_into_one_line(error, status, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.guard(main)
    assert caught.value.code == status
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(("kind", "text"), OUT_OF_MEMORY)
def test_out_of_memory_in_every_shape_is_one_line(kind, text, capsys):
    def main():
        raise kind(text)

    with pytest.raises(SystemExit) as caught:
        cli.guard(main)
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "out of GPU memory" in line


@pytest.mark.parametrize(
    "bug", [KeyError("memory"), RuntimeError("CUDA error: an illegal memory access"), RuntimeError("a memory of old")]
)
def test_guard_hides_no_bug(bug):
    def main():
        raise bug

    with pytest.raises(type(bug), match="memory"):
        cli.guard(main)
    cli.guard(lambda: None)
