"""Two processes with gloo against one: the same first update, the same run folder, a resume with another number."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import fault_ranks
import pytest
import torch
from limits import HANGS
from torch import nn

import adaad_IGDM_cifar100 as script
from experiment import data, files, optim
from experiment.cli import parse_args
from experiment.engine import Engine

ROOT = Path(__file__).parent.parent


def plain_network(seed):
    """Without BatchNorm, whose batch statistics are each rank's own (Fidelity note 9)."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(72, 10))


def first_updates(target, steps=2):
    """Some training steps on digits as main() makes them, on this process' share of each batch; saves the weights."""
    args = parse_args(script.__file__, script.RECIPE, ["--batch", "25", "--steps", "2", "--device", "cpu"])
    images = data.load_data("digits")
    student, teacher = plain_network(1), plain_network(2).requires_grad_(False).eval()
    machine = Engine(args)
    optimizer = optim.sgd(student, args)
    machine.distribute(student, optimizer)
    student_fast, teacher_fast = machine.accelerate(student), machine.accelerate(teacher)
    stream = images.batches(25, 0, 1, 0, machine.rank, machine.world)
    for x, y, first, total in itertools.islice(stream, steps):
        machine.begin_batch(first, len(x), total)
        with machine.step():
            terms = script.training_loss(student_fast, teacher_fast, x, y, 1, args)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    torch.save(student.state_dict(), f"{target}.{machine.rank}")


def launch(count, *command, status=0):
    """Run a command in `count` processes with torch.distributed's own environment; return what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment["OMP_NUM_THREADS"] = "1"
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=HANGS)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output
    return outputs


def test_two_ranks_make_the_update_of_one(tmp_path, monkeypatch):
    """Uneven shares (12 and 13 of 25). Tolerance: float32 sums of 25 terms in another order, over two steps."""
    monkeypatch.chdir(ROOT)
    first_updates(tmp_path / "one")
    code = "import sys; sys.path.insert(0, 'tests'); import test_ranks; "
    code += f"test_ranks.first_updates({str(tmp_path / 'two')!r})"
    launch(2, "-c", code)
    one, rank_0, rank_1 = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    start = plain_network(1).state_dict()
    for name, weight in one.items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(rank_0[name], weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(rank_0[name], rank_1[name])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from cifar100_models import build_model

    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(0)
    files.save_student(path, build_model("RES-8", 10), "RES-8", 10, {})
    return path


def flags_of(teacher, folder, name, **changes):
    """The flags of a small run."""
    flags = {"dataset": "digits", "teacher": teacher, "student": "RES-8", "batch": 256, "steps": 1, "epochs": 2}
    flags |= {"epsilon": 0.5, "aa_examples": 4, "aa_batch": 2, "run_dir": folder, "run_name": name, "device": "cpu"}
    return [str(part) for name, value in {**flags, **changes}.items() for part in (f"--{name}", value)]


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, teacher):
    """Two processes train an epoch and are stopped there; one process resumes and finishes with AutoAttack."""
    command = ["adaad_IGDM_cifar100.py", *flags_of(teacher, tmp_path, "r")]
    stop = "import experiment.run as r; r.Run.end_epoch_ = r.Run.end_epoch\n"
    stop += "def once(self, accuracies):\n    self.end_epoch_(accuracies)\n    raise SystemExit(0)\n"
    stop += "r.Run.end_epoch = once\n"
    stop += f"import sys, runpy; sys.argv = {command!r}; sys.path.insert(0, '.')\n"
    stop += "runpy.run_path('adaad_IGDM_cifar100.py', run_name='__main__')"
    launch(2, "-c", stop)
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "r" / "result.json").exists()
    (output,) = launch(1, *command)
    assert "resumed" in output
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["autoattack"]["examples"] == 4
    # What the bits depend on is recorded: with how many processes it began, and that they changed.
    assert json.loads((tmp_path / "r" / "config.json").read_text())["processes"] == 2
    assert "number of processes" in result["changed"]


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    """The folder of a run that two processes finished, and its command as a function of --run_dir."""
    home = tmp_path_factory.mktemp("finished")

    def command(folder):
        return ["rslad_cifar100.py", *flags_of(teacher, folder, "r", epochs=1, epsilon=0.3)]

    launch(2, *command(home))
    return home / "r", command


def test_two_ranks_finish_a_run(finished):
    """PGD-20 and AutoAttack over both ranks give what one process gives for the same student."""
    folder, _ = finished
    result = json.loads((folder / "result.json").read_text())
    from experiment import evaluation

    student = files.load_student(folder)
    images = data.load_data("digits")
    assert result["clean"] == evaluation.accuracy(student, images.x_test, images.y_test)
    assert result["student_sha256"] == files.state_sha256(student)
    assert len(list((folder / "autoattack").glob("chunk-*.json"))) == 2


def test_a_signal_to_one_rank_stops_all(small):
    """After the same step, which is saved. The run is too long to finish before the signal."""
    flags = [*fault_ranks.FLAGS, "--epochs", "200", "--checkpoint_minutes", "1440", "--run_name", "ranks"]
    assert fault_ranks.stop(flags, small.home, small.home / "runs" / "ranks", "SIGTERM", "to rank 1 only", 1)


def test_what_one_rank_refuses_all_refuse(tmp_path, finished):
    """A last.pt of another run: only rank 0 used to know the run's id, and the others went on with it."""
    whole, command = finished
    folder = tmp_path / "r"
    shutil.copytree(whole, folder)
    content = torch.load(folder / "last.pt", weights_only=True)
    torch.save({**content, "id": "0123456789ab"}, folder / "last.pt")
    for name in ("previous.pt", "result.json"):
        (folder / name).unlink()
    for output in launch(2, *command(tmp_path), status=2):
        assert "last.pt does not fit this run: it belongs to a run with id '0123456789ab'" in output
