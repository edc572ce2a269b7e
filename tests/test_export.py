"""Students for others: what export.py writes is the student, and others' tools take it as it is."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from fault_server import ROOT

import export
import hubconf
from experiment import UserError, data, files, records, teachers


@pytest.fixture(scope="module")
def run(small):
    """The folder of a finished run."""
    return small.home / "runs/adaad_IGDM_cifar100_whole"


@pytest.fixture
def command(run, monkeypatch):
    """export.py as from the command line."""

    def call(*flags, folder=run):
        monkeypatch.setattr(sys, "argv", ["export.py", str(folder), *map(str, flags)])
        export.main()

    return call


@pytest.fixture(scope="module")
def x():
    return data.as_float(data.load_data("digits").x_test[:40])


def logits_of(model, x):
    with torch.no_grad():
        return model(x)


@pytest.fixture(scope="module")
def hub(run, tmp_path_factory):
    """A hub folder of the run."""
    folder = tmp_path_factory.mktemp("hub") / "digits-student"
    folder.mkdir()
    config, result = records.read_config(run), records.read_result(run)
    export.write_hub(folder, teachers.load_network(run), config, result, "mit")
    return folder


def test_onnx_gives_the_students_logits_for_any_batch(run, command, x, tmp_path, capsys):
    import onnxruntime

    path = tmp_path / "new" / "student.onnx"
    command("--onnx", path)
    assert "on 128 clean and adversarial images" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    student = files.load_student(run)
    for count in (1, 3, 40):
        (logits,) = session.run(["logits"], {"x": x[:count].numpy()})
        # float32 of another library: other orders of sums.
        torch.testing.assert_close(torch.from_numpy(logits), logits_of(student, x[:count]), rtol=1e-4, atol=1e-4)


def test_an_onnx_file_that_disagrees_is_not_written(run, command, monkeypatch, tmp_path):
    real = torch.onnx.export

    def broken(student, *args, **kwargs):
        other = files.load_student(run)
        torch.nn.init.zeros_(next(iter(reversed(list(other.parameters())))))
        torch.nn.init.normal_(list(other.parameters())[-2])
        return real(other, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", broken)
    path = tmp_path / "student.onnx"
    with pytest.raises(UserError, match="disagrees with the student on 128 clean and adversarial images"):
        command("--onnx", path)
    assert list(tmp_path.iterdir()) == []


class Branches(torch.nn.Module):
    """A forward that depends on the data, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        self.layers[1].weight = self.layers[0].weight

    def forward(self, x):
        return self.layers(x.mean(dim=(1, 2)) if x.sum() > 0 else x.amax(dim=(1, 2)))


def test_a_network_of_ones_own_may_not_suit_a_format(tmp_path, x):
    from safetensors.torch import load

    with pytest.raises(UserError, match="--onnx: torch cannot export this network: "):
        export.write_onnx(tmp_path / "own.onnx", Branches().eval(), x)
    student = SimpleNamespace(model=Branches(), architecture="own.py:own", num_classes=8)
    export.write_safetensors(tmp_path / "own.safetensors", student)
    weights = load((tmp_path / "own.safetensors").read_bytes())
    assert torch.equal(weights["layers.0.weight"], weights["layers.1.weight"])


