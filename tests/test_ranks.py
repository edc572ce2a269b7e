"""Two processes with gloo against one: the same first update, the same run folder, a resume with another number."""

import itertools
import json
import shutil

import fault_ranks
import pytest
import torch
from fault_server import SMALL
from torch import nn

import adaad_IGDM_cifar100 as script
from experiment import data, evaluation, files, optim
from experiment.cli import parse_args
from experiment.engine import Engine


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


def test_two_ranks_make_the_update_of_one(small, tmp_path):
    """Uneven shares (12 and 13 of 25). Tolerance: float32 sums of 25 terms in another order, over two steps."""
    (tmp_path / "update.py").write_text("import sys, test_ranks\ntest_ranks.first_updates(sys.argv[1])")
    for ranks in (1, 2):
        small.server.run(tmp_path / "update", [tmp_path / f"of{ranks}"], tmp_path, ranks=ranks).expect(0)
    one, rank_0, rank_1 = (torch.load(tmp_path / name) for name in ("of1.0", "of2.0", "of2.1"))
    start = plain_network(1).state_dict()
    for name, weight in one.items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(rank_0[name], weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(rank_0[name], rank_1[name])


def test_a_run_resumes_with_another_number_of_ranks(small):
    """Two processes are stopped in the second epoch; one process resumes and finishes with AutoAttack."""
    flags, folder = [*SMALL, "--run_name", "fewer ranks"], small.home / "runs" / "fewer ranks"
    stopped = small.server.run("adaad_IGDM_cifar100", flags, small.home, faults=[("step", 9, "SIGTERM")], ranks=2)
    assert stopped.status == 75, stopped.err
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert "resumed" in small.server.run("adaad_IGDM_cifar100", flags, small.home).expect(0).out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    result = json.loads((folder / "result.json").read_text())
    assert result["autoattack"]["examples"] == 12
    # What the bits depend on is recorded: with how many processes it began, and that they changed.
    assert json.loads((folder / "config.json").read_text())["processes"] == 2
    assert "number of processes" in result["changed"]


@pytest.fixture(scope="module")
def finished(small):
    """The folder of a run that two processes finished."""
    small.server.run("rslad_cifar100", [*SMALL, "--run_name", "two ranks"], small.home, ranks=2).expect(0)
    return small.home / "runs" / "two ranks"


def test_two_ranks_finish_a_run(finished):
    """PGD-20 and AutoAttack over both ranks give what one process gives for the same student."""
    result = json.loads((finished / "result.json").read_text())
    student = files.load_student(finished)
    images = data.load_data("digits")
    assert result["clean"] == evaluation.accuracy(student, images.x_test, images.y_test)
    assert result["student_sha256"] == files.state_sha256(student)
    assert len(list((finished / "autoattack").glob("chunk-*.json"))) == 3


def test_a_signal_to_one_rank_stops_all(small):
    """After the same step, which is saved. The run is too long to finish before the signal."""
    flags = [*fault_ranks.FLAGS, "--epochs", "2000", "--checkpoint_minutes", "1440", "--run_name", "ranks"]
    assert fault_ranks.stop(flags, small.home, small.home / "runs" / "ranks", "SIGTERM", "to rank 1 only", 1)


def test_an_error_on_one_rank_ends_all(small, finished, tmp_path):
    """A last.pt of another run: only rank 0 used to know the run's id, and the others went on with it."""
    folder = shutil.copytree(finished, tmp_path / finished.name)
    content = torch.load(folder / "last.pt", weights_only=True)
    torch.save({**content, "id": "0123456789ab"}, folder / "last.pt")
    for name in ("previous.pt", "result.json"):
        (folder / name).unlink()
    flags = [*SMALL, "--run_dir", tmp_path, "--run_name", finished.name]
    outcome = small.server.run("rslad_cifar100", flags, small.home, ranks=2)
    assert outcome.status == 2
    assert outcome.err.count("last.pt does not fit this run: it belongs to a run with id '0123456789ab'") == 2
