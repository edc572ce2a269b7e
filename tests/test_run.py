"""The run folder: stopping, resuming, errors. Real runs of seconds, in forks (see fault_server.py)."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fault_files import small_npz
from fault_server import ROOT, SCRIPTS, SMALL, result_of, stopped_run, tree

from experiment import UserError, data, evaluation, files
from experiment.run import checks, provenance
from experiment.run.progress import epoch_line, header, remaining
from experiment.run.state import State


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


def test_another_seed_is_another_run(small):
    flags = [*SMALL, "--seed", "1", "--aa_examples", "0", "--run_name", "seed1"]
    small.server.run(SCRIPTS[0], flags, small.home).expect(0)
    assert result_of(small.home / "runs" / "seed1")["rows"] != small.expected[SCRIPTS[0]]["rows"]


def test_signal_before_the_first_step(small):
    outcome = small.server.run(
        SCRIPTS[0], [*SMALL, "--run_name", "soon"], small.home, faults=[("start of run", 1, "SIGTERM")]
    )
    outcome.expect(75, "starts from the beginning: no checkpoint was written yet")


def test_a_finished_run_says_so_and_stays_as_it_is(small):
    folder = small.home / "runs" / f"{SCRIPTS[0]}_whole"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outcome = small.server.run(SCRIPTS[0], [*SMALL, "--run_name", folder.name], small.home).expect(0)
    assert "is a finished run" in outcome.out
    assert "AutoAttack" in outcome.out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_other_settings_are_an_error_and_free_ones_are_not(small):
    folder = stopped_run(small.server, small.home, "other")
    flags = [*SMALL, "--run_name", "other"]
    outcome = small.server.run(SCRIPTS[0], [*flags, "--lr", "0.2", "--seed", "3"], small.home)
    outcome.expect(2, "other settings .*lr was 0.1, is now 0.2; seed was 0, is now 3")
    outcome = small.server.run(SCRIPTS[1], flags, small.home)
    outcome.expect(2, "script was adaad_cifar100.py, is now adaad_IGDM_cifar100.py")
    free = ["--checkpoint_minutes", "5", "--wandb_tags", "x", "--data_dir", "elsewhere"]
    small.server.run(SCRIPTS[0], [*flags, *free], small.home).expect(0)
    assert result_of(folder) == small.expected[SCRIPTS[0]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format": 2}, "config.json was not written by this version"),
        ({"dataset_sha256": "0" * 64}, "dataset_sha256 was '0000.* Use the same data"),
        ({"teacher_sha256": None}, "teacher_sha256 was None"),
        (None, "config.json is not valid JSON"),
    ],
)
def test_a_run_with_other_inputs_or_a_damaged_config_is_an_error(small, edit, message):
    folder = stopped_run(small.server, small.home, "edited")
    config = folder / "config.json"
    config.write_text("{" if edit is None else json.dumps(json.loads(config.read_text()) | edit))
    before = tree(folder)
    small.server.run(SCRIPTS[0], [*SMALL, "--run_name", "edited"], small.home).expect(2, f"error: .*{message}")
    assert tree(folder) == before
    shutil.rmtree(folder)


def test_a_checkpoint_of_another_network_is_an_error(small):
    folder = stopped_run(small.server, small.home, "swapped")
    (folder / "previous.pt").unlink()
    content = torch.load(folder / "last.pt", weights_only=True)
    content["model"]["linear.weight"] = torch.zeros(3)
    torch.save(content, folder / "last.pt")
    outcome = small.server.run(SCRIPTS[0], [*SMALL, "--run_name", "swapped"], small.home)
    outcome.expect(2, "error: .*last.pt does not fit this run: .* size mismatch")


def test_run_that_never_saved_anything_is_no_obstacle(small):
    flags = [*SMALL, "--run_name", "typo"]
    small.server.run(SCRIPTS[0], [*flags, "--lr", "0.9"], small.home, faults=[("step", 1, "kill")])
    small.server.run(SCRIPTS[0], flags, small.home, faults=[("start", 1, "")]).expect(2, "admitted")
    assert json.loads((small.home / "runs" / "typo" / "config.json").read_text())["settings"]["lr"] == 0.1


def test_a_folder_of_something_else_is_an_error_and_unchanged(small):
    folder = small.home / "runs" / "thesis"
    folder.mkdir()
    (folder / ".notes.tmp").write_text("mine")
    (folder / ".last.pt.7.tmp").write_text("also mine")
    (folder / "chapter.tex").write_text("")
    outcome = small.server.run(SCRIPTS[0], [*SMALL, "--run_name", "thesis"], small.home)
    outcome.expect(2, "is not a run folder .it contains .notes.tmp.")
    assert len(list(folder.iterdir())) == 4  # and .lock
    shutil.rmtree(folder)


def test_a_failed_start_leaves_no_folder(small):
    command = [sys.executable, ROOT / f"{SCRIPTS[0]}.py", *SMALL, "--run_name", "failed", "--teacher", small.home]
    done = subprocess.run(command, cwd=small.home, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds no student.pt" in done.stderr
    assert not (small.home / "runs" / "failed").exists()


def test_resumed_run_names_what_changed(small):
    folder = stopped_run(small.server, small.home, "moved")
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["torch"], config["code_sha256"] = "1.0", "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    outcome = small.server.run(SCRIPTS[0], [*SMALL, "--run_name", "moved"], small.home, faults=[("start", 1, "")])
    assert "warning: versions and code changed since the run began" in outcome.out
    # Who reads the result has not seen the warning.
    outcome = small.server.run(SCRIPTS[0], [*SMALL, "--run_name", "moved"], small.home)
    outcome.expect(0)
    assert json.loads((folder / "result.json").read_text())["changed"] == ["versions", "code"]


def test_autoattack_can_be_given_up_and_made_later(small):
    """--aa_examples 0 ends a run, whatever kept AutoAttack from ending; a number attacks its student later."""
    name, folder = "attacked later", small.home / "runs" / "attacked later"
    flags = [*SMALL, "--run_name", name]
    without = [*flags, "--aa_examples", "0"]
    small.server.run(SCRIPTS[0], flags, small.home, faults=[("autoattack", 2, "kill")])
    assert not (folder / "result.json").exists()
    small.server.run(SCRIPTS[0], without, small.home).expect(0)
    config, result = (json.loads((folder / f"{file}.json").read_text()) for file in ("config", "result"))
    assert result["autoattack"] is None
    assert config["settings"]["aa_examples"] == 0
    before, student = ((folder / file).read_bytes() for file in ("result.json", "student.pt"))
    small.server.run(SCRIPTS[0], [*flags, "--lr", "0.9"], small.home).expect(2, "other settings .lr")
    saved = {last: last.read_bytes() for last in (folder / "last.pt", folder / "previous.pt")}
    for last in saved:
        last.unlink()
    small.server.run(SCRIPTS[0], flags, small.home).expect(2, "other settings .aa_examples")  # it would train anew
    for last, content in saved.items():
        last.write_bytes(content)
    small.server.run(SCRIPTS[0], flags, small.home, faults=[("autoattack", 1, "kill")])
    assert (folder / "result.json").read_bytes() == before
    assert "is a finished run" in small.server.run(SCRIPTS[0], without, small.home).expect(0).out
    small.server.run(SCRIPTS[0], flags, small.home).expect(0)
    assert result_of(folder) == small.expected[SCRIPTS[0]]
    assert (folder / "student.pt").read_bytes() == student, "students identify their teacher by its hash"
    config, result = (json.loads((folder / f"{file}.json").read_text()) for file in ("config", "result"))
    assert f"--aa_examples {config['settings']['aa_examples']}" in " ".join(SMALL)
    assert config["command"] == result["command"]
    assert "--aa_examples 0" not in result["command"]
    assert "is a finished run" in small.server.run(SCRIPTS[0], flags, small.home).expect(0).out
    (folder / "result.json").write_text(json.dumps(result | {"format": 2}))
    small.server.run(SCRIPTS[0], flags, small.home).expect(2, "result.json was not written by this version")


def test_rows_and_seconds(small):
    folder = small.home / "runs" / f"{SCRIPTS[1]}_whole"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert "clean" not in rows[0]  # --eval_after 90
    assert rows[1]["loss"] == pytest.approx(rows[1]["loss_adaad"] + rows[1]["loss_igdm"])
    result = json.loads((folder / "result.json").read_text())
    assert result["seconds"]["train"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert (result["clean"], result["pgd20"]) == (rows[1]["clean"], rows[1]["pgd20"])


def test_the_commit_of_an_edited_script_is_dirty(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    script = tmp_path / "script.py"
    script.write_text("1\n")
    assert provenance(script)["commit"] is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = provenance(script)
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"])
    script.write_text("2\n")
    edited = provenance(script)
    assert edited["commit"] == f"{clean['commit']}-dirty"
    assert edited["code_sha256"] != clean["code_sha256"]


# Errors before the first step, and the end after the last


def test_autoattack_with_epsilon_0_is_an_error_before_training(small):
    flags = [*SMALL, "--epsilon", "0", "--run_name", "epsilon 0"]
    outcome = small.server.run(SCRIPTS[0], flags, small.home)
    outcome.expect(
        2, "error: --epsilon 0 is out of range for AutoAttack .expected 0 < epsilon <= 1, or --aa_examples 0."
    )
    assert not (small.home / "runs" / "epsilon 0").exists()


def test_autoattack_with_few_classes_is_named_by_its_targets(small):
    labels = {"y_train": torch.arange(40).numpy() % 4, "y_test": torch.arange(20).numpy() % 4}
    path = small_npz(small.home / "four.npz", **labels)
    flags = ["--dataset", path, "--model", "RES-8", "--batch", "20", "--epochs", "1", "--aa_examples", "4"]
    flags += ["--epsilon", "1", "--run_name", "four"]
    outcome = small.server.run("train_teacher", flags, small.home).expect(0)
    assert "AutoAttack, 3 targets (not standard)" in outcome.out


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (
            "nn.Sequential(nn.Flatten(), nn.Linear(192, classes + 1))",
            r"returns \(2, 11\) for images .*expected logits \(2, 10\)",
        ),
        ("nn.Conv2d(3, classes, 3)", r"returns \(2, 10, 6, 6\) for images \(2, 3, 8, 8\); expected logits \(2, 10\)"),
        ("nn.MultiheadAttention(8, 1)", r"fails on images \(2, 3, 8, 8\): TypeError: .* missing"),
        ("nn.LSTM(8, 10)", r"fails on images \(2, 3, 8, 8\): ValueError"),
        ("nn.Sequential(nn.Flatten(), nn.Linear(5, classes))", r"fails on images \(2, 3, 8, 8\): RuntimeError: mat1"),
        ("nn.Flatten()", "the network has no parameter that requires a gradient: there is nothing to train"),
    ],
    ids=["classes", "maps", "call", "kind", "size", "parameters"],
)
def test_a_network_that_makes_no_logits_is_an_error_before_training(small, network, said):
    file = small.home / "own.py"
    file.write_text(f"from torch import nn\ndef own(classes):\n    return {network}\n")
    flags = [*SMALL, "--student", f"{file}:own", "--run_name", "own"]
    small.server.run(SCRIPTS[0], flags, small.home).expect(2, f"error: .*{said}")
    assert not (small.home / "runs" / "own" / "config.json").exists()


def test_a_missing_pyautoattack_is_an_error_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"AutoAttack cannot be imported .*, or use --aa_examples 0"):
        checks.check_names(argparse.Namespace(dataset="digits", aa_examples=4, epsilon=0.1))
    checks.check_names(argparse.Namespace(dataset="digits", aa_examples=0, epsilon=0.1))


def test_only_missing_checkpoints_need_space(monkeypatch, tmp_path):
    """Otherwise a run that fills its disk could not resume."""
    student, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)), data.load_data("digits")
    args = argparse.Namespace(student="own", batch=100, holdout=0, swa_after=2)
    checkpoint = 3 * 4 * 1930  # weights, momentum and mean of the weights

    def feasible(free):
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
        checks.check_feasible(args, images, student, None, tmp_path, 1)

    feasible(3 * checkpoint)
    with pytest.raises(UserError, match="for checkpoints, but the disk has"):
        feasible(3 * checkpoint - 1)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).touch()
    feasible(checkpoint)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"ramp_epochs": 10},
            "weight of the IGDM term is 2, not alpha 1: it is alpha * epoch / 10, and the run has 20",
        ),
        ({"holdout": 10, "eval_after": 19}, "--holdout has only the last epoch to choose from: --eval_after 19"),
        ({"lr_milestones": [10, 20]}, "20 epochs, lr 0.1, divided by 10 after 10\n"),
        ({"step_size": 0.001}, "the attack's steps reach 0.01 of epsilon 0.1"),
        ({}, "teacher, 20 parameters, SHA-256 eeeeeeeeeeee, correct on 3 of 4 test images"),
    ],
)
def test_the_header_says_what_the_settings_come_to(flags, said):
    settings = {"teacher": "teacher", "student": "own", "lr_milestones": [], "epochs": 20, "epsilon": 0.1, "lr": 0.1}
    settings |= {"precision": "fp32", "steps": 10, "step_size": 0.1, "alpha": 1.0, "ramp_epochs": 20, "holdout": 0}
    settings |= {"eval_after": 10, **flags}
    config = {"settings": settings, "method": "AdaAD", "adds": "IGDM", "device": "cpu", "teacher_sha256": "e" * 64}
    config |= {"outer_settings": [], "added_settings": []}
    network, images = torch.nn.Linear(1, 10), data.load_data("digits")
    printed = header(config, "folder", "", images, network, network, "correct on 3 of 4 test images", [])
    assert said in printed
    assert printed.count("warning") == len(flags.keys() - {"lr_milestones", "eval_after"})


def test_a_teacher_of_other_labels_shows():
    images = data.load_data("digits")

    def teacher(x):
        labels = images.y_test[::6] + (torch.arange(len(x)) < 20)
        return torch.nn.functional.one_hot(labels % 10, 10).float()

    assert checks.check_teacher("teacher", teacher, images) == "correct on 40 of 60 test images"


def test_the_command_names_torchrun_and_its_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["adaad_cifar100.py", "--seed", "1"])
    assert provenance(ROOT / "adaad_cifar100.py")["command"] == "python adaad_cifar100.py --seed 1"
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    found = provenance(ROOT / "adaad_cifar100.py")
    assert found["command"] == "torchrun --nnodes=2 --nproc_per_node=4 adaad_cifar100.py --seed 1"
    assert found["processes"] == 8


# Best epoch, mean weights


@pytest.fixture(scope="module")
def kept(small):
    """Flags of a run that keeps its best epoch and the mean of its weights, and that run, uninterrupted."""
    flags = [*SMALL, "--epochs", "4", "--eval_after", "1", "--aa_examples", "4", "--aa_batch", "4", "--aa_best", "1"]
    flags += ["--holdout", "100", "--swa_after", "2"]
    small.server.run(SCRIPTS[0], [*flags, "--run_name", "kept"], small.home).expect(0)
    return flags, result_of(small.home / "runs" / "kept")


def test_the_best_epoch_is_that_of_the_held_out_images(small, kept):
    _, result = kept
    accuracies = {row["epoch"]: row["holdout_pgd10"] for row in result["rows"] if "holdout_pgd10" in row}
    assert list(accuracies) == [2, 3, 4]
    best = max(accuracies, key=accuracies.get)
    assert result["best"]["epoch"] == best
    assert result["best"]["holdout_pgd10"] == accuracies[best]
    row = result["rows"][best - 1]
    assert (result["best"]["clean"], result["best"]["pgd20"]) == (row["clean"], row["pgd20"])
    assert result["best"]["autoattack"]["examples"] == 4
    student = files.load_student(small.home / "runs" / "kept" / "best.pt")
    images = data.load_data("digits", holdout=100)
    assert evaluation.accuracy(student, images.x_test, images.y_test) == row["clean"]


def test_the_mean_weights_are_those_of_the_last_epochs(small, kept):
    """Against the mean taken by hand of last.pt after epochs 3 and 4; and the student itself does not move."""
    flags, result = kept
    weights = []
    for epoch in (3, 4):
        name = f"mean_{epoch}"
        fault = ("evaluation", 3 * epoch - 5, "SIGTERM")  # three accuracies per epoch, from epoch 2 on
        small.server.run(SCRIPTS[0], [*flags, "--run_name", name], small.home, faults=[fault]).expect(75)
        weights.append(files.load(small.home / "runs" / name / "last.pt")["model"])
    mean = torch.load(small.home / "runs" / "kept" / "swa.pt", weights_only=True)["state_dict"]
    for name, _ in files.load_student(small.home / "runs" / "kept").named_parameters():
        torch.testing.assert_close(mean[name], (weights[0][name] + weights[1][name]) / 2)
    assert result["swa"]["epochs"] == 2
    student = files.load_student(small.home / "runs" / "kept" / "swa.pt")
    images = data.load_data("digits", holdout=100)
    # Running statistics are estimated anew: with those of the last epoch the accuracy would be another network's.
    found = evaluation.accuracy(student, images.x_test, images.y_test)
    assert found == result["swa"]["clean"]
    plain = [*flags, "--swa_after", "0", "--aa_examples", "0", "--aa_best", "0", "--run_name", "no mean"]
    small.server.run(SCRIPTS[0], plain, small.home).expect(0)
    assert result_of(small.home / "runs" / "no mean")["student_sha256"] == result["student_sha256"]


@pytest.mark.parametrize("fault", [("step", 15, "kill"), ("evaluation", 3, "SIGTERM")])
def test_a_run_that_keeps_best_and_mean_resumes_bit_for_bit(small, kept, fault):
    flags, result = kept
    name = f"kept_{fault[0].replace(':', '_')}"
    assert small.server.run(SCRIPTS[0], [*flags, "--run_name", name], small.home, faults=[fault]).status != 0
    small.server.run(SCRIPTS[0], [*flags, "--run_name", name], small.home).expect(0)
    assert result_of(small.home / "runs" / name) == result


def test_the_epochs_that_compete_to_be_the_best_stay_the_same(small, kept):
    flags, _ = kept
    again = [*flags, "--eval_after", "0", "--run_name", "kept"]
    small.server.run(SCRIPTS[0], again, small.home).expect(2, "eval_after was 1, is now 0")


def test_the_statistics_of_the_mean_are_estimated_once(small, kept):
    """A GPU might estimate others after a kill, and AutoAttack's chunks would belong to another network."""
    flags, _ = kept
    folder = small.home / "runs" / "estimated"
    flags = [*flags, "--run_name", "estimated"]
    small.server.run(SCRIPTS[0], flags, small.home, faults=[("evaluation", 5, "SIGTERM")]).expect(75)
    mean = torch.load(small.home / "runs" / "kept" / "swa.pt", weights_only=True)
    moved = {k: v * 1.25 if k.endswith("running_var") else v for k, v in mean["state_dict"].items()}
    files.save(folder / "swa.pt", {**mean, "state_dict": moved})
    small.server.run(SCRIPTS[0], flags, small.home).expect(0)
    sha256 = files.state_sha256(files.load_student(folder / "swa.pt"))
    assert sha256 != files.state_sha256(files.load_student(small.home / "runs" / "kept" / "swa.pt"))
    assert result_of(folder)["swa"]["autoattack"]["student_sha256"] == sha256


