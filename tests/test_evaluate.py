"""evaluate.py: what it measures, with which settings, what it writes and what is an error."""

import shutil
import sys

import pytest
import torch
from fault_files import small_npz
from torch import nn

import evaluate
from cifar100_models import build_model
from experiment import cli, data, evaluation, files

SETTINGS = {"student": "RES-8", "dataset": "digits", "epsilon": 0.1, "epochs": 1, "seed": 3, "aa_examples": 6}


@pytest.fixture
def run_folder(small, tmp_path):
    """A copy of a finished run and of its teacher, with other settings."""
    folder = shutil.copytree(small.home / "runs/adaad_IGDM_cifar100_whole", tmp_path / "run")
    teacher = shutil.copytree(small.home / "teacher", tmp_path / "teacher")
    change_config(folder, SETTINGS | {"teacher": str(teacher)})
    return folder


@pytest.fixture
def measure(monkeypatch):
    """evaluate.py as from the command line."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--device", "cpu"])
        cli.guard(evaluate.main)

    return call


@pytest.fixture
def error_of(measure, capsys):
    """The line with which evaluate.py ends."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            measure(*arguments)
        assert stopped.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        return line

    return call


def change_config(run_folder, settings=(), **entries):
    path = run_folder / "config.json"
    config = files.read_json(path)
    files.write_json(path, {**config, **entries, "settings": {**config["settings"], **dict(settings)}})


def test_evaluate_a_run_folder(quick_autoattack, run_folder, measure, capsys):
    before = (run_folder / "result.json").read_bytes()
    measure(run_folder, "--examples", "30")
    printed = capsys.readouterr().out
    (record,) = evaluation.records(run_folder)
    assert (run_folder / "result.json").read_bytes() == before
    assert record["measured"] == ["clean", "fgsm", "pgd", "cw", "autoattack", "gradients"]
    assert (record["test_examples"], record["settings"]["epsilon"]) == (30, 0.1)
    attack = record["accuracies"]["autoattack"][0]
    assert (attack["result"]["seed"], attack["examples"], attack["epsilon"]) == (3, 6, 0.1)
    for (point,) in record["accuracies"].values():
        low, high = (100 * end for end in point["interval"])
        assert f"{100 * point['accuracy']:.2f} % {low:.2f} to {high:.2f} %" in " ".join(printed.split())
        assert point["flags"].count("1") == round(point["accuracy"] * point["examples"])
    assert record["gradients"]["definition"] == evaluation.GRADIENT_DEFINITION
    for scalar in record["gradients"]["scalars"].values():
        assert f"f = {scalar['definition']}" in printed
        assert f"{scalar['gd']:.4f} {scalar['gc']:.4f} " in " ".join(printed.split())
    for name in ("versions", "commit", "code_sha256", "command", "hardware", "dataset_sha256", "teacher_sha256"):
        assert record[name]


def test_evaluate_measures_what_the_run_measured(small, measure, tmp_path, monkeypatch, capsys):
    """Clean and PGD-20 with the starts and the network of a run's monitor, AutoAttack with the run's seed."""
    monkeypatch.chdir(small.home)
    folder = shutil.copytree(small.home / "runs/adaad_IGDM_cifar100_whole", tmp_path / "run")
    result = files.read_json(folder / "result.json")
    measure(folder, "--attacks", "clean", "pgd", "autoattack")
    (record,) = evaluation.records(folder)
    assert record["accuracies"]["clean"][0]["accuracy"] == result["clean"]
    assert record["accuracies"]["pgd"][0]["accuracy"] == result["pgd20"]
    assert record["accuracies"]["autoattack"][0]["result"]["flags"] == result["autoattack"]["flags"]
    assert record["differences"] == []
    assert (record["settings"]["start_seed"], record["settings"]["seed"]) == (0, result["autoattack"]["seed"])
    assert "note" not in capsys.readouterr().out

    files.write_json(folder / "result.json", {**result, "pgd20": result["pgd20"] + 0.01})
    measure(folder, "--attacks", "pgd")
    assert f"note: PGD-20 is {100 * result['pgd20']:.2f} % now and" in capsys.readouterr().out
    measure(folder, "--attacks", "pgd", "--seed", "5")  # asked for: no difference to report
    assert "note" not in capsys.readouterr().out


def test_evaluate_says_that_data_and_teacher_are_not_the_runs(run_folder, measure, capsys):
    change_config(run_folder, dataset_sha256="a" * 64, teacher_sha256="b" * 64)
    measure(run_folder, "--attacks", "gradients", "--examples", "4")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    (record,) = evaluation.records(run_folder)
    assert notes == [f"note: {difference}" for difference in record["differences"]]
    differing = [line.partition(":")[0] for line in record["differences"]]
    assert differing == ["the dataset differs from the run's", "the teacher differs from the run's"]


def test_evaluate_attacks_a_run_that_was_not_attacked(quick_autoattack, run_folder, measure):
    change_config(run_folder, {"aa_examples": 0, "precision": "bf16"})
    measure(run_folder, "--attacks", "autoattack", "--examples", "5")
    (record,) = evaluation.records(run_folder)
    assert record["accuracies"]["autoattack"][0]["examples"] == 5
    assert record["precision"] == "fp32"  # that of the computation