def test_safetensors_hold_the_weights_and_what_they_belong_to(run, command, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "student.safetensors"
    command("--safetensors", path)
    with safe_open(path, "pt") as archive:
        assert archive.metadata() == {"architecture": "RES-8", "num_classes": "10", "format": "pt"}
        names = archive.keys()
        tensors = {name: archive.get_tensor(name) for name in names}
    expected = files.load_student(run).state_dict()
    torch.testing.assert_close(tensors, dict(expected), rtol=0, atol=0)


def test_the_model_card_shows_what_the_run_measured(run, hub):
    from huggingface_hub import ModelCard

    assert {path.name for path in hub.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    card, result = ModelCard.load(hub / "README.md"), json.loads((run / "result.json").read_text())
    assert (card.data.license, card.data.library_name) == ("mit", "pytorch")
    shown = {entry.metric_name.partition(" ")[0]: entry.metric_value for entry in card.data.eval_results}
    measured = {"Clean": result["clean"], "PGD-20": result["pgd20"], "AutoAttack": result["autoattack"]["accuracy"]}
    assert shown == {name: pytest.approx(100 * value, abs=0.005) for name, value in measured.items()}
    gradients = result["gradients"]
    for fact in (
        *("AdaAD+IGDM", "digits", "teacher", "seed", "torch.hub.load", "Licence of the weights: mit"),
        *(result["student_sha256"], result["command"], gradients["definition"], '"alpha"'),
        *(f"| GD | {gradients['gd']:.4f} |", f"| GC | {gradients['gc']:.4f} |"),
        f"| {result['autoattack']['examples']} |",
    ):
        assert fact in card.text, fact
    config = json.loads((hub / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("RES-8", 10)


def test_torch_hub_gives_the_student_from_run_file_and_hub_folder(run, hub, x):
    expected = logits_of(files.load_student(run), x)
    for path in (run, run / "student.pt", hub):
        student = torch.hub.load(str(ROOT), "student", str(path), source="local")
        assert not any(module.training for module in student.modules())
        assert torch.equal(logits_of(student, x), expected)


def test_the_card_has_no_file_locations_and_trackers():
    command = "python ard_cifar100.py --wandb_entity lab --epochs 3 --data_dir=elsewhere --run_dir 'my runs' --seed 1"
    assert export.public_command(command) == "python ard_cifar100.py --epochs 3 --seed 1"


def test_a_network_of_ones_own_file_goes_to_no_hub(run, command, tmp_path, monkeypatch):
    own_file = dataclasses.replace(teachers.load_network(run), architecture="net.py:make")
    monkeypatch.setattr(teachers, "load_network", lambda *_, **__: own_file)
    with pytest.raises(UserError, match=r"others cannot build net\.py:make"):
        command("--hub", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"")
    files.write_json(foreign / "config.json", {"architecture": f"{tmp_path}/net.py:make", "num_classes": 10})
    (tmp_path / "net.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="is not one of this repository"):
        hubconf.student(foreign)


def test_only_a_finished_run_and_its_own_student_are_exported(small, run, command, tmp_path):
    with pytest.raises(UserError, match=r"it has no result\.json"):
        command("--hub", tmp_path / "hub", folder=small.home)
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "result.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    (copy / "student.pt").write_bytes((small.home / "teacher/student.pt").read_bytes())
    with pytest.raises(UserError, match="measured on another student"):
        command("--hub", tmp_path / "hub", folder=copy)
    assert not (tmp_path / "hub").exists()


def test_an_export_replaces_an_earlier_one_and_nothing_else(run, command, capsys, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    (tmp_path / "README.md").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for flags, said in [
        ((), "nothing to write"),
        (("--safetensors", run / "student.pt"), "must end in .safetensors"),
        (("--onnx", run / "result.json"), "must end in .onnx"),
        (("--hub", run), "is not empty and not an earlier export"),
        (("--hub", "."), "'.' is not empty and not an earlier export"),
    ]:
        with pytest.raises(SystemExit):
            command(*flags)
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    for _ in range(2):
        command("--hub", ".")
    assert "\n# new\n" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "advised"),
    [
        ("empty", "A run is made with: python adaad_cifar100.py --run_name NAME"),
        ("unfinished", "Resume the run with: python ard_cifar100.py --run_name unfinished"),
        ("study", "It holds runs: give one of them, such as "),
        ("export", "It is an export: give the run that it was made from."),
    ],
)
def test_a_folder_of_the_wrong_kind_names_what_to_do(kind, advised, command, monkeypatch, tmp_path, capsys):
    folder = tmp_path / kind
    run_folder = folder / "a" if kind == "study" else folder
    run_folder.mkdir(parents=True)
    if kind in ("unfinished", "study"):
        files.write_json(run_folder / "config.json", {"command": "python ard_cifar100.py --run_name unfinished"})
    if kind == "export":
        (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"is not the folder of a (finished run|run with)") as caught:
        command("--safetensors", tmp_path / "s.safetensors", folder=folder)
    assert advised in str(caught.value)
