"""AutoAttack: the package's own result, chunks that resume, ranks that share them, and faults."""

import json

import pytest
import torch
from evaluation_cases import EPSILON, Masked, SmallMemory, labelled, replace_run, tiny_network, without_seconds
from torch import nn

import attacks
from experiment import UserError, compat, evaluation, files


@pytest.mark.parametrize(("build", "breaking"), [(tiny_network, "apgd-ce apgd-t fab-t"), (Masked, "apgd-t square")])
def test_one_attack_at_a_time_is_the_standard_run_bit_for_bit(quick_autoattack, build, breaking):
    network = build()
    x, y = labelled(network, 60, 5)
    result = evaluation.autoattack(network, x, y, 0.01, seed=7)
    left, broke = result["clean"], []
    for attack, robust in result["attacks"].items():
        broke += [attack] if robust < left else []
        left = robust
    assert " ".join(broke) == breaking, "the comparison needs images that fall to different attacks"
    assert result["accuracy"] == left > 0

    rows = {image.numpy().tobytes(): i for i, image in enumerate(x / 255)}
    assembled = x / 255
    for _, images, x_adv, _ in quick_autoattack:
        assembled[[rows[image.numpy().tobytes()] for image in images]] = x_adv
    adversary = compat.import_autoattack()(network, norm="Linf", eps=0.01, seed=7, version="standard")
    with attacks.frozen(network):
        x_adv, y_adv = adversary.run_standard_evaluation(x / 255, y, batch_size=250)
    assert torch.equal(assembled, x_adv)
    assert result["accuracy"] == (y_adv == y).double().mean().item()


class Rounding(nn.Module):
    """Answers as its network does, but for one image that it takes for another class in all but whole batches."""

    def __init__(self, image, whole):
        super().__init__()
        self.network, self.image, self.whole = tiny_network(), image, whole

    def forward(self, x):
        logits = self.network(x)
        if len(x) != self.whole:
            here = (x == self.image).flatten(1).all(dim=1)
            logits = torch.where(here[:, None], logits.roll(1, dims=1), logits)
        return logits


def test_an_image_that_falls_by_the_size_of_the_batch_has_fallen(quick_autoattack):
    """As on a GPU, where few images go through other kernels than many: no reason to distrust the rest."""
    plain = tiny_network()
    x, y = labelled(plain, 30, 5)
    expected = evaluation.autoattack(plain, x, y, 0.01)
    first = expected["flags"]["square"].index("1")
    result = evaluation.autoattack(Rounding(x[first] / 255, 30), x, y, 0.01)
    assert result["flags"]["clean"] == expected["flags"]["clean"]
    assert result["flags"]["apgd-ce"][first] == "0"
    alone = evaluation.autoattack(Rounding(x[0] / 255, 1), x[:1].repeat(2, 1, 1, 1), y[:1].repeat(2), 0.01)
    assert alone["accuracy"] == 0, "none is left to attack"


