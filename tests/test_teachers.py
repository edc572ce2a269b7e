"""Teachers: RobustBench architectures with random weights, our own checkpoints, and every way a file can be bad."""

import gc
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fault_server import HANGS, ROOT
from torch import nn
from web_server import served

import evaluate
from cifar100_models import build_model
from experiment import UserError, cli, compat, data, files
from experiment.teachers import load_network, load_teacher, zoo

SMALL = "Addepalli2022Efficient_RN18"  # RobustBench's smallest CIFAR-100 architecture, for the many faults
PARAMETERS = {"BDM": 36_536_884, "DEC": 36_536_884, "LTD": 48_320_276}


@pytest.fixture(scope="module")
def registry():
    return compat.linf_models(compat.import_robustbench(), "cifar100")


@pytest.fixture(scope="module")
def x():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def random_network(registry, name):
    """Random weights of half precision's values, so that a file of half the size holds them exactly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        network = registry[name]["model"]().eval()
        with torch.no_grad():
            for key, value in network.state_dict().items():
                if key.endswith("running_mean"):
                    value.normal_(0, 0.1)
                if value.is_floating_point():
                    value.copy_(value.half())
    return network


def half(network, prefix=""):
    return {
        prefix + key: value.half() if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }


@pytest.fixture(scope="module")
def originals(registry):
    return {alias: random_network(registry, cli.ALIASES[alias]) for alias in PARAMETERS}


@pytest.fixture(scope="module")
def model_dir(originals, tmp_path_factory):
    """The three teachers as they come: bare or wrapped, with either prefix, in torch's new and old file format."""
    root = tmp_path_factory.mktemp("models")
    folder = root / "cifar100" / "Linf"
    folder.mkdir(parents=True)
    torch.save({"state_dict": half(originals["BDM"], "module.")}, folder / "Wang2023Better_WRN-28-10.pt")
    torch.save(half(originals["DEC"]), folder / "Cui2023Decoupled_WRN-28-10.pt")
    torch.save(
        half(originals["LTD"], "module.model."),
        folder / "Chen2021LTD_WRN34_10.pt",
        _use_new_zipfile_serialization=False,
    )
    yield root
    for file in folder.iterdir():  # 240 MB that pytest would keep for three runs
        file.unlink()


@pytest.fixture(scope="module")
def small(registry):
    return random_network(registry, SMALL)


@pytest.fixture(scope="module")
def small_bytes(small, tmp_path_factory):
    file = tmp_path_factory.mktemp("small") / "small.pt"
    torch.save(half(small), file)
    content = file.read_bytes()
    file.unlink()
    return content


@pytest.mark.parametrize("alias", ["BDM", "DEC", "LTD"])
def test_robustbench_teacher_computes_what_the_original_does(alias, originals, model_dir, x):
    state = torch.get_rng_state()
    teacher = load_teacher(alias, 100, model_dir=model_dir)
    assert torch.equal(torch.get_rng_state(), state)
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert sum(parameter.numel() for parameter in teacher.parameters()) == PARAMETERS[alias]
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(teacher(x), originals[alias](x))
    assert (teacher.name, teacher.num_classes) == (alias, 100)
    assert teacher.sha256 == files.file_sha256(model_dir / f"cifar100/Linf/{cli.ALIASES[alias]}.pt")


def test_normalisation_constants_may_be_missing_from_the_file(registry, tmp_path):
    # RobustBench loads its own older files in the same lenient way.
    network = registry["Rice2020Overfitting"]["model"]()
    state = {key: value for key, value in network.state_dict().items() if key not in ("mu", "sigma")}
    torch.save(state, tmp_path / "a.pt")
    teacher = load_teacher("Rice2020Overfitting", teacher_path=tmp_path / "a.pt")
    assert torch.equal(teacher.model.mu.flatten(), network.mu.flatten())


