"""Curves over epsilon: what is reused, restarts, classes; torchattacks beside ours."""

import itertools

import pytest
import torch
from evaluation_cases import EPSILON, labelled, tiny_network

import attacks
from experiment import evaluation
from experiment.evaluation import curve


@pytest.fixture
def attacked_images(monkeypatch):
    """The numbers of images that PGD was asked to attack, call by call."""
    calls, pgd = [], attacks.pgd

    def counted(model, x, *arguments):
        calls.append(len(x))
        return pgd(model, x, *arguments)

    monkeypatch.setattr(attacks, "pgd", counted)
    return calls


def test_a_curve_attacks_only_what_withstood_so_far(attacked_images):
    network = tiny_network()
    x, y = labelled(network, 60, 6)
    points, last = evaluation.accuracy_curve(network, x, y, "pgd", [0.02, 0, 0.002, 0.006], steps=5, restarts=2)
    assert [point["epsilon"] for point in points] == [0, 0.002, 0.006, 0.02]
    assert points[0]["flags"] == "1" * 54 + "0" * 6
    accuracies = [point["accuracy"] for point in points]
    assert accuracies == sorted(accuracies, reverse=True)
    assert 0 < accuracies[3] < accuracies[2] < accuracies[1] < 1
    # Attacked are those that withstood the epsilon before, and in the second restart those that withstood the first.
    for before, point in itertools.pairwise(points):
        first, second = point["attacked"]
        assert first == before["flags"].count("1")
        assert point["flags"].count("1") <= second <= first
        assert all(was >= now for was, now in zip(before["flags"], point["flags"], strict=True))
    assert attacked_images == [count for point in points[1:] for count in point["attacked"]]
    assert last.correct.tolist() == [flag == "1" for flag in points[-1]["flags"]]


def test_the_first_point_is_what_a_run_measures():
    network = tiny_network()
    x, y = labelled(network, 40, 4)
    for seed in (0, 3):
        ((point,), _) = evaluation.accuracy_curve(network, x, y, "pgd", [0.004], steps=3, seed=seed)
        assert point["accuracy"] == evaluation.pgd_accuracy(network, x, y, 0.004, steps=3, seed=seed)


def test_restarts_are_other_starts_and_an_image_counts_if_it_withstands_all():
    network = tiny_network()
    x, y = labelled(network, 200, 0)
    one, five = (
        evaluation.accuracy_curve(network, x, y, "pgd", [0.004], steps=1, restarts=restarts)[0][0]
        for restarts in (1, 5)
    )
    assert five["flags"].count("1") < one["flags"].count("1")  # one step: it hangs on the start
    assert all(a <= b for a, b in zip(five["flags"], one["flags"], strict=True))
    ((fgsm,), _) = evaluation.accuracy_curve(network, x, y, "fgsm", [0.004], restarts=5)
    assert fgsm["attacked"] == [200]  # it has no random start


def test_kept_images_are_those_with_which_an_image_fell():
    network = tiny_network()
    x, y = labelled(network, 30, 3)
    points, last = evaluation.accuracy_curve(network, x, y, "pgd", [0.003, 0.01], steps=5, restarts=2, keep=True)
    moved = (last.x_adv - x / 255).abs().flatten(1).max(dim=1).values
    fell_first = torch.tensor([flag == "0" for flag in points[0]["flags"]])
    assert (moved[fell_first] <= 0.003 + 1e-6).all()
    assert (moved <= 0.01 + 1e-6).all()
    assert torch.equal(network(last.x_adv).argmax(dim=1), last.predictions)
    assert torch.equal(last.predictions == y, last.correct)


def test_the_curve_of_autoattack_attacks_only_what_withstood(quick_autoattack, tmp_path):
    network = tiny_network()
    x, y = labelled(network, 24, 3)
    points = evaluation.autoattack_curve(network, x, y, [0, 0.002, 0.01], folder=tmp_path)
    assert points[0]["accuracy"] == 21 / 24
    assert [point["attacked"] for point in points[1:]] == [[21], [points[1]["flags"].count("1")]]
    single = evaluation.autoattack(network, x[:21], y[:21], 0.002, show_progress=False)
    assert points[1]["flags"] == single["flags"]["square"] + "000"
    quick_autoattack.clear()
    again = evaluation.autoattack_curve(network, x, y, [0, 0.002, 0.01], folder=tmp_path)
    assert [point["flags"] for point in again] == [point["flags"] for point in points]
    assert not quick_autoattack  # read from its chunks


def test_chunks_of_other_arithmetic_are_others(monkeypatch):
    """With TF32 or without, or begun on a CPU: the record says which, so none may be made of another's chunks."""
    network = tiny_network()
    x, y = labelled(network)
    names = set()
    for device, tf32 in (("cpu", True), ("cuda", True), ("cuda", False)):
        monkeypatch.setattr("experiment.evaluation.curve.device_of", lambda *_, kind=device: torch.device(kind))
        monkeypatch.setattr("torch.backends.cudnn.allow_tf32", tf32)
        names.add(curve._chunks_name(network, x, y, EPSILON, 250, 0))
    assert len(names) == 3


def test_accuracy_by_class_is_worst_first():
    rows = evaluation.per_class("110100", torch.tensor([2, 2, 0, 0, 1, 1]), ["cat", "dog", "emu"])
    assert [(row["class"], row["accuracy"], row["examples"]) for row in rows] == [
        ("dog", 0, 2),
        ("cat", 0.5, 2),
        ("emu", 1, 2),
    ]
    assert rows[0]["interval"] == [*evaluation.wilson_interval(0, 2)]


def test_torchattacks_agrees_with_ours():
    network = tiny_network()
    x, y = labelled(network, 60, 6)
    fgsm, pgd = evaluation.beside_torchattacks(network, x, y, 0.004, steps=3)
    assert (fgsm["attack"], pgd["attack"], pgd["steps"]) == ("fgsm", "pgd", 3)
    assert 0 < pgd["ours"] < 1
    ((point,), _) = evaluation.accuracy_curve(network, x, y, "fgsm", [0.004])
    assert fgsm["ours"] == fgsm["torchattacks"] == point["accuracy"]
    assert pgd["ours"] == evaluation.pgd_accuracy(network, x, y, 0.004, steps=3)
    assert not pgd["beyond_noise"]


def test_a_difference_beyond_noise_is_said(monkeypatch):
    """An attack of ours that does nothing: torchattacks' breaks what it leaves."""
    network = tiny_network()
    x, y = labelled(network, 60, 0)
    monkeypatch.setattr(attacks, "pgd", lambda model, x, *_: x)
    _, pgd = evaluation.beside_torchattacks(network, x, y, EPSILON)
    assert pgd["ours"] == 1
    assert pgd["beyond_noise"]
    assert pgd["only_theirs"] == round(60 * (1 - pgd["torchattacks"])) > 5
