"""The run folder: stopping, resuming, refusing. Real runs of seconds, in forks (see fault_server.py)."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from fault_kills import POINTS
from fault_server import ROOT, SCRIPTS, SMALL, result_of, stopped_run

from experiment import data, evaluation, files
from experiment.run import provenance
from experiment.run.health import fault_of


def command(name, *flags):
    return [sys.executable, ROOT / f"{SCRIPTS[0]}.py", *SMALL, "--run_name", name, *flags]


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_bits(small, script):
    small.server.run(script, [*SMALL, "--run_name", f"again_{script}"], small.home).expect(0)
    assert result_of(small.home / "runs" / f"again_{script}") == small.expected[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_with_a_teacher_writes_gd_and_gc(small, script):
    """Of the finished student, on all test images, as the public function measures them again."""
    folder = small.home / "runs" / f"{script}_whole"
    images, teacher = data.load_data("digits"), files.load_student(small.home / "teacher")
    student = files.load_student(folder)
    again = evaluation.gradient_alignment(student, teacher, images.x_test, images.y_test)
    found = json.loads((folder / "result.json").read_text())["gradients"]
    assert found["definition"] == evaluation.GRADIENT_DEFINITION
    assert found["examples"] == len(images.x_test)
    # Another number of threads may add up in another order.
    assert (found["gd"], found["gc"]) == pytest.approx((again["gd"], again["gc"]), rel=1e-4)
    assert found["gd"] > 0
    assert 0 < found["gc"] < 1


def test_a_run_without_a_teacher_has_no_gradients_to_follow(small):
    assert json.loads((small.home / "teacher" / "result.json").read_text())["gradients"] is None


def test_another_seed_is_another_run(small):
    flags = [*SMALL, "--seed", "1", "--aa_examples", "0", "--run_name", "seed1"]
    small.server.run(SCRIPTS[0], flags, small.home).expect(0)
    assert result_of(small.home / "runs" / "seed1")["rows"] != small.expected[SCRIPTS[0]]["rows"]


@pytest.mark.parametrize("place", ["while last.pt is written", "inside PGD-20", "while an AutoAttack chunk is written"])
def test_killed_run_goes_on(small, place):
    point, low, high = POINTS[place]
    fault = (point, random.Random(place).randint(low, high), "kill")
    flags = [*SMALL, "--run_name", place]
    small.server.run(SCRIPTS[1], flags, small.home, faults=[fault]).expect(-signal.SIGKILL)
    small.server.run(SCRIPTS[1], flags, small.home).expect(0)
    assert result_of(small.home / "runs" / place) == small.expected[SCRIPTS[1]]
    assert not list((small.home / "runs" / place).rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_stops(small, number):
    """As a scheduler or a person stops a process; a checkpoint a day: what is saved is saved for the signal."""
    name = f"signal_{number}"
    process = subprocess.Popen(
        command(name, "--epochs", "200", "--checkpoint_minutes", "1440"),
        cwd=small.home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("epoch 1/200"):
            break
    time.sleep(0.3)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert error.count("\n") == 1
    saved = files.load(small.home / "runs" / name / "last.pt")
    where = f"in epoch {saved['epoch'] + 1} after step {saved['step']} of 6;"
    if saved["step"] == 0:
        where = f"after epoch {saved['epoch']} of 200;"
    assert f"stopped by {number.name} {where} the same command goes on" in error


def test_signal_before_the_first_step(small):
    outcome = small.server.run(
        SCRIPTS[0], [*SMALL, "--run_name", "soon"], small.home, faults=[("start of run", 1, "SIGTERM")]
    )
    outcome.expect(75, "begins anew: nothing was saved yet")


def test_a_finished_run_says_so_and_stays_as_it_is(small):
    folder = small.home / "runs" / f"{SCRIPTS[0]}_whole"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outcome = small.server.run(SCRIPTS[0], [*SMALL, "--run_name", folder.name], small.home).expect(0)
    assert "holds a finished run" in outcome.out
    assert "AutoAttack" in outcome.out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_other_settings_are_refused_and_free_ones_are_not(small):
    folder = stopped_run(small.server, small.home, "other")
    flags = [*SMALL, "--run_name", "other"]
    outcome = small.server.run(SCRIPTS[0], [*flags, "--lr", "0.2", "--seed", "3"], small.home)
    outcome.expect(2, "other settings .*lr 0.1 there, 0.2 now; seed 0 there, 3 now")
    outcome = small.server.run(SCRIPTS[1], flags, small.home)
    outcome.expect(2, "script 'adaad_cifar100.py' there, 'adaad_IGDM_cifar100.py' now")
    free = ["--checkpoint_minutes", "5", "--wandb_tags", "x", "--data_dir", "elsewhere"]
    small.server.run(SCRIPTS[0], [*flags, *free], small.home).expect(0)
    assert result_of(folder) == small.expected[SCRIPTS[0]]


def test_run_that_never_saved_anything_is_no_obstacle(small):
    flags = [*SMALL, "--run_name", "typo"]
    small.server.run(SCRIPTS[0], [*flags, "--lr", "0.9"], small.home, faults=[("step", 1, "kill")])
    small.server.run(SCRIPTS[0], flags, small.home, faults=[("start", 1, "")]).expect(2, "admitted")
    assert json.loads((small.home / "runs" / "typo" / "config.json").read_text())["settings"]["lr"] == 0.1


def test_folder_of_something_else_is_refused_untouched(small):
    folder = small.home / "runs" / "thesis"
    folder.mkdir()
    (folder / ".notes.tmp").write_text("mine")
    (folder / ".last.pt.7.tmp").write_text("also mine")
    (folder / "chapter.tex").write_text("")
    outcome = small.server.run(SCRIPTS[0], [*SMALL, "--run_name", "thesis"], small.home)
    outcome.expect(2, "is not a run folder .it holds .notes.tmp.")
    assert len(list(folder.iterdir())) == 4  # and .lock
    shutil.rmtree(folder)


def test_a_refused_start_leaves_no_folder(small):
    done = subprocess.run(
        command("refused", "--teacher", str(small.home)), cwd=small.home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "holds no student.pt" in done.stderr
    assert not (small.home / "runs" / "refused").exists()


def test_resumed_run_names_what_changed(small):
    folder = stopped_run(small.server, small.home, "moved")
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["torch"] = "1.0"
    (folder / "config.json").write_text(json.dumps(config))
    outcome = small.server.run(SCRIPTS[0], [*SMALL, "--run_name", "moved"], small.home, faults=[("start", 1, "")])
    assert "warning: versions changed since the run began" in outcome.out
    # Who reads the result has not seen the warning.
    outcome = small.server.run(SCRIPTS[0], [*SMALL, "--run_name", "moved"], small.home)
    outcome.expect(0)
    assert json.loads((folder / "result.json").read_text())["changed"] == ["versions"]


def test_resumed_run_names_changed_code(small):
    folder = stopped_run(small.server, small.home, "edited")
    config = json.loads((folder / "config.json").read_text())
    config["code_sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    outcome = small.server.run(SCRIPTS[0], [*SMALL, "--run_name", "edited"], small.home, faults=[("start", 1, "")])
    assert "warning: code changed since the run began" in outcome.out


def test_a_finished_run_without_autoattack_can_be_attacked(small):
    """The same command with --aa_examples: the student stays, and a kill in between costs nothing."""
    name, folder = "attacked later", small.home / "runs" / "attacked later"
    flags = [*SMALL, "--run_name", name]
    small.server.run(SCRIPTS[0], [*flags, "--aa_examples", "0"], small.home).expect(0)
    assert json.loads((folder / "result.json").read_text())["autoattack"] is None
    outcome = small.server.run(SCRIPTS[0], [*flags, "--aa_examples", "0"], small.home).expect(0)
    assert "holds a finished run" in outcome.out
    small.server.run(SCRIPTS[0], [*flags, "--lr", "0.9"], small.home).expect(2, "other settings .lr")
    saved = {last: last.read_bytes() for last in (folder / "last.pt", folder / "previous.pt")}
    for last in saved:
        last.unlink()
    before = (folder / "result.json").read_bytes()
    small.server.run(SCRIPTS[0], flags, small.home).expect(2, "other settings .aa_examples")  # it would train anew
    (folder / "last.pt").write_bytes(saved[folder / "previous.pt"])  # of the last step, before its epoch was evaluated
    small.server.run(SCRIPTS[0], flags, small.home).expect(2, "does not hold the student of its result.json")
    assert (folder / "result.json").read_bytes() == before
    for last, content in saved.items():
        last.write_bytes(content)
    small.server.run(SCRIPTS[0], flags, small.home, faults=[("autoattack", 1, "kill")])
    assert (folder / "result.json").read_bytes() == before
    small.server.run(SCRIPTS[0], flags, small.home).expect(0)
    assert result_of(folder) == small.expected[SCRIPTS[0]]
    config, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "result"))
    assert f"--aa_examples {config['settings']['aa_examples']}" in " ".join(SMALL)
    assert config["command"] == result["command"]
    assert "--aa_examples 0" not in result["command"]
    assert "holds a finished run" in small.server.run(SCRIPTS[0], flags, small.home).expect(0).out


def test_rows_and_seconds(small):
    folder = small.home / "runs" / f"{SCRIPTS[1]}_whole"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert "clean" not in rows[0]  # --eval_after 90
    assert rows[1]["loss"] == pytest.approx(rows[1]["loss_adaad"] + rows[1]["loss_igdm"])
    result = json.loads((folder / "result.json").read_text())
    assert result["seconds"]["train"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert (result["clean"], result["pgd20"]) == (rows[1]["clean"], rows[1]["pgd20"])


def test_logits_that_are_worth_nothing():
    logits = torch.randn(8, 10)
    assert fault_of(logits) is None
    assert fault_of(logits[:1].expand(8, 10)) == "the same for every image"
    assert fault_of(torch.zeros(8, 10)) == "the same for every image"
    logits[3, 4] = torch.inf
    assert fault_of(logits) == "not finite"


def test_the_commit_of_a_script_that_git_does_not_know_is_dirty(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    script, mine = tmp_path / "script.py", tmp_path / "mine.py"
    script.write_text("1\n")
    (tmp_path / "README.md").write_text("a word\n")
    assert provenance(script)["commit"] is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = provenance(script)
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"])
    mine.write_text("1\n")
    assert provenance(mine)["commit"] == f"{clean['commit']}-dirty"
    (tmp_path / "README.md").write_text("another word\n")
    assert provenance(script)["commit"] == clean["commit"]
    script.write_text("2\n")
    edited = provenance(script)
    assert edited["commit"] == f"{clean['commit']}-dirty"
    assert edited["code_sha256"] != clean["code_sha256"]