def test_few_classes_are_attacked_with_fewer_targets_and_named_so(quick_autoattack, measure, capsys, tmp_path):
    labels = {"y_train": torch.arange(40).numpy() % 4, "y_test": torch.arange(20).numpy() % 4}
    path = small_npz(tmp_path / "four.npz", **labels)
    torch.manual_seed(0)
    torch.save(build_model("RES-8", 4).state_dict(), tmp_path / "bare.pt")
    arguments = [tmp_path / "bare.pt", "--arch", "RES-8", "--dataset", path]
    measure(*arguments)
    (record,) = evaluation.records(tmp_path)
    assert record["measured"] == ["clean", "fgsm", "pgd", "cw", "autoattack"]
    (point,) = record["accuracies"]["autoattack"]
    assert point["result"]["version"] == "AutoAttack, 3 targets (not standard)"
    assert "AutoAttack, 3 targets (not standard)" in capsys.readouterr().out


def test_no_evaluation_overwrites_another(quick_autoattack, run_folder, measure, error_of):
    """The AutoAttack chunks of one checkpoint are no error for a second one of the same folder."""
    torch.manual_seed(7)
    settings = files.read_json(run_folder / "config.json")["settings"]
    files.save_student(run_folder / "other.pt", build_model("RES-8", 10), "RES-8", 10, {"settings": settings})
    arguments = ("--attacks", "autoattack", "--aa_examples", "4")
    for path in (run_folder, run_folder / "other.pt", run_folder):
        measure(path, *arguments)
    measure(run_folder, "--attacks", "clean", "--out", run_folder / "mine.json")
    records = evaluation.records(run_folder)
    assert len(records) == 3
    assert len({record["student_sha256"] for record in records}) == 2
    assert files.read_json(run_folder / "mine.json")["measured"] == ["clean"]
    assert "exists" in error_of(run_folder, "--attacks", "clean", "--out", run_folder / "mine.json")


def test_the_data_are_those_of_the_run(run_folder, measure):
    """Also where it trained on a part of them: compare.py takes records on the run's data only."""
    change_config(run_folder, {"train_examples": 143, "holdout": 40})
    measure(run_folder, "--attacks", "clean")
    (record,) = evaluation.records(run_folder)
    assert record["dataset_sha256"] == data.load_data("digits", train_examples=143, holdout=40).sha256


def test_a_curve_by_class_with_pictures_and_adversarial_images(run_folder, measure, capsys, tmp_path):
    import numpy as np

    # The folder of the records does not exist yet.
    kept, figures = tmp_path / "kept.npz", [run_folder / "evaluations/gradients.svg", tmp_path / "curve.svg"]
    arguments = ("--attacks", "clean", "pgd", "--epsilons", "0", "0.002", "0.1", "--steps", "3", "--restarts", "2")
    pictures = ("--figure", figures[0], "--beside", run_folder.parent / "teacher", "--curve_figure", figures[1])
    measure(run_folder, *arguments, "--per_class", "1", "--save_adversarial", kept, *pictures)
    printed = capsys.readouterr().out
    (record,) = evaluation.records(run_folder)
    points = record["accuracies"]["pgd"]
    assert [point["epsilon"] for point in points] == [0, 0.002, 0.1]
    assert "PGD-3, 2 starts" in printed
    assert "by class at epsilon 0.1" in printed
    assert sum(row["examples"] for row in record["per_class"]["attacks"]["pgd"]) == 360
    with np.load(kept) as saved:
        x, x_adv, y, predictions = (saved[name] for name in ("x", "x_adv", "y", "predictions"))
    assert np.abs(x_adv - x).max() <= 0.1 + 1e-6
    assert "".join("01"[int(hit)] for hit in (predictions == y)) == points[-1]["flags"]
    network = files.load_student(run_folder)
    with torch.no_grad():
        assert (network(torch.from_numpy(x_adv)).argmax(dim=1).numpy() == predictions).mean() > 0.99  # rounding
    for figure in figures:
        assert "<svg" in figure.read_text()