def test_the_result_says_what_was_measured(quick_autoattack, capsys):
    network = tiny_network()
    x, y = labelled(network, 10, 2)
    result = evaluation.autoattack(network, x, y, EPSILON, batch=4, seed=7)
    assert result["clean"] == 0.8
    assert result["student_sha256"] == files.state_sha256(network)
    assert (result["examples"], result["batch"], result["seed"], result["epsilon"]) == (10, 4, 7, EPSILON)
    assert (result["version"], result["package"]) == ("standard", "pyautoattack 0.2.0")
    assert list(result["attacks"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(result["flags"]) == ["clean", *result["attacks"]]
    assert result["flags"]["clean"] == "1111111100"
    for name, share in result["attacks"].items():
        assert result["flags"][name].count("1") / 10 == share
    assert result["interval"] == [*evaluation.wilson_interval(round(10 * result["accuracy"]), 10)]
    assert result["seconds"] == pytest.approx(sum(result["attack_seconds"].values()))
    assert json.loads(json.dumps(result)) == result
    printed = capsys.readouterr().err
    assert "seed 7" in printed
    assert "10 of 10 images" in printed


def test_resume_attacks_nothing_twice_and_ends_the_same(quick_autoattack, tmp_path, monkeypatch):
    network = tiny_network()
    x, y = labelled(network, 11, 1)

    def run(folder):
        return evaluation.autoattack(network, x, y, 0.002, folder=folder, batch=3)

    def seen():
        images = {image.numpy().tobytes() for _, images, *_ in quick_autoattack for image in images}
        quick_autoattack.clear()
        return images

    whole = run(tmp_path / "whole")
    everything = seen()
    with monkeypatch.context() as patch:

        def stop_in_third_chunk(attack, images, labels, real):
            if attack == "apgd-t" and (images == x[6] / 255).flatten(1).all(dim=1).any():
                raise ZeroDivisionError
            return real()

        replace_run(patch, stop_in_third_chunk)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "cut")
    before = seen()
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == ["chunk-00000.json", "chunk-00001.json"]
    resumed = run(tmp_path / "cut")
    after = seen()
    assert without_seconds(resumed) == without_seconds(whole)
    assert before | after == everything
    # Only the chunk that was cut is seen again.
    assert before & after <= {image.numpy().tobytes() for image in x[6:9] / 255}

    again = run(tmp_path / "cut")
    assert again == resumed  # seconds too: they are those of the attacks, not of the reading
    assert not seen()
    (tmp_path / "cut" / "chunk-00001.json").unlink()
    assert without_seconds(run(tmp_path / "cut")) == without_seconds(whole)
    assert seen() <= {image.numpy().tobytes() for image in x[3:6] / 255}


@pytest.mark.parametrize(
    ("classes", "version", "attacks_run"),
    [
        (10, "standard", "apgd-ce apgd-t fab-t square"),
        (7, "AutoAttack, 6 targets (not standard)", "apgd-ce apgd-t fab-t square"),
        (4, "AutoAttack, 3 targets (not standard)", "apgd-ce apgd-t fab-t square"),
        (3, "APGD-CE, FAB, Square (not standard)", "apgd-ce fab-t square"),
        (2, "APGD-CE, FAB, Square (not standard)", "apgd-ce fab-t square"),
    ],
)
def test_fewer_classes_have_fewer_targets_and_another_name(
    quick_autoattack, monkeypatch, tmp_path, classes, version, attacks_run
):
    """No attack tries a class that does not exist, and a chunk file of one version is not read for another."""
    network = tiny_network(classes=classes)
    x, y = labelled(network, 12, 0)
    targets = []

    def look(attack, images, labels, real):
        found = real()
        targets.append((real.adversary.apgd_targeted.n_target_classes, real.adversary.fab.n_target_classes))
        return found

    replace_run(monkeypatch, look)
    result = evaluation.autoattack(network, x, y, 0.3, folder=tmp_path)
    assert (result["version"], " ".join(result["attacks"])) == (version, attacks_run)
    assert set(targets) == {(min(9, classes - 1),) * 2}
    assert result["accuracy"] < result["clean"]
    assert files.read_json(tmp_path / "chunk-00000.json")["parts"]["version"] == version


def test_results_of_different_runs_are_not_mixed(quick_autoattack, tmp_path):
    network, other = tiny_network(), tiny_network()
    other[3].bias.data[0] += 1e-3
    x, y = labelled(network, 6, 1)
    y_other, x_other = y.clone(), x.clone()
    y_other[5] = (y[5] + 1) % 10
    x_other[4, 0, 0, 0] ^= 1
    standard = {"model": network, "x": x, "y": y, "epsilon": EPSILON, "seed": 0, "batch": 3, "folder": tmp_path}

    def run(**changed):
        return evaluation.autoattack(**{**standard, **changed})

    expected = run()
    chunks = {path: path.read_bytes() for path in tmp_path.iterdir()}
    quick_autoattack.clear()
    for changed, named in [
        ({"model": other}, "student"),
        ({"epsilon": 0.04}, "epsilon"),
        ({"seed": 1}, "seed"),
        ({"y": y_other}, "data"),
        ({"x": x_other}, "data"),
        ({"batch": 6}, "chunk size and data"),
    ]:
        with pytest.raises(UserError, match=f"of another {named}; results are not mixed"):
            run(**changed)
    assert not quick_autoattack
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == chunks
    assert run(x=x / 255) == expected  # the same images as floats are the same data

    path = tmp_path / "chunk-00001.json"
    for damaged in (chunks[path][:-20], b"[1]", b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"chunk-00001\.json is damaged .* Delete it to attack its images again"):
            run()
        assert path.read_bytes() == damaged


TWO_RANKS = """
import os, pytest, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from evaluation_cases import EPSILON, labelled, quicken, tiny_network
from experiment import evaluation
dist.init_process_group("gloo")
quicken(pytest.MonkeyPatch())
network, rank = tiny_network(), dist.get_rank()
x, y = labelled(network, 11, 1)
found = [evaluation.pgd_accuracy(network, x, y, EPSILON, steps=3, batch=4)]
found.append(evaluation.accuracy(network, x, y))  # one batch: the second rank has none
result = evaluation.autoattack(network, x, y, EPSILON, folder=Path("chunks"), batch=3)
found.append({name: value for name, value in result.items() if "seconds" not in name})
Path(f"found{rank}").write_text(repr(found))

# A rank that has finished waits longer than the group's timeout.
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
def answer(model, x, y, *_):
    time.sleep(5 * rank)
    return {"images": len(x), "flags": dict.fromkeys(("clean", *evaluation.AUTOATTACK), str(rank)),
            "seconds": dict.fromkeys(evaluation.AUTOATTACK, 1.0), "warnings": []}
sys.modules["experiment.evaluation.autoattack"]._attack_chunk = answer
Path(f"slow{rank}").write_text(evaluation.autoattack(network, x[:2], y[:2], 0.1, batch=1)["flags"]["square"])
dist.destroy_process_group()
"""


def test_two_ranks_share_the_work_and_agree_with_one(quick_autoattack, small, tmp_path):
    network = tiny_network()
    x, y = labelled(network, 11, 1)
    expected = [evaluation.pgd_accuracy(network, x, y, EPSILON, steps=3, batch=4), evaluation.accuracy(network, x, y)]
    expected.append(without_seconds(evaluation.autoattack(network, x, y, EPSILON, batch=3)))
    (tmp_path / "rank.py").write_text(TWO_RANKS)
    outcome = small.server.run(tmp_path / "rank", [], tmp_path, ranks=2).expect(0)
    assert [(tmp_path / f"found{rank}").read_text() for rank in range(2)] == [repr(expected)] * 2
    assert "AutoAttack: 6 of 11 images" in outcome.err  # those of rank 0
    assert "5 of 11 images" not in outcome.err
    assert len(list((tmp_path / "chunks").iterdir())) == 4
    assert [(tmp_path / f"slow{rank}").read_text() for rank in range(2)] == ["01"] * 2


# Faults


def test_an_answer_that_does_not_hold_is_an_error(quick_autoattack, monkeypatch):
    network = tiny_network()
    x, y = labelled(network, 6, 1)
    x[0] = 0  # black pixels, to leave [0, 1] inside the ball

    y[0] = network(torch.zeros(1, 3, 8, 8)).argmax()
    for answer, said in [
        (lambda x, y: (x, (y + 1) % 10), "differs from AutoAttack's on 5 of 5 images"),
        (lambda x, y: ((x + EPSILON + 3e-6 * x.lt(0.5)).clamp(0, 1), y), "left the ball"),
        (lambda x, y: (x - 1e-4, y), r"left \[0, 1\]"),
        (lambda x, y: (x * float("nan"), y), "left the ball"),
    ]:
        with monkeypatch.context() as patch:
            replace_run(patch, lambda attack, x, y, real, answer=answer: answer(x, y))
            with pytest.raises(RuntimeError, match=said):
                evaluation.autoattack(network, x, y, EPSILON)


def test_autoattack_does_not_depend_on_the_memory(quick_autoattack, monkeypatch, tmp_path, capsys):
    """Out of memory, the network sees fewer images at once; the attack's batch, hence its random numbers, stay."""
    torch.manual_seed(0)
    network = tiny_network()
    x, y = labelled(network, 12, 0)
    roomy, tight = SmallMemory(network, 12), SmallMemory(network, 3)
    expected = evaluation.autoattack(roomy, x, y, 0.03)
    in_one_go = list(quick_autoattack)
    quick_autoattack.clear()
    capsys.readouterr()
    found = evaluation.autoattack(tight, x, y, 0.03, folder=tmp_path)
    assert found["attacks"] == expected["attacks"]
    assert 0 < found["accuracy"] < 1
    # The package was given the same images in the same batches: each attack, those that the ones before left.
    assert len(quick_autoattack) == len(in_one_go)
    for (name, given, _, batch), (its_name, its_given, _, its_batch) in zip(quick_autoattack, in_one_go, strict=True):
        assert (name, batch) == (its_name, its_batch)
        assert torch.equal(given, its_given)
    assert [size for size in tight.sizes if size > 3] == [12, 6]
    said = capsys.readouterr().err
    assert "out of memory; again with 6 images at once" in said
    assert "out of memory; again with 3 images at once" in said
    assert found["warnings"] == expected["warnings"]

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    replace_run(monkeypatch, no_room)
    with pytest.raises(UserError, match="even with single images"):
        evaluation.autoattack(network, x, y, 0.03)


def test_autoattack_runs_under_its_own_switches(quick_autoattack, monkeypatch):
    """Deterministic where torch can, no tuning of kernels for sizes that come once; restored after a fault, too."""

    def switches():
        return (
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    seen = []

    def look(attack, images, labels, real):
        seen.append(switches())
        if attack == "fab-t":
            raise ZeroDivisionError
        return real()

    network = tiny_network()
    x, y = labelled(network, 4, 0)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True)
    try:
        with monkeypatch.context() as patch:
            replace_run(patch, look)
            with pytest.raises(ZeroDivisionError):
                evaluation.autoattack(network, x, y, 1e-4)
        assert switches() == (True, True, False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(False, True, True)] * 3


def test_signs_of_gradient_masking_are_reported(quick_autoattack, monkeypatch, capsys):
    network = tiny_network()
    x, y = labelled(network, 12, 0)

    result = evaluation.autoattack(Masked(), *labelled(Masked()), EPSILON)
    assert any("zero gradient" in warning for warning in result["warnings"])

    def blind_white_box(attack, images, labels, real):
        return real() if attack == "square" else (images, labels)

    with monkeypatch.context() as patch:
        replace_run(patch, blind_white_box)
        masked = evaluation.autoattack(network, x, y, 0.1)
    assert masked["attacks"]["fab-t"] == 1
    assert masked["accuracy"] < 0.9
    assert any(warning.startswith("Square") for warning in masked["warnings"])
    assert "warning: AutoAttack: Square" in capsys.readouterr().err
    honest = evaluation.autoattack(network, x, y, 0.1)
    assert not any(warning.startswith("Square") for warning in honest["warnings"])


@pytest.mark.parametrize("epsilon", [0.0, 8.0])
def test_an_epsilon_out_of_range_is_an_error(epsilon):
    with pytest.raises(UserError, match=f"epsilon {epsilon:g} is out of range"):
        evaluation.autoattack(tiny_network(), *labelled(tiny_network()), epsilon)
