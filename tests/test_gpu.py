"""What only a CUDA device can show: python -m pytest -m gpu. Skipped where there is none.

Needs nothing but torch, numpy, tqdm and scikit-learn, so that it runs on a bare GPU machine. GPU_TESTS_DEVICE=cpu runs
what a CPU can run of it there: a rehearsal of the file itself.
"""

import copy
import functools
import json
import os
import subprocess
import sys

import pytest
import reference
import torch
from fault_server import HANGS, ROOT
from reference import CLASSES, SCRIPTS, product_run, reference_run, settings

import attacks
from cifar100_models import build_model
from experiment import files
from experiment.engine.accelerated import GraphedStep

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="a CPU has no such thing")


engine = functools.partial(reference.engine, device=DEVICE)


def on(device, networks, batches):
    """Copies of networks and batches on a device."""
    moved = [copy.deepcopy(network).to(device) for network in networks]
    return *moved, [(x.to(device), y.to(device)) for x, y in batches]


@pytest.mark.parametrize("method", SCRIPTS)
def test_float64_steps_equal_the_reference(method, networks, batches):
    """Both on the device in float64, one random stream: rounding alone, as on the CPU."""
    args = settings(method, "--device", DEVICE)
    machine = engine()
    student, teacher, data = on(DEVICE, networks, batches)
    expected = copy.deepcopy(student)
    torch.manual_seed(5)
    reference_run(method, expected, teacher, data, args)
    torch.manual_seed(5)
    product_run(method, student, teacher, data, args, wrap=machine.accelerate, around=machine.step)
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@needs_cuda
def test_float64_steps_of_a_cuda_graph_equal_the_reference(networks, batches):
    """Captured, the attack's steps are the same, and follow the student's weights from step to step."""
    args = settings("adaad_IGDM", "--device", DEVICE)
    machine = engine()
    student, teacher, data = on(DEVICE, networks, batches)
    expected, graphs = copy.deepcopy(student), []

    def wrap(model):
        fast = machine.accelerate(model)
        machine._attack_step = GraphedStep(machine._fast, 6)
        graphs[:] = [machine._attack_step]
        return fast

    torch.manual_seed(5)
    reference_run("adaad_IGDM", expected, teacher, data, args)
    torch.manual_seed(5)
    product_run("adaad_IGDM", student, teacher, data, args, wrap=wrap, around=machine.step)
    assert len(graphs[0]._captured) == 1
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("tf32", marks=needs_cuda), "bf16"])
def test_losses_near_those_of_the_cpu(precision, networks):
    """fp32 differs by the order of sums; TF32 keeps 10 bits and bfloat16 7 of the 23 of a product's mantissa."""
    tolerance = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}[precision]
    x = torch.rand(6, 3, 8, 8)
    networks = [network.float() for network in networks]
    with torch.no_grad(), attacks.frozen(*networks):
        exact = [network(x) for network in networks]
    machine = engine(precision=precision)
    for network, logits in zip(networks, exact, strict=True):
        fast = machine.accelerate(copy.deepcopy(network).to(DEVICE))
        with torch.no_grad(), attacks.frozen(fast), machine.step():
            ours = fast(x.to(DEVICE)).float().cpu()
        assert (ours - logits).abs().max() < tolerance * (logits.max() - logits.min())


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # off on purpose: fp32
@pytest.mark.parametrize("name", ["RES-18", "WRN-16-4"])
def test_compiled_equals_eager(name):
    """In float32; fused kernels sum in another order. One step, since signs of near-zero gradients may then flip."""
    torch.manual_seed(0)
    student, teacher = build_model(name, CLASSES).to(DEVICE), build_model("RES-8", CLASSES).to(DEVICE).eval()
    data = [(torch.rand(6, 3, 32, 32, device=DEVICE), torch.randint(CLASSES, (6,), device=DEVICE))]
    args = settings("adaad_IGDM", "--device", DEVICE, "--steps", "1")
    losses = []
    for compiled in (0, 1):
        machine = engine(compile=compiled)
        torch.manual_seed(5)
        around = {"wrap": machine.accelerate, "around": machine.step}
        losses.append(product_run("adaad_IGDM", copy.deepcopy(student), teacher, data, args, **around))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def run(tmp_path, name, script, *flags):
    """A script through its command line on digits, without AutoAttack, whose package may be absent here."""
    command = [sys.executable, str(ROOT / script), "--dataset", "digits", "--epochs", "2", "--batch", "128"]
    command += ["--steps", "2", "--aa_examples", "0", "--run_dir", str(tmp_path), "--run_name", name, *map(str, flags)]
    command += ["--student", "RES-8"] if "--student" not in flags else []
    command += ["--device", DEVICE]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS, check=False)


def result(tmp_path, name):
    return json.loads((tmp_path / name / "result.json").read_text())


def patched(path, script, patch):
    """A file that runs a script after a patch."""
    lines = ["import os, runpy, signal, sys, torch", f"sys.path.insert(0, {str(ROOT)!r})", *patch]
    path.write_text("\n".join([*lines, f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"]))
    return path


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(0)
    files.save_student(path, build_model("RES-8", 10), "RES-8", 10, {})
    return path


@pytest.mark.parametrize("method", SCRIPTS)
def test_every_script_end_to_end(method, tmp_path, teacher_path):
    done = run(tmp_path, "r", f"{method}_cifar100.py", "--teacher", teacher_path)
    assert done.returncode == 0, done.stderr
    if DEVICE == "cuda":
        assert torch.cuda.get_device_name() in result(tmp_path, "r")["hardware"]


def test_a_deterministic_run_resumes_to_the_same_bits(tmp_path, teacher_path):
    """One run straight through; the other sends itself SIGTERM after its first epoch, and is then resumed."""
    flags, script = ["--teacher", teacher_path, "--deterministic", "1"], "adaad_IGDM_cifar100.py"
    assert run(tmp_path, "whole", script, *flags).returncode == 0
    stop = [
        "from experiment import run",
        "end_epoch = run.Run.end_epoch",
        "def stop(self, accuracies):",
        "    end_epoch(self, accuracies)",
        "    os.kill(os.getpid(), signal.SIGTERM)",
        "run.Run.end_epoch = stop",
    ]
    assert run(tmp_path, "stopped", patched(tmp_path / "stopping.py", script, stop), *flags).returncode == 75
    done = run(tmp_path, "stopped", script, *flags)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path, "whole")["student_sha256"] == result(tmp_path, "stopped")["student_sha256"]


def test_autoattack_of_a_deterministic_run(tmp_path, teacher_path):
    """FAB uses a sum for which CUDA has no deterministic algorithm."""
    pytest.importorskip("pyautoattack")
    flags = ["--teacher", teacher_path, "--deterministic", "1", "--aa_examples", "8"]
    done = run(tmp_path, "r", "adaad_cifar100.py", *flags)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path, "r")["autoattack"]["examples"] == 8


@needs_cuda
def test_out_of_memory_is_one_line(tmp_path, teacher_path):
    """The process may use 1 % of the device: a batch of a thousand for a WRN-28-10 student does not fit."""
    patch = ["torch.cuda.set_per_process_memory_fraction(0.01)"]
    script = patched(tmp_path / "small.py", "ard_cifar100.py", patch)
    done = run(tmp_path, "r", script, "--teacher", teacher_path, "--student", "WRN-28-10", "--batch", "1400")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--batch" in done.stderr