def test_evaluate_bare_weights(run_folder, measure, error_of, tmp_path):
    """A state dict in either format gives the figures of the checkpoint that it was taken from."""
    from safetensors.torch import save_file

    state = files.load_student(run_folder).state_dict()
    torch.save(state, tmp_path / "bare.pt")
    save_file(state, tmp_path / "bare.safetensors")
    arguments = ("--dataset", "digits", "--attacks", "clean", "pgd", "--epsilon", "0.1", "--examples", "30")
    measure(run_folder, *arguments)
    for name in ("bare.pt", "bare.safetensors"):
        measure(tmp_path / name, "--arch", "RES-8", *arguments)
        assert "--arch" in error_of(tmp_path / name, *arguments)
    (own,), bare = evaluation.records(run_folder), evaluation.records(tmp_path)
    assert len(bare) == 2
    for record in bare:
        assert record["student_sha256"] == own["student_sha256"]
        for name, (point,) in record["accuracies"].items():
            assert point["flags"] == own["accuracies"][name][0]["flags"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attacks", "deepfool"], "'deepfool'"),
        (["--eps", "0.1"], "--eps"),
        (["--epsilon", "8"], "'8' is not allowed"),
        (["--dataset", "nothing"], "'nothing'"),
        (["--teacher", "nobody"], "'nobody'"),
        (["--examples", "0"], "'0' is not allowed"),
        (["--precision", "bf16"], "'bf16'"),
        (["--attacks", "autoattack", "--aa_examples", "0"], "autoattack cannot be measured"),
        (["--figure", "gradients.gif"], "expected .png, .pdf, .svg"),
        (["--save_adversarial", "kept.npz"], "give --attacks one of"),
        (["--beside", "other"], "needs --figure"),
        (["--restarts", "0"], "'0' is not allowed"),
        (["--weights", "other.pt"], "--weights other.pt needs the name of its architecture"),
    ],
)
def test_flags_out_of_range_are_one_line(run_folder, error_of, arguments, said):
    assert said in error_of(run_folder, *arguments)
    assert evaluation.records(run_folder) == []


def test_networks_that_do_not_fit_are_one_line(run_folder, error_of):
    other, own, bare = (run_folder / name for name in ("other.pt", "own.py", "bare.pt"))
    files.save_student(other, build_model("RES-8", 7), "RES-8", 7, {"settings": SETTINGS})
    own.write_text("from torch import nn\ndef maps(classes):\n    return nn.Conv2d(3, classes, 3)\n")
    torch.save(nn.Conv2d(3, 10, 3).state_dict(), bare)
    for arguments, said in [
        ((bare, "--arch", f"{own}:maps", "--dataset", "digits"), "returns (2, 10, 6, 6) for images (2, 3, 8, 8)"),
        ((run_folder.parent,), "holds no student.pt or last.pt"),  # before anything is downloaded
        ((other,), "expected logits (2, 10)"),
        ((other, "--attacks", "gradients"), "without --teacher"),
        ((run_folder.parent / "nowhere",), "nowhere"),
        (("Nobody2020Nothing", "--dataset", "digits"), "Nobody2020Nothing"),
        (("RES-8", "--dataset", "digits", "--weights", "nowhere.pt"), "--weights nowhere.pt: no such file"),
        (("BDM", "--dataset", "digits", "--weights", "nowhere.pt"), "--weights nowhere.pt: no such file"),
    ]:
        assert said in error_of(*arguments)
    torch.manual_seed(2)
    files.save_student(run_folder / "student.pt", build_model("RES-8", 10), "RES-8", 10, {})
    assert "was measured on another student" in error_of(run_folder)


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("config", {"settings": [1]}, "config.json: settings is [1]"),
        ("config", {"settings": SETTINGS | {"seed": "x"}}, "config.json: seed is x"),
        ("config", {"settings": SETTINGS | {"epsilon": "lots"}}, "config.json: epsilon is lots"),
        ("config", {"settings": SETTINGS | {"aa_batch": "lots"}}, "'lots' is not allowed"),
        ("result", {"clean": "x"}, "result.json: clean is x"),
        ("result", {"autoattack": [1]}, "result.json: autoattack is [1]"),
    ],
)
def test_an_edited_field_of_a_run_is_named(name, entries, said, run_folder, error_of):
    path = run_folder / f"{name}.json"
    files.write_json(path, files.read_json(path) | entries)
    assert said in error_of(run_folder, "--attacks", "clean")


def test_evaluate_a_file_with_the_settings_of_its_run(run_folder, measure, tmp_path):
    """A student.pt has them itself, wherever it is; a last.pt is beside its run's config.json."""
    arguments = ("--attacks", "clean", "--examples", "20")
    model = build_model("RES-8", 10)
    (tmp_path / "away").mkdir()
    info = {"settings": SETTINGS | {"epsilon": 0.2}}
    files.save_student(tmp_path / "away" / "student.pt", model, "RES-8", 10, info)
    measure(tmp_path / "away" / "student.pt", *arguments)
    (moved,) = evaluation.records(tmp_path / "away")
    assert (moved["settings"]["dataset"], moved["settings"]["epsilon"]) == ("digits", 0.2)
    assert "epoch" not in moved

    (run_folder / "student.pt").unlink()
    (run_folder / "result.json").unlink()
    last = {"architecture": "RES-8", "num_classes": 10, "model": model.state_dict(), "optimizer": {}, "epoch": 2}
    files.save(run_folder / "last.pt", {**last, "step": 5})
    for path in (run_folder, run_folder / "last.pt"):
        measure(path, *arguments)
        found = evaluation.records(run_folder)[-1]
        assert (found["epoch"], found["step"], found["settings"]["epsilon"]) == (2, 5, 0.1)
        assert found["accuracies"]["clean"][0]["flags"] == moved["accuracies"]["clean"][0]["flags"]
        assert found["student_sha256"] == moved["student_sha256"]
