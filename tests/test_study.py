"""study.py: the runs that a file stands for, and real small ones started, stopped, resumed and failed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiment import UserError
from experiment.report import plan

ROOT = Path(__file__).parents[1]
TINY = """
[teacher]
dataset = "digits"
model = "RES-8"
epochs = 1
batch = 256
steps = 1
aa_examples = 0

[grid]
seed = [0, 1]
script = ["adaad_cifar100", "adaad_IGDM_cifar100"]

[settings]
dataset = "digits"
student = "RES-8"
epochs = 1
batch = 256
steps = 1
step_size = "1/255"
aa_examples = 0
ramp_epochs = 1

[settings.adaad_IGDM_cifar100]
alpha = 5
"""


@pytest.fixture
def study_of(tmp_path):
    """Read a study from its text."""

    def read(text: str) -> plan.Study:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return plan.read_study(path, tmp_path / "runs")

    return read


def test_a_grid_is_every_combination_with_the_flags_of_each_script(study_of):
    study = study_of(TINY)
    assert [run.name for run in study.runs] == [
        "adaad_seed0",
        "adaad_IGDM_seed0",
        "adaad_seed1",
        "adaad_IGDM_seed1",
    ], "the first key of [grid] varies slowest"
    baseline, twin = study.runs[2:]
    assert (twin.settings["alpha"], twin.settings["ramp_epochs"], twin.settings["seed"]) == (5.0, 1, 1)
    assert "alpha" not in baseline.settings, "a flag that a script does not have is left away"
    assert baseline.settings["step_size"] == 1 / 255
    assert twin.folder == study.folder / "adaad_IGDM_seed1"
    assert twin.settings["teacher"] == str(study.folder / "teacher"), "the study's own teacher is the default"
    assert study.teacher.settings["student"] == "RES-8"


def test_what_is_in_the_grid_is_in_the_name(study_of):
    grid = 'alpha = [5, 20]\nstudent = ["RES-8"]\nteacher = ["BDM", "my/old.pt"]'
    text = TINY.replace("seed = [0, 1]", grid).replace("[settings.adaad_IGDM_cifar100]\nalpha = 5", "")
    assert [run.name for run in study_of(text).runs] == [
        "adaad_RES-8_BDM",
        "adaad_IGDM_RES-8_BDM_alpha5",
        "adaad_RES-8_old",
        "adaad_IGDM_RES-8_old_alpha5",
        # A baseline has no alpha: it runs once, not twice.
        "adaad_IGDM_RES-8_BDM_alpha20",
        "adaad_IGDM_RES-8_old_alpha20",
    ]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[grid]", "[gird]", "'gird'"),
        ("[grid]", "[grid", "not valid TOML"),
        ("seed = [0, 1]", "seed = 0", "a list of one value or more"),
        ("ramp_epochs = 1", "ramp_epoch = 1", "ramp_epoch is not a flag"),
        ("ramp_epochs = 1", 'run_name = "x"', "run_name is not a flag"),
        ("[settings.adaad_IGDM_cifar100]", "[settings.ard_cifar100]", "of no script in [grid]"),
        ('"adaad_cifar100", ', '"nothing", ', "nothing.py does not exist"),
        ('"adaad_cifar100", ', '"attacks", ', "no RECIPE"),
        ("ramp_epochs = 1", "ramp_epochs = {a = 1}", "of no script in [grid]"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(study_of, old, new, named):
    assert old in TINY
    with pytest.raises(UserError) as caught:
        study_of(TINY.replace(old, new))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_a_script_refuses_is_refused(study_of, capsys):
    with pytest.raises(SystemExit) as caught:
        study_of(TINY.replace("epochs = 1\nbatch = 256\nsteps = 1\nstep", "epochs = 0\nbatch = 256\nsteps = 1\nstep"))
    assert caught.value.code == 2
    assert "--epochs: '0' is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_of_the_project_resolve(path, tmp_path):
    study = plan.read_study(path, tmp_path)
    assert {run.state() for run in study.all_runs} == {plan.TO_DO}
    assert len({run.folder for run in study.all_runs}) == len(study.all_runs)


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "study.py"), str(path), "--run_dir", str(path.parent / "runs"), *arguments]


def test_a_study_is_stopped_and_goes_on_and_a_failed_run_stops_no_other(tmp_path):
    """One sequence of real processes, as each takes seconds: stop in the first run, go on, skip, report a failure."""
    path, runs = tmp_path / "mine.toml", tmp_path / "runs" / "mine"
    path.write_text(TINY)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while not (runs / "teacher" / "config.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped by SIGINT; the same command goes on" in err
    assert not (runs / "adaad_seed0").exists(), "nothing is started after the signal"

    # A folder that holds something else makes one run fail.
    (runs / "adaad_seed0").mkdir(parents=True)
    (runs / "adaad_seed0" / "notes.txt").write_text("mine")
    done = subprocess.run(command(path, "--jobs", "2"), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "1 of 4 runs failed: adaad_seed0: error: " in done.stderr
    assert "it holds notes.txt" in done.stderr
    finished = sorted(folder.parent.name for folder in runs.glob("*/result.json"))
    assert finished == ["adaad_IGDM_seed0", "adaad_IGDM_seed1", "adaad_seed1", "teacher"]

    (runs / "adaad_seed0" / "notes.txt").unlink()
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    again = subprocess.run(command(path), capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0, again.stderr
    assert "4 of 5 runs finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is finished is skipped"
    assert (runs / "adaad_seed0" / "result.json").exists()

    path.write_text(TINY.replace("alpha = 5", "alpha = 7"))
    with pytest.raises(UserError, match=r"adaad_IGDM_seed0 holds a run with other settings \(alpha 5\.0 there, 7\.0"):
        plan.read_study(path, tmp_path / "runs")