def test_transformer_teacher_from_a_plain_timm_state_dict(tmp_path, x):
    name = "Debenedetti2022Light_XCiT-S12"
    original = zoo.source_of(name, "cifar100").build().eval()
    torch.save({"state_dict": half(original.model)}, tmp_path / "a.pt")
    teacher = load_teacher(name, teacher_path=tmp_path / "a.pt")
    # float16 rounds the weights to 3 digits; a wrong file gives logits that differ in the first.
    with torch.no_grad():
        assert torch.allclose(teacher(x), original(x), atol=0.05)


def test_own_checkpoint_and_run_folder(tmp_path):
    model = build_model("RES-8", 10).eval()
    folder = tmp_path / "a run, ünï"
    folder.mkdir()
    files.save_student(folder / "student.pt", model, "RES-8", 10, {"method": "PGD-AT"})
    small_x = torch.rand(2, 3, 8, 8)
    for path in (folder, folder / "student.pt"):
        teacher = load_teacher(path, 10)
        assert load_teacher(str(path), 10).sha256 == teacher.sha256
        with torch.no_grad():
            assert torch.equal(teacher(small_x), model(small_x))
        assert teacher.num_classes == 10
        assert teacher.sha256 == files.file_sha256(folder / "student.pt")
    with pytest.raises(UserError, match="has 10 classes but the data has 100"):
        load_teacher(str(folder), 100)


def error_of(*args, load=load_teacher, **kwargs):
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_names_and_combinations(tmp_path):
    assert "100 classes but the data has 10" in error_of("LTD", 10)
    for name in ("nope", "", "bdm", "Nobody2023Nothing"):
        message = error_of(name)
        assert repr(name) in message
        assert all(word in message for word in ("BDM", "DEC", "LTD", "a path"))
    assert "mixture" in error_of("Bai2024MixedNUTS")
    assert "no such file" in error_of(str(tmp_path / "absent"))
    assert "no such file" in error_of("BDM", teacher_path=tmp_path / "absent.pt")
    assert "no student.pt" in error_of(str(tmp_path))
    assert "such as BDM" in error_of(str(tmp_path), teacher_path=tmp_path)


# The zoo of CIFAR-10, bare weights, and architectures of the user's own


@pytest.mark.parametrize("name", ["LTD", SMALL])
def test_a_name_means_the_network_of_the_datas_zoo(name, tmp_path, x, monkeypatch):
    monkeypatch.setitem(cli.ALIASES, "LTD", SMALL)  # which is a tenth of its size
    ten = compat.linf_models(compat.import_robustbench(), "cifar10")
    full = cli.ALIASES.get(name, name)
    original = random_network(ten, full)
    target = tmp_path / "cifar10" / "Linf" / f"{full}.pt"
    target.parent.mkdir(parents=True)
    torch.save(half(original, "module."), target)
    by_data = load_teacher(name, 10, None, "cifar10", model_dir=tmp_path)
    by_classes = load_network(name, num_classes=10, dataset="my.npz", model_dir=tmp_path)
    by_hand = load_network(name, num_classes=10, dataset="cifar10", weights=target, model_dir=tmp_path / "none")
    by_arch = load_network(target, arch=name, num_classes=10, dataset="cifar10")
    with torch.no_grad():
        for network in (by_data, by_classes.model, by_hand.model, by_arch.model):
            assert torch.equal(network(x), original(x))
    assert (by_classes.num_classes, by_classes.architecture, by_classes.path) == (10, full, target)
    target.unlink()  # 100 MB that pytest would keep for three runs


def test_a_name_of_the_other_zoo_is_an_error_that_names_the_right_one():
    message = error_of("Carmon2019Unlabeled", 100)
    assert "'Carmon2019Unlabeled' is a cifar10 network of RobustBench: give --dataset cifar10" in message
    message = error_of("Bai2023Improving_trades", 10, None, "cifar10")
    assert "is a cifar100 network of RobustBench: give --dataset cifar100" in message
    for dataset, classes in (("digits", 10), ("svhn", 10), ("my.npz", 7)):
        assert f"not for {dataset}: give the path" in error_of("BDM", classes, None, dataset)


