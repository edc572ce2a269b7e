"""The six scripts as a user runs them: from the command line, on digits, down to result.json."""

import json
import os
import subprocess
import sys

import pytest
from fault_server import ROOT, TEACHER, TIMES
from limits import HANGS

SCRIPTS = [f"{method}{igdm}_cifar100" for method in ("ard", "rslad", "adaad") for igdm in ("", "_IGDM")]
# An epsilon at which AutoAttack is over after its first attack.
FLAGS = [
    *("--dataset", "digits", "--student", "RES-8", "--teacher", "teacher", "--batch", "256", "--epochs", "2"),
    *("--steps", "2", "--epsilon", "0.4", "--step_size", "0.2", "--aa_examples", "8", "--device", "cpu"),
]


def run(home, script, *flags, **environment):
    """Run a script as a user would."""
    return subprocess.run(
        [sys.executable, ROOT / f"{script}.py", *map(str, flags)],
        cwd=home,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a teacher made by train_teacher.py."""
    folder = tmp_path_factory.mktemp("user")
    done = run(folder, "train_teacher", *TEACHER)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def finished(home):
    """The run folder of a script, made on first use."""

    def folder(script):
        if not (home / "runs" / script).exists():
            done = run(home, script, *FLAGS, "--run_name", script)
            assert done.returncode == 0, done.stderr
            (home / f"{script}.txt").write_text(done.stdout)
        return home / "runs" / script

    return folder


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_from_flags_to_result(finished, home, script):
    folder = finished(script)
    result, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("result", "config"))
    assert result["script"] == config["script"] == f"{script}.py"
    assert result["adds"] == ("IGDM" if "IGDM" in script else None)
    assert result["autoattack"]["examples"] == 8
    assert result["autoattack"]["version"] == "standard"
    assert result["autoattack"]["accuracy"] <= result["autoattack"]["clean"]
    assert 0 <= result["pgd20"] <= result["clean"] <= 1
    assert result["autoattack"]["student_sha256"] == result["student_sha256"]
    terms = {key for key in rows_of(folder)[-1] if key.startswith("loss_")}
    assert ("loss_igdm" in terms) == ("IGDM" in script)
    assert all(row["loss"] > 0 for row in rows_of(folder))
    printed = (home / f"{script}.txt").read_text()
    for text in ("PGD-20", "AutoAttack", "GD, GC", "of 8 test images", "hardware", f"runs/{script}/result.json"):
        assert text in printed
    short_ramp = (
        "largest weight of the IGDM term is 0.2, not alpha 20: the run has 2 of 200 ramp epochs. Use --ramp_epochs"
    )
    assert (short_ramp in printed) == ("IGDM" in script)


def test_compare_prints_the_gain(finished, home):
    folders = [finished(script) for script in ("adaad_cifar100", "adaad_IGDM_cifar100")]
    done = run(home, "compare", *folders)
    assert done.returncode == 0, done.stderr
    assert "AdaAD+IGDM" in done.stdout
    assert "AutoAttack" in done.stdout
    assert list(home.rglob("*.png"))


def test_evaluate_agrees_with_the_run(finished, home):
    folder = finished("adaad_cifar100")
    done = run(home, "evaluate", folder, "--attacks", "clean", "pgd")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    again = json.loads(next((folder / "evaluations").glob("*_clean-pgd.json")).read_text())
    for name, kind in (("clean", "clean"), ("pgd20", "pgd")):
        (found,) = again["accuracies"][kind]
        assert found["accuracy"] == result[name]
    assert again["student_sha256"] == result["student_sha256"]


def test_wandb_offline_changes_nothing(finished, home):
    plain = finished("rslad_cifar100")
    flags = [*FLAGS, "--nowand", "0", "--run_name", "mirrored"]
    done = run(home, "rslad_cifar100", *flags, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert rows_of(home / "runs" / "mirrored") == rows_of(plain)
    identity = json.loads((home / "runs" / "mirrored" / "config.json").read_text())["id"]
    assert len(list(home.glob(f"wandb/offline-run-*-{identity}/*.wandb"))) == 1


def test_wandb_without_login_fails_before_training(home):
    clean = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(home), "NETRC": str(home / "none")}
    done = run(home, "rslad_cifar100", *FLAGS, "--nowand", "0", "--run_name", "nobody", **clean)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --wandb 1: not logged in")
    assert not (home / "runs" / "nobody" / "config.json").exists()
