"""evaluate.py: what it measures, with which settings, what it writes and what it refuses."""

import json
import sys

import pytest
import torch

import evaluate
from cifar100_models import build_model
from experiment import cli, evaluation, files


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run on digits whose student was never trained, and a teacher of the same kind."""
    for name, seed in (("run", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        model = build_model("RES-8", 10)
        (tmp_path / name).mkdir()
        files.save_student(tmp_path / name / "student.pt", model, "RES-8", 10, {})
        files.write_json(tmp_path / name / "result.json", {"student_sha256": files.state_sha256(model)})
    settings = {"dataset": "digits", "epsilon": 0.1, "teacher": str(tmp_path / "teacher"), "seed": 3, "aa_examples": 6}
    files.write_json(tmp_path / "run" / "config.json", {"settings": settings})
    return tmp_path / "run"


def evaluate_with(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    cli.guard(evaluate.main)


def test_evaluate_a_run_folder(quick_autoattack, run_folder, monkeypatch, capsys):
    before = (run_folder / "result.json").read_bytes()
    evaluate_with(monkeypatch, run_folder, "--examples", "30", "--device", "cpu")
    printed = capsys.readouterr().out
    written = files.read_json(run_folder / "evaluation.json")
    assert (run_folder / "result.json").read_bytes() == before
    assert written["settings"]["epsilon"] == 0.1
    assert written["autoattack"]["seed"] == 3
    assert written["autoattack"]["examples"] == 6
    assert written["test_examples"] == 30
    for name in ("clean", "fgsm", "pgd20", "cw30"):
        assert f"{100 * written[name]:.2f} %" in printed
    assert f"{100 * written['autoattack']['accuracy']:.2f} % of 6 images" in printed
    assert evaluation.GRADIENT_DEFINITION in printed
    assert -1 <= written["gradients"]["gc"] <= 1

    # Again, and something else: written anew; one file of another name in the same format is a checkpoint too.
    (run_folder / "student.pt").rename(run_folder / "best.pt")
    arguments = (run_folder / "best.pt", "--dataset", "digits", "--attacks", "clean", "--examples", "30")
    evaluate_with(monkeypatch, *arguments, "--device", "cpu")
    anew = files.read_json(run_folder / "evaluation.json")
    assert anew["clean"] == written["clean"]
    assert "pgd20" not in anew


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attacks", "deepfool"], "'deepfool'"),
        (["--eps", "0.1"], "--eps"),
        (["--epsilon", "8"], "'8' is not allowed"),
        (["--dataset", "nothing"], "'nothing'"),
        (["--teacher", "nobody"], "'nobody'"),
        (["--examples", "0"], "'0' is not allowed"),
    ],
)
def test_evaluate_refuses_in_one_line(run_folder, monkeypatch, capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        evaluate_with(monkeypatch, run_folder, *arguments, "--device", "cpu")
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
    assert not (run_folder / "evaluation.json").exists()


def test_evaluate_refuses_what_does_not_go_together(run_folder, monkeypatch, capsys):
    other = run_folder / "other.pt"
    files.save_student(other, build_model("RES-8", 7), "RES-8", 7, {})
    config = json.loads((run_folder / "config.json").read_text())
    config["settings"]["epsilon"] = "lots"
    (run_folder / "config.json").write_text(json.dumps(config))
    for arguments, said in [
        ((other, "--dataset", "digits"), "has 7 classes but digits has 10"),
        ((other, "--dataset", "digits", "--attacks", "gradients"), "give --teacher"),
        ((run_folder,), "'lots' is not allowed"),
        ((run_folder.parent / "nowhere",), "nowhere"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            evaluate_with(monkeypatch, *arguments)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_evaluate_a_file_with_the_settings_of_its_run(run_folder, monkeypatch, tmp_path):
    """A student.pt tells them itself, wherever it lies; a last.pt lies beside its run's config.json."""
    arguments = ("--attacks", "clean", "--examples", "20", "--device", "cpu")
    model = build_model("RES-8", 10)
    (tmp_path / "away").mkdir()
    info = {"settings": {"dataset": "digits", "epsilon": 0.2, "teacher": None}}
    files.save_student(tmp_path / "away" / "student.pt", model, "RES-8", 10, info)
    evaluate_with(monkeypatch, tmp_path / "away" / "student.pt", *arguments)
    moved = files.read_json(tmp_path / "away" / "evaluation.json")
    assert (moved["settings"]["dataset"], moved["settings"]["epsilon"]) == ("digits", 0.2)
    assert "epoch" not in moved

    (run_folder / "student.pt").unlink()
    (run_folder / "result.json").unlink()
    last = {"architecture": "RES-8", "num_classes": 10, "model": model.state_dict(), "optimizer": {}, "epoch": 2}
    files.save(run_folder / "last.pt", {**last, "step": 5})
    for path in (run_folder, run_folder / "last.pt"):
        evaluate_with(monkeypatch, path, *arguments)
        found = files.read_json(run_folder / "evaluation.json")
        assert (found["epoch"], found["step"], found["settings"]["epsilon"]) == (2, 5, 0.1)
        assert found["clean"] == moved["clean"]
        assert found["student_sha256"] == moved["student_sha256"]
        (run_folder / "evaluation.json").unlink()


def test_evaluate_refuses_a_student_that_was_swapped(run_folder, monkeypatch, capsys):
    files.save_student(run_folder / "student.pt", build_model("RES-8", 10), "RES-8", 10, {})
    with pytest.raises(SystemExit) as stopped:
        evaluate_with(monkeypatch, run_folder, "--device", "cpu")
    assert stopped.value.code == 2
    assert "was measured on another student" in capsys.readouterr().err