OWN = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, classes)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).mean(dim=(2, 3)))

def tiny(num_classes):
    return Tiny(num_classes)
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "net.py").write_text(OWN)
    return f"{tmp_path / 'net.py'}:tiny"


def test_bare_weights_with_an_architecture(own, tmp_path, x):
    from safetensors.torch import save_file

    for arch in ("RES-8", own):
        model = build_model(arch, 10).eval()
        torch.save(
            {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "a.pt"
        )
        save_file(model.state_dict(), tmp_path / "a.safetensors")
        # As Andriushchenko2020Understanding's file, of which RobustBench takes the last epoch, too.
        torch.save({"best": {}, "last": model.state_dict()}, tmp_path / "last.pt")
        for file in (tmp_path / "a.pt", tmp_path / "a.safetensors", tmp_path / "last.pt"):
            network = load_network(file, arch=arch, num_classes=10, dataset="digits")
            teacher = load_teacher(arch, 10, file)
            assert not network.model.training
            assert (network.architecture, network.path, network.info) == (arch, file, {})
            with torch.no_grad():
                assert torch.equal(network.model(x), model(x))
                assert torch.equal(teacher(x), model(x))


def test_bare_weights_that_do_not_fit_or_are_none(own, tmp_path):
    torch.save(build_model("RES-8", 10).state_dict(), tmp_path / "a.pt")

    def message(what, **more):
        return error_of(tmp_path / what, load=load_network, num_classes=10, **more)

    assert "does not fit" in message("a.pt", arch=own)
    assert "choose from RES-18" in message("a.pt", arch="RES-9")
    assert "no such file" in message("a.pt", arch="absent.py:tiny")
    assert "no such file" in message("absent.pt", arch="RES-8")
    assert "--arch NAME" in message("a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    assert "truncated or damaged" in message("b.safetensors", arch="RES-8")
    assert "--arch NAME" in message("b.safetensors")
    (tmp_path / "c.pt").write_bytes(b"nothing")
    assert error_of(SMALL, load=load_network, weights=tmp_path / "c.pt").endswith("or pass it with --weights")
    assert "give its weights with --teacher_path" in error_of("RES-8", 10)


def test_a_student_of_an_architecture_of_ones_own(own, tmp_path, x):
    """Its file is found where it was or beside the checkpoint, and only as it was."""
    model = build_model(own, 10).eval()
    folder = tmp_path / "run"
    folder.mkdir()
    files.save_student(folder / "student.pt", model, own, 10, {})
    state = torch.get_rng_state()
    loaded = files.load_student(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        assert torch.equal(load_network(folder).model(x), model(x))
    source = tmp_path / "net.py"
    entries = files.open_student(folder)
    assert (entries["architecture"], entries["num_classes"]) == (own, 10)
    assert entries["source_file"] == {"path": str(source), "sha256": files.file_sha256(source), "function": "tiny"}
    source.write_text(f"{OWN}\n")
    changed = error_of(folder, load=files.load_student)
    source.unlink()
    assert error_of(folder, load=files.load_student) == changed
    assert "needs net.py with the function tiny and SHA-256 " in changed
    assert f"{source} is missing or has been changed since. Restore it, or put a copy at {folder / 'net.py'}" in changed
    (folder / "net.py").write_text(OWN)
    with torch.no_grad():
        assert torch.equal(files.load_student(folder)(x), model(x))


class Runs:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def bad_files(small, content):
    """name -> bytes, and a word of the message; further ones are among the faults."""
    state = half(small)
    key = "linear.weight"

    def packed(value):
        path = Path("packed.pt")
        torch.save(value, path)
        return path.read_bytes()

    return {
        "html": (b"<!DOCTYPE html><html>Quota exceeded</html>", "HTML"),
        "half": (content[: len(content) // 2], "truncated or damaged"),
        "code": (pickle.dumps(Runs()), "not loaded"),
        "code in torch's format": (packed({"state_dict": Runs()}), "not loaded"),
        "no tensors": (packed({"epoch": 3}), "no state dict"),
        "missing": (packed({k: v for k, v in state.items() if k != key}), f"1 missing ({key})"),
        "unexpected": (packed({**state, "extra.weight": torch.zeros(1)}), "1 unexpected (extra.weight)"),
        "10 classes": (packed({**state, key: torch.zeros(10, 512)}), f"1 of another shape ({key})"),
        "not finite": (packed({**state, key: state[key] * float("nan")}), "not finite"),
    }


def test_bad_files_are_an_error_and_left_alone(small, small_bytes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "models" / "cifar100" / "Linf" / f"{SMALL}.pt"
    target.parent.mkdir(parents=True)
    for name, (content, word) in bad_files(small, small_bytes).items():
        for path, where in ((target, {}), (tmp_path / "by hand.pt", {"teacher_path": tmp_path / "by hand.pt"})):
            path.write_bytes(content)
            message = error_of(SMALL, **where)
            assert word in message, name
            assert str(path) in message or f"models/cifar100/Linf/{SMALL}.pt" in message
            # What to download, from where, and where to put it.
            assert "https://drive.google.com/file/d/1-2hnxC7lZOQDqQbum4yPbtRtTND86I5N/view" in message
            assert message.endswith("or pass it with --teacher_path")
            assert path.read_bytes() == content, name
    assert not (tmp_path / "code_was_run").exists()


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine in Google Drive's place."""
    with served() as server:
        monkeypatch.setattr(zoo, "DOWNLOAD_URL", f"http://127.0.0.1:{server.server_port}/file?id={{}}")
        monkeypatch.setenv("no_proxy", "*")
        yield server


def test_download(server, small, small_bytes, tmp_path, capsys, x):
    server.answer = lambda handler: handler.reply(small_bytes)
    target = tmp_path / "models" / "cifar100" / "Linf" / f"{SMALL}.pt"
    teacher = load_teacher(SMALL, model_dir=tmp_path / "models")
    with torch.no_grad():
        assert torch.equal(teacher(x), small(x))
    assert os.listdir(target.parent) == [target.name]
    assert target.read_bytes() == small_bytes
    printed = capsys.readouterr().out
    assert all(word in printed for word in (SMALL, f"127.0.0.1:{server.server_port}", str(target)))

    load_teacher(SMALL, model_dir=tmp_path / "models")
    assert len(server.requests) == 1
    assert capsys.readouterr().out == ""


# torch.hub leaves the socket of a failed download to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_failed_downloads_leave_nothing_and_say_what_to_do(server, small_bytes, tmp_path):
    """Every way in which a connection fails is tested with the data sets."""
    target = tmp_path / "models" / "cifar100" / "Linf" / f"{SMALL}.pt"
    answers = {
        "HTML page": lambda handler: handler.reply(b"<html>virus scan</html>"),
        "truncated": lambda handler: handler.reply(small_bytes[: len(small_bytes) // 2]),
        "404": lambda handler: handler.send_error(404),
        "not loaded": lambda handler: handler.reply(pickle.dumps(Runs())),
        "File too large": lambda handler: handler.reply(small_bytes),
    }
    for word, server.answer in answers.items():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (len(small_bytes) - 1, limits[1])
        )  # a disk that is full one byte too soon
        try:
            message = error_of(SMALL, model_dir=tmp_path / "models")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert word in message
        assert "/view and save it as" in message
        assert str(target) in message
        assert ".part" not in message
        assert list(target.parent.iterdir()) == []
    assert len(server.requests) == len(answers)
    assert not Path("code_was_run").exists()
    gc.collect()  # within the filter of warnings


def test_model_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "models").write_text("a file")
    assert "Not a directory" in error_of(SMALL, model_dir=tmp_path / "models")


def test_evaluate_prints_the_published_accuracy(originals, model_dir, tmp_path, monkeypatch, capsys):
    x = torch.randint(256, (11, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = originals["BDM"](x / 255).argmax(dim=1)
    y[:3] += 1
    monkeypatch.setattr(data, "load_data", lambda *args, **kwargs: data.Data("", x, y, x, y, 100, 4, True, ""))
    monkeypatch.chdir(tmp_path)
    weights = model_dir / "cifar100/Linf/Wang2023Better_WRN-28-10.pt"
    flags = ["--weights", str(weights), "--attacks", "clean", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "BDM", *flags])
    evaluate.main()
    printed = capsys.readouterr().out
    assert "72.73 %" in printed  # 8 of 11
    assert "published by RobustBench: clean 72.58 %, AutoAttack 38.83 % (" in printed


def run(program, *, path=None):
    """Run a program in a fresh interpreter in which every warning is an error."""
    extra = {"PYTHONPATH": os.pathsep.join(map(str, [*([path] if path else []), ROOT])), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, **extra}, capture_output=True, text=True, timeout=HANGS, check=False, cwd=path or ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_imports_are_quiet_and_checking_a_name_is_cheap(tmp_path):
    program = """
import sys
from experiment.teachers import check_teacher_name
check_teacher_name("BDM")
heavy = {"robustbench", "torchvision", "autoattack", "pyautoattack", "timm", "requests"} & set(sys.modules)
assert not heavy, heavy
from experiment import compat
attack = compat.import_autoattack()
zoo = compat.linf_models(compat.import_robustbench(), "cifar100")
assert len(zoo) > 30
import autoattack, torchvision.datasets
assert autoattack.AutoAttack is attack
"""
    (tmp_path / "autoattack").mkdir()  # a stray folder in the working directory is not the package
    assert run(program, path=tmp_path) == ""


def test_old_robustbench_of_torchattacks_is_named(tmp_path):
    package = tmp_path / "robustbench" / "model_zoo"
    package.mkdir(parents=True)
    (tmp_path / "robustbench" / "__init__.py").write_text("from . import model_zoo")
    (package / "__init__.py").write_text(
        "from . import enums\nD, T = enums.BenchmarkDataset, enums.ThreatModel\n"
        "model_dicts = {D.cifar_100: {T.Linf: {'Chen2021LTD_WRN34_10': {}}}}"
    )
    (package / "enums.py").write_text(
        "from enum import Enum\nclass BenchmarkDataset(Enum):\n    cifar_100 = 'cifar100'\n"
        "class ThreatModel(Enum):\n    Linf = 'Linf'\n"
    )
    printed = run(
        "from experiment import UserError\nfrom experiment.teachers import load_teacher\n"
        "try: load_teacher('BDM')\nexcept UserError as error: print(error)",
        path=tmp_path,
    )
    assert "Wang2023Better_WRN-28-10" in printed
    assert "pip install --force-reinstall --no-deps robustbench==1.1.1" in printed


def test_working_or_otherwise_broken_torchvision_is_not_touched(tmp_path):
    # A torchvision whose operators do load would abort the process at a second definition.
    (tmp_path / "torchvision").mkdir()
    file = tmp_path / "torchvision" / "__init__.py"
    program = "from experiment import *\nfrom experiment.compat import *\nimport torch\n"
    file.write_text("loaded = True")
    run(program + "assert import_torchvision().loaded and not hasattr(torch.ops.torchvision, 'nms')", path=tmp_path)
    file.write_text("raise RuntimeError('another fault')")
    printed = run(program + "try: import_torchvision()\nexcept UserError as error: print(error)", path=tmp_path)
    assert "another fault" in printed
    assert "pip install" in printed


def test_an_unfinished_runs_checkpoint_is_no_teacher(tmp_path):
    state = {"optimizer": {}, "model": build_model("RES-8", 10).state_dict(), "architecture": "RES-8"}
    files.save(tmp_path / "last.pt", state)
    with pytest.raises(UserError, match="is a run's resume file, not a student; give the run's folder"):
        load_teacher(str(tmp_path / "last.pt"), 10)