# What it says about time


def test_the_time_left_counts_evaluation_and_autoattack():
    args = argparse.Namespace(epochs=10, eval_after=8, aa_examples=1000)
    images = SimpleNamespace(x_test=range(10_000))
    rows = [{"epoch": epoch, "seconds": 100.0} for epoch in range(1, 9)]
    state = State(epoch=8, rows=rows, seconds={"train": 800.0, "evaluation": 0.0})
    training, _ = remaining(args, images, state, 1e-5)
    assert training == pytest.approx(2 * (100 + 42 * 10_000 * 1e-5))  # two epochs, each with an evaluation
    rows.append({"epoch": 9, "seconds": 100.0, "clean": 0.6, "pgd20": 0.5})
    state = State(epoch=9, rows=rows, seconds={"train": 900.0, "evaluation": 21.0})
    training, attack = remaining(args, images, state, 1e-5)
    assert training == pytest.approx(100 + 21)
    # A pass over one image takes 21 s / 21 passes / 10,000 images; 100 passes if it falls, 4000 if it does not.
    assert attack == pytest.approx(1000 * 1e-4 * (0.5 * 100 + 0.5 * 4000))
    args.aa_examples = 0
    assert remaining(args, images, state, 1e-5)[1] == 0
    line = epoch_line({**rows[-1], "lr": 0.1, "loss": 1.0, "images_per_second": 500.0}, 10, 121.0, 205.0)
    assert line.endswith("about 05:26 left (AutoAttack 03:25)")
