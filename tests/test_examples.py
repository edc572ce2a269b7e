"""The examples as a user runs them: from the command line, stopped, resumed, measured, compared, studied."""

import json
import os
import subprocess
import sys

import pytest
from fault_server import ROOT, reproduces, result_of, stopped_run
from limits import HANGS
from reference import EXAMPLES

from experiment.study import plan

# An epsilon at which AutoAttack is over after its first attack.
FLAGS = [
    *("--dataset", "digits", "--student", "RES-8", "--batch", "128", "--epochs", "2", "--steps", "2"),
    *("--train_examples", "600"),
    *("--epsilon", "0.4", "--step_size", "0.2", "--aa_examples", "8", "--device", "cpu"),
]
TERMS = {"pgd_at": {"robust"}, "trades": {"clean", "robust"}, "saad": {"saad", "igdm", "clean"}}


def flags_of(method):
    brings_teacher = method not in ("pgd_at", "trades")
    return [*FLAGS, *(("--teacher", "teacher") if brings_teacher else ())]


def python(*words, cwd):
    """A process as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)


@pytest.fixture(scope="module")
def finished(small):
    """The run folder of an example, made on first use."""

    def folder(method):
        path = small.home / "runs" / f"{method}_whole"
        if not path.exists():
            flags = [*flags_of(method), "--run_name", path.name]
            small.server.run(f"examples.{method}_cifar100", flags, small.home).expect(0)
        return path

    return folder


@pytest.mark.parametrize("method", EXAMPLES)
def test_an_example_from_flags_to_result(method, finished):
    folder = finished(method)
    config, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "result"))
    assert config["script"] == f"{method}_cifar100.py"
    assert result["autoattack"]["examples"] == 8
    base, added, _ = method.partition("_IGDM")
    terms = {key.removeprefix("loss_") for key in result_of(folder)["rows"][-1] if key.startswith("loss_")}
    assert terms == TERMS[base] | ({"igdm"} if added else set())
    distils = "--teacher" in flags_of(method)
    assert ("teacher" in config["settings"], bool(result["teacher"]), bool(result["gradients"])) == (distils,) * 3


@pytest.mark.parametrize("method", ["trades", "saad"])
def test_an_example_stopped_and_resumed_is_the_same_run(method, finished, small):
    script, folder = f"examples.{method}_cifar100", finished(method)
    stopped_run(small.server, small.home, f"{method}_resumed", script, flags_of(method))
    reproduces(small.server, script, small.home, f"{method}_resumed", result_of(folder), flags_of(method))


def test_a_baseline_has_no_teacher_to_give(small):
    outcome = small.server.run("examples.trades_cifar100", [*FLAGS, "--teacher", "teacher"], small.home)
    outcome.expect(2, r"unrecognized arguments: --teacher.*\(see python -m examples.trades_cifar100 --help\)")


def test_the_command_that_starts_an_example_is_the_one_that_resumes_it(tmp_path):
    flags = [*FLAGS, "--epochs", "1", "--aa_examples", "0", "--run_dir", tmp_path, "--run_name", "pgd_at"]
    done = python("-m", "examples.pgd_at_cifar100", *flags, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    command = json.loads((tmp_path / "pgd_at/config.json").read_text())["command"]
    assert command == " ".join(["python", "-m", "examples.pgd_at_cifar100", *map(str, flags)])
    again = python(*command.split()[1:], cwd=ROOT)
    assert "finished run" in again.stdout, again.stderr
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


def test_an_example_that_is_started_as_a_file_names_the_command():
    done = python("examples/trades_cifar100.py", cwd=ROOT)
    line = "error: start an example from the project's folder: python -m examples.trades_cifar100\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_an_example_is_compared_with_its_baseline_and_measured(finished, small):
    """Though the baseline has no teacher: IGDM brings it."""
    folders = [finished(method) for method in ("pgd_at", "pgd_at_IGDM")]
    done = python(ROOT / "compare.py", *folders, "--out", "compared", cwd=small.home)
    assert done.returncode == 0, done.stderr
    printed = (small.home / "compared/comparison.md").read_text()
    assert "PGD-AT+IGDM minus PGD-AT (teacher, RES-8, digits)" in printed
    assert "cannot subtract" not in printed
    small.server.run("evaluate", [folders[0], "--attacks", "clean"], small.home).expect(0)
    (record,) = (folders[0] / "evaluations").glob("*.json")
    (found,) = json.loads(record.read_text())["accuracies"]["clean"]
    assert found["accuracy"] == json.loads((folders[0] / "result.json").read_text())["clean"]


STUDY = """
[grid]
seed = [0]
script = ["examples.trades_cifar100", "examples.trades_IGDM_cifar100"]

[settings]
dataset = "digits"
student = "RES-8"
teacher = "teacher"
epochs = 1
batch = 512
steps = 1
aa_examples = 0
device = "cpu"

[settings."examples.trades_IGDM_cifar100"]
alpha = 5
"""


def test_examples_are_studied(small):
    """From a folder that is not the project's."""
    path = small.home / "methods.toml"
    path.write_text(STUDY)
    study = plan.read_study(path, small.home / "runs")
    assert [run.name for run in study.runs] == ["trades_seed0", "trades_IGDM_seed0"]
    assert study.runs[1].command.startswith("python -m examples.trades_IGDM_cifar100 --dataset digits")
    assert (study.runs[1].settings["alpha"], "teacher" in study.runs[0].settings) == (5.0, False)
    done = python(ROOT / "study.py", path, "--only", "trades_IGDM_seed0", cwd=small.home)
    assert "1 of 1 runs finished, 0 failed" in done.stdout, done.stdout + done.stderr
