"""The six scripts and the examples as a user runs them: flags, result, resume, evaluation, comparison, study."""

import json
import os
import subprocess
import sys

import pytest
from fault_server import HANGS, ROOT, TIMES
from reference import EXAMPLES

from experiment.study import plan

SCRIPTS = [f"{method}{igdm}_cifar100" for method in ("ard", "rslad", "adaad") for igdm in ("", "_IGDM")]
SCRIPTS += [f"examples.{example}_cifar100" for example in EXAMPLES]
WITHOUT_TEACHER = ("examples.pgd_at_cifar100", "examples.trades_cifar100")
# An epsilon at which AutoAttack is over after its first attack.
FLAGS = [
    *("--dataset", "digits", "--student", "RES-8", "--batch", "40", "--epochs", "2", "--steps", "2"),
    *("--train_examples", "200", "--epsilon", "0.4", "--step_size", "0.2", "--aa_examples", "8", "--device", "cpu"),
]
TERMS = {"pgd_at": {"robust"}, "trades": {"clean", "robust"}, "saad": {"saad", "igdm", "clean"}}


def flags_of(script):
    return [*FLAGS, *(() if script in WITHOUT_TEACHER else ("--teacher", "teacher"))]


def python(*words, cwd, **environment):
    """A process as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)


@pytest.fixture(scope="module")
def finished(small):
    """The run folder of a script, made on first use, with what the run printed."""

    def folder(script):
        path = small.home / "runs" / f"{script.removeprefix('examples.')}_flags"
        if not path.exists():
            done = small.server.run(script, [*flags_of(script), "--run_name", path.name], small.home).expect(0)
            (path / "printed.txt").write_text(done.out)
        return path

    return folder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_from_flags_to_result(finished, script):
    folder = finished(script)
    result, config, name = read(folder, "result"), read(folder, "config"), script.removeprefix("examples.")
    assert result["script"] == config["script"] == f"{name}.py"
    method, adds, _ = name.removesuffix("_cifar100").partition("_IGDM")
    assert result["adds"] == ("IGDM" if adds else None)
    assert result["autoattack"]["examples"] == 8
    assert result["autoattack"]["version"] == "standard"
    assert result["autoattack"]["accuracy"] <= result["autoattack"]["clean"]
    assert 0 <= result["pgd20"] <= result["clean"] <= 1
    assert result["autoattack"]["student_sha256"] == result["student_sha256"]
    terms = {key.removeprefix("loss_") for key in rows_of(folder)[-1] if key.startswith("loss_")}
    assert terms == TERMS.get(method, {method}) | ({"igdm"} if adds else set())
    assert all(row["loss"] > 0 for row in rows_of(folder))
    distils = script not in WITHOUT_TEACHER
    assert ("teacher" in config["settings"], bool(result["teacher"]), bool(result["gradients"])) == (distils,) * 3
    printed = (folder / "printed.txt").read_text()
    for text in ("PGD-20", "AutoAttack", "of 8 test images", "hardware", f"runs/{folder.name}/result.json"):
        assert text in printed
    assert ("GD, GC" in printed) == distils
    assert ("largest weight of the IGDM term is 0.2, not alpha 20" in printed) == bool(adds)
    assert (" of 60 test images" in printed) == distils


def test_a_baseline_without_teacher_has_no_flag_for_one(small):
    outcome = small.server.run("examples.trades_cifar100", [*FLAGS, "--teacher", "teacher"], small.home)
    outcome.expect(2, r"unrecognized arguments: --teacher.*\(see python -m examples.trades_cifar100 --help\)")


def test_the_command_that_starts_an_example_is_the_one_that_resumes_it(tmp_path):
    flags = [*FLAGS, "--epochs", "1", "--aa_examples", "0", "--run_dir", tmp_path, "--run_name", "pgd_at"]
    done = python("-m", "examples.pgd_at_cifar100", *flags, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    command = read(tmp_path / "pgd_at", "config")["command"]
    assert command == " ".join(["python", "-m", "examples.pgd_at_cifar100", *map(str, flags)])
    again = python(*command.split()[1:], cwd=ROOT)
    assert "finished run" in again.stdout, again.stderr
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


def test_an_example_that_is_started_as_a_file_names_the_command():
    done = python("examples/trades_cifar100.py", cwd=ROOT)
    line = "error: start an example from the project's folder: python -m examples.trades_cifar100\n"
    assert (done.returncode, done.stderr) == (1, line)


@pytest.mark.parametrize(
    ("baseline", "gain"),
    [
        ("adaad", "AdaAD+IGDM minus AdaAD (teacher, RES-8, digits)"),
        ("examples.pgd_at", "PGD-AT+IGDM minus PGD-AT (teacher, RES-8, digits)"),  # though the baseline has no teacher
    ],
)
def test_compare_prints_the_gain(baseline, gain, finished, small):
    folders = [finished(f"{baseline}{adds}_cifar100") for adds in ("", "_IGDM")]
    done = small.server.run(ROOT / "compare", [*folders, "--out", f"compared_{baseline}"], small.home).expect(0)
    assert "AutoAttack" in done.out
    folder = small.home / f"compared_{baseline}"
    written = (folder / "comparison.md").read_text()
    assert gain in written
    assert "cannot subtract" not in written
    assert list(folder.glob("*.png"))


def test_wandb_without_login_fails_before_training(small):
    clean = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(small.home), "NETRC": str(small.home / "none")}
    flags = [*flags_of("rslad_cifar100"), "--nowand", "0", "--run_name", "nobody"]
    done = python(ROOT / "rslad_cifar100.py", *flags, cwd=small.home, **clean)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --wandb 1: not logged in")
    assert not (small.home / "runs" / "nobody" / "config.json").exists()


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
    done = small.server.run(ROOT / "study", [path, "--only", "trades_IGDM_seed0"], small.home).expect(0)
    assert "1 of 1 runs finished, 0 failed" in done.out
