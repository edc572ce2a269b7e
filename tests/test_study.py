"""study.py: the runs of a file, and real small ones started, stopped, resumed and failed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fault_server import HANGS, ROOT

from experiment import RunStopped, UserError, text
from experiment.study import main as study_main
from experiment.study import plan, processes
from experiment.study.command import forward_macs, hours_of

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
train_examples = 300
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


def test_another_machines_device_is_planned_and_not_run_here(tmp_path, capsys, monkeypatch):
    """From a login node, or at home: to plan it, cost it and send it needs no GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = tmp_path / "mine.toml"
    path.write_text(TINY.replace("[settings]", '[settings]\ndevice = "cuda"\nprecision = "tf32"'))
    start = [str(path), "--run_dir", str(tmp_path)]
    study_main([*start, "--dry_run", "1"])
    assert "--device cuda --precision tf32" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        study_main(start)
    assert caught.value.code == 2
    assert "'cuda' is not allowed; torch sees no CUDA device(s) here" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_a_grid_is_every_combination_with_the_flags_of_each_script(study_of):
    study = study_of(TINY)
    assert [run.name for run in study.runs] == [
        "adaad_seed0",
        "adaad_IGDM_seed0",
        "adaad_seed1",
        "adaad_IGDM_seed1",
    ], "the first key of [grid] varies slowest"
    baseline, with_igdm = study.runs[2:]
    assert (with_igdm.settings["alpha"], with_igdm.settings["ramp_epochs"], with_igdm.settings["seed"]) == (5.0, 1, 1)
    assert "alpha" not in baseline.settings, "a flag that a script does not have is left away"
    assert baseline.settings["step_size"] == 1 / 255
    assert with_igdm.folder == study.folder / "adaad_IGDM_seed1"
    assert with_igdm.settings["teacher"] == str(study.folder / "teacher"), "the study's own teacher is the default"
    assert study.teacher.settings["student"] == "RES-8"
    tracked = study_of(TINY.replace("ramp_epochs = 1", "ramp_epochs = 1\nwandb = true"))
    assert [run.settings["nowand"] for run in tracked.runs] == [0] * 4


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
        ("seed = [0, 1]", "seed = 0", "expected a list of at least one value"),
        ("ramp_epochs = 1", "ramp_epoch = 1", "ramp_epoch is not a flag"),
        ("ramp_epochs = 1", 'run_name = "x"', "run_name is set by the study itself"),
        ("[settings.adaad_IGDM_cifar100]", "[settings.ard_cifar100]", "is not a script in [grid]"),
        ('"adaad_cifar100", ', '"nothing", ', "nothing.py does not exist"),
        ('"adaad_cifar100", ', '"attacks", ', "no RECIPE"),
        ("ramp_epochs = 1", "ramp_epochs = {a = 1}", "is not a script in [grid]"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(study_of, old, new, named):
    assert old in TINY
    with pytest.raises(UserError) as caught:
        study_of(TINY.replace(old, new))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_a_script_does_not_allow_is_an_error(study_of, capsys):
    with pytest.raises(SystemExit) as caught:
        study_of(TINY.replace("epochs = 1\nbatch = 256\nsteps = 1\nstep", "epochs = 0\nbatch = 256\nsteps = 1\nstep"))
    assert caught.value.code == 2
    assert "--epochs: '0' is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_of_the_project_resolve(path, tmp_path):
    study = plan.read_study(path, tmp_path)
    assert {run.state() for run in study.all_runs} == {plan.TO_DO}
    assert len({run.folder for run in study.all_runs}) == len(study.all_runs)


def test_a_dry_run_prints_commands_and_costs(capsys, tmp_path):
    study_main([str(ROOT / "studies" / "paper.toml"), "--dry_run", "1", "--run_dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("python ard_IGDM_cifar100.py --preset paper") == 6
    rows = {line.split()[0]: line.split() for line in out.splitlines() if " to do " in line}
    assert len(rows) == 36
    # 130.4 GMAC per image (docs/performance.md) x 50,000 x 200 x 2, PGD-20 and clean accuracy of 10,000 images
    # after 110 epochs (42 x 0.556 GMAC x 2), and AutoAttack; at 150 TFLOP/s.
    flops = 2.607e18 + 110 * 10_000 * 42 * 0.556e9 * 2 + 3.4e16
    assert float(rows["adaad_IGDM_RES-18_BDM_seed0"][3]) == pytest.approx(flops / 150e12 / 3600, abs=0.01)
    assert list(tmp_path.iterdir()) == []


def test_the_costs_follow_the_settings(study_of):
    settings = "alpha = 1\nepochs = 10\nramp_epochs = 10\naa_examples = 0\n"
    text = f'[grid]\nscript = ["adaad_IGDM_cifar100"]\n[settings]\nteacher = "BDM"\nstudent = "RES-18"\n{settings}'

    def hours(more):
        return hours_of(study_of(text + more).runs[0])

    student, teacher = (forward_macs(name) for name in ("RES-18", "BDM"))
    evaluation = 42 * student * 10_000 * 2 / 150e12 / 3600  # once: --eval_after is 90
    training = hours("") - evaluation
    assert hours("train_examples = 25000\nholdout = 12500") - evaluation == pytest.approx(training / 4)
    assert hours("eval_after = 5") == pytest.approx(training + 5 * evaluation)
    assert hours('precision = "bf16"') - evaluation == pytest.approx(training * 150 / 340)
    passes = [(13 + n + 4) * student + (12 + n) * teacher for n in (10, 30)]  # half of n backward
    assert (hours("steps = 20") - evaluation) / training == pytest.approx(passes[1] / passes[0])
    thinned = (13 + 10 + 4) * student + (2 + 2 + 2) * teacher  # the teacher at two of ten steps, and twice for the loss
    assert (hours("teacher_every = 5") - evaluation) / training == pytest.approx(thinned / passes[0])
    assert hours('attack = "rslad"') is None, "only the method's own attack is counted"


def test_an_unknown_cost_is_not_zero_hours(capsys, tmp_path):
    study_main([str(ROOT / "studies" / "digits.toml"), "--dry_run", "1", "--run_dir", str(tmp_path)])
    assert capsys.readouterr().out.endswith("61 unfinished runs; the hours of 61 are not known\n")


@pytest.mark.parametrize(("epsilon", "written"), [(8 / 255, "8/255"), (40 / 255, "40/255"), (0.15, "0.15"), (0, "0")])
def test_one_way_to_write_a_budget(epsilon, written):
    assert text.budget(epsilon) == written


def test_only_takes_some_runs_and_says_when_it_takes_none(capsys, tmp_path):
    study_main([str(ROOT / "studies" / "paper.toml"), "--dry_run", "1", "--only", "ard_MN*", "rslad_MN-V2_BDM_seed0"])
    assert capsys.readouterr().out.count(" to do ") == 4
    with pytest.raises(UserError, match="--only nothing matches no run of paper"):
        study_main([str(ROOT / "studies" / "paper.toml"), "--only", "nothing"])


class Cluster:
    """In the place of submitit's executor: the parameters and the jobs that it was given."""

    def __init__(self, folder, cluster):
        self.parameters, self.sent = [], []

    def update_parameters(self, **parameters):
        self.parameters.append(parameters)

    def submit(self, job):
        self.sent.append(job.command)
        return SimpleNamespace(job_id=f"job{len(self.sent)}")

    def submit_array(self, jobs):
        return [self.submit(job) for job in jobs]


def test_a_cluster_gets_the_runs_as_an_array_after_the_teacher(study_of, monkeypatch, capsys):
    monkeypatch.setattr("submitit.AutoExecutor", lambda **arguments: made.append(Cluster(**arguments)) or made[-1])
    study, made = study_of(TINY.replace("seed = [0, 1]", "seed = [0]")), []
    jobs = processes.submit(study, 2, {"timeout_min": 10})
    (cluster,) = made
    assert [job.job_id for job in jobs] == ["job1", "job2", "job3"]
    assert [command[1:] for command in cluster.sent] == [
        [str(ROOT / f"{script}.py"), *run.arguments]
        for script, run in zip(
            ("train_teacher", "adaad_cifar100", "adaad_IGDM_cifar100"), [study.teacher, *study.runs], strict=True
        )
    ]
    first, then = cluster.parameters
    assert first == processes.DEFAULTS | {"slurm_array_parallelism": 2, "timeout_min": 10}
    assert then == {"slurm_additional_parameters": {"dependency": "afterok:job1"}}
    assert "adaad_IGDM_seed0: job job3" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--slurm_options", "slurm_partition=gpu"], ["--slurm", "1", "--devices", "cuda:0"]])
def test_options_of_a_cluster_and_of_this_machine_exclude_each_other(flags, tmp_path):
    """Otherwise runs that are meant for a cluster start on its login node."""
    path = tmp_path / "mine.toml"
    path.write_text(TINY)
    with pytest.raises(SystemExit):
        study_main([str(path), "--run_dir", str(tmp_path), *flags])
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("mistake", [{"partitoin": "gpu"}, {"timeout_min": "1h"}])
def test_a_wrong_option_of_the_cluster_is_named(study_of, mistake):
    with pytest.raises(UserError, match=f"submitit: .*{next(iter(mistake))}"):
        processes.submit(study_of(TINY), 1, mistake, "local")


def test_a_preempted_job_lets_its_run_save_itself_and_is_queued_again(tmp_path, monkeypatch):
    """As submitit does it: its handler interrupts the wait for the run."""
    mark, queued, killed = tmp_path / "saved", [], []
    code = f"""
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(mark)!r}).touch(), sys.exit(75)))
os.kill(os.getppid(), signal.SIGUSR2)
time.sleep(60)
"""
    job = processes.Job([sys.executable, "-c", code])
    before = signal.signal(signal.SIGUSR2, lambda *_: queued.append(job.checkpoint()))
    monkeypatch.setattr(processes, "SECONDS_TO_SAVE", 20)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: killed.append(process.pid))
    try:
        with pytest.raises(RuntimeError, match="exit status 75"):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert mark.exists()
    assert not killed, "it had ended by itself"
    assert queued[0].function.command == job.command
    failing = processes.Job([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="exit status 3"):
        failing()


def test_a_teacher_at_work_is_waited_for(study_of, monkeypatch):
    study = study_of(TINY)
    monkeypatch.setattr(plan.PlannedRun, "state", lambda run: plan.RUNNING)
    with pytest.raises(UserError, match="is being trained"):
        processes.submit(study, 1, {"gpus_per_node": 0}, "local")
    alone = plan.Study(study.name, study.folder, None, study.runs)
    assert processes.submit(alone, 1, {"gpus_per_node": 0}, "local") == [], "another process has them"


def planned(tmp_path: Path, name: str, code: str) -> plan.PlannedRun:
    """A run of a script of few lines."""
    (tmp_path / f"{name}.py").write_text(code)
    return plan.PlannedRun(name, tmp_path / name, tmp_path / f"{name}.py", (), (), {"aa_examples": 0}, {})


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hang_up_stops_a_study_unless_nohup_ignores_it(tmp_path, ignored):
    run = planned(tmp_path, "one", "import os, signal; os.kill(os.getppid(), signal.SIGHUP)")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        at_work = processes.Processes(tmp_path)
        if ignored:
            assert at_work.work([run]) == {}
        else:
            with pytest.raises(RunStopped, match="stopped by SIGHUP"):
                at_work.work([run])
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_run_that_is_just_being_started(tmp_path, monkeypatch, capsys, number):
    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    run = planned(tmp_path, "one", "import time; time.sleep(60); open('slept', 'w')")
    with pytest.raises(RunStopped):
        processes.Processes(tmp_path).work([run])
    assert "exit status -15" in capsys.readouterr().out, "it was stopped, not waited for"


def test_a_study_is_stopped_and_resumes_and_a_failed_run_stops_no_other(study_of, tmp_path, capsys, monkeypatch):
    """One sequence, as each process takes seconds: stop in the first run, resume, report a failure, end as a job."""
    study, runs = study_of(TINY.replace("seed = [0, 1]", "seed = [0]")), tmp_path / "runs" / "mine"
    path, arguments = tmp_path / "mine.toml", [str(tmp_path / "mine.toml"), "--run_dir", str(tmp_path / "runs")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        [sys.executable, ROOT / "study.py", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (runs / "teacher" / "config.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 75, err
    assert "teacher: stopped, " + ("saved" if (runs / "teacher" / "last.pt").exists() else "before it had") in out
    assert "stopped by SIGINT; the same command resumes it" in err
    assert not (runs / "adaad_seed0").exists(), "nothing is started after the signal"

    # A file in the place of a run folder makes one run fail.
    (runs / "adaad_seed0").write_text("mine")
    with pytest.raises(UserError, match=r"1 of 2 runs failed: adaad_seed0: error: .*adaad_seed0: File exists"):
        study_main([*arguments, "--jobs", "2"])
    finished = sorted(folder.parent.name for folder in runs.glob("*/result.json"))
    assert finished == ["adaad_IGDM_seed0", "teacher"]

    # submitit's local executor starts processes as SLURM would.
    (runs / "adaad_seed0").unlink()
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    (job,) = processes.submit(study, 2, {"timeout_min": 10, "gpus_per_node": 0}, "local")
    assert job.result() == 0
    assert (runs / "adaad_seed0" / "result.json").exists()
    assert processes.submit(study, 2, {"gpus_per_node": 0}, "local") == [], "what is finished is not sent"
    capsys.readouterr()
    study_main(arguments)
    assert "3 of 3 runs finished, 0 failed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is finished is skipped"

    path.write_text(TINY.replace("[settings]", "[settings]\neval_after = 3\ntensorboard = 1"))
    plan.read_study(path, tmp_path / "runs")  # what a run takes at its resumption
    path.write_text(TINY.replace("alpha = 5", "alpha = 7"))
    with pytest.raises(UserError, match=r"adaad_IGDM_seed0 contains a run with other settings \(alpha was 5, is now 7"):
        plan.read_study(path, tmp_path / "runs")
