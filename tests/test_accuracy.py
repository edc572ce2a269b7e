"""Accuracies, curves and gradient alignment: closed forms, side effects, errors, and torchattacks beside them."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from evaluation_cases import EPSILON, SmallMemory, labelled, tiny_network
from torch import nn

import attacks
from experiment import UserError, evaluation, files


def test_attacked_accuracy_of_a_linear_classifier_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3 * 8 * 8, generator=generator)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False))
    network[1].weight.data = weight
    x = 0.3 + 0.4 * torch.rand(200, 3, 8, 8, generator=generator)  # the ball stays inside [0, 1]
    y = torch.randint(2, (200,), generator=generator)
    normal = weight[y] - weight[1 - y]
    margin = (x.flatten(1) * normal).sum(dim=1)
    lost = EPSILON * normal.abs().sum(dim=1)  # all that a perturbation can take from the margin
    assert (margin - lost).abs().min() > 1e-3  # no image within rounding of the boundary
    robust = (margin > lost).double().mean().item()
    assert evaluation.accuracy(network, x, y) == (margin > 0).double().mean().item()
    assert 0 < robust < evaluation.accuracy(network, x, y)
    assert evaluation.pgd_accuracy(network, x, y, EPSILON, batch=64) == robust
    for attack in ("fgsm", "pgd", "cw"):
        points, *_ = evaluation.accuracy_curve(network, x, y, attack, [0, EPSILON])
        assert [point["accuracy"] for point in points] == [evaluation.accuracy(network, x, y), robust]
    # Eight steps of epsilon / 4 reach the corner from any start in the ball; one cannot from every start.
    assert evaluation.pgd_accuracy(network, x, y, EPSILON, steps=8) == robust
    assert evaluation.pgd_accuracy(network, x, y, EPSILON, steps=1) > robust


def test_bytes_and_floats_and_any_batch_size_give_one_accuracy():
    network = tiny_network()
    x, y = labelled(network, 50, 10)
    assert evaluation.accuracy(network, x, y) == 0.8
    assert evaluation.accuracy(network, x, y, batch=7) == evaluation.accuracy(network, x / 255, y) == 0.8


def test_random_starts_come_from_the_seed_alone():
    network = nn.Sequential(tiny_network())
    x, y = torch.full((30, 3, 8, 8), 0.5), torch.zeros(30, dtype=torch.int64)
    starts = []
    network.register_forward_pre_hook(lambda _, args: starts.append(args[0].detach().clone()))
    for seed in (3, 3, 4):
        torch.manual_seed(len(starts))
        evaluation.pgd_accuracy(network, x, y, EPSILON, steps=1, batch=16, seed=seed)
    first, second, again, _, other, _ = starts[::2]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:14], second)  # each batch draws its own noise


def test_the_monitor_measures_the_test_set_and_what_was_held_out():
    network = tiny_network()
    x, y = labelled(network, 30, 4)
    images = SimpleNamespace(x_test=x[:20], y_test=y[:20], x_holdout=x[20:], y_holdout=y[20:])
    expected = {
        "clean": 1.0,
        "pgd20": evaluation.pgd_accuracy(network, x[:20], y[:20], 0.01),
        "holdout_pgd10": evaluation.pgd_accuracy(network, x[20:], y[20:], 0.01, steps=10),
    }
    assert evaluation.monitor(network, images, 0.01) == expected
    assert 0 < expected["holdout_pgd10"] < 0.6 < expected["pgd20"] < 1
    images.x_holdout, images.y_holdout = x[:0], y[:0]
    assert list(evaluation.monitor(network, images, 0.01)) == ["clean", "pgd20"]


def test_the_interval_is_wilsons():
    """In closed form at the ends: 0 to z² / (n + z²)."""
    share = 1.959964**2 / (5 + 1.959964**2)
    assert evaluation.wilson_interval(0, 5) == pytest.approx((0, share), abs=1e-7)
    assert evaluation.wilson_interval(5, 5) == pytest.approx((1 - share, 1), abs=1e-7)


class Stateful(nn.Module):
    """BatchNorm and dropout, with submodules in different modes, frozen and unfrozen parameters, and a gradient."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(4 * 36, 10)
        self.train()
        self.features[2].eval()
        self.head.bias.requires_grad_(False)
        self.head.weight.grad = torch.ones_like(self.head.weight)

    def forward(self, x):
        return self.head(self.features(x))

    def facts(self):
        modes = [module.training for module in self.modules()]
        grads = [(p.requires_grad, None if p.grad is None else p.grad.sum().item()) for p in self.parameters()]
        return modes, grads, files.state_sha256(self), torch.get_rng_state().tolist()


@pytest.mark.parametrize("measure", ["clean", "fgsm", "pgd", "cw", "autoattack", "gradient_report"])
def test_nothing_is_left_behind(measure, quick_autoattack):
    torch.manual_seed(0)
    network, teacher = Stateful(), Stateful()
    x = torch.rand(6, 3, 8, 8)
    with attacks.frozen(network):
        y = network(x).argmax(dim=1)
    before = network.facts(), teacher.facts(), x.clone()
    if measure == "gradient_report":
        evaluation.gradient_report(network, teacher, x, y, EPSILON)
    elif measure == "autoattack":
        evaluation.autoattack(network, x, y, EPSILON)
    else:
        evaluation.accuracy_curve(network, x, y, measure, [EPSILON])
    assert (network.facts(), teacher.facts()) == before[:2]
    assert torch.equal(x, before[2])
    assert torch.is_grad_enabled()


def test_state_is_restored_when_the_network_raises():
    network = Stateful()
    images, labels = torch.rand(2, 5, 8, 8), torch.zeros(2, dtype=torch.int64)
    before = network.facts()
    with pytest.raises(RuntimeError, match="channels"):
        evaluation.pgd_accuracy(network, images, labels, EPSILON)
    assert network.facts() == before


GOOD = torch.full((2, 3, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (GOOD * 3, torch.tensor([0, 1]), "pixel values range from 1.5 to 1.5"),
        (GOOD - 0.6, torch.tensor([0, 1]), "pixel values range from -0.1"),
        (GOOD * float("nan"), torch.tensor([0, 1]), "pixel values range from nan"),
        (GOOD, torch.tensor([0]), "labels"),
        (GOOD[:0], torch.tensor([], dtype=torch.int64), "(0, 3, 8, 8)"),
        (GOOD[0], torch.tensor([0, 1, 2]), "(3, 8, 8)"),
    ],
)
def test_images_and_labels_out_of_range_are_an_error(x, y, said):
    for measure in (evaluation.accuracy, lambda *a: evaluation.autoattack(*a, EPSILON)):
        with pytest.raises(UserError) as caught:
            measure(tiny_network(), x, y)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_network_that_is_broken_or_changes_its_mode_gets_no_accuracy():
    x, y = labelled(tiny_network())
    broken = tiny_network()
    broken[3].weight.data[4, 4] = float("nan")
    for measure in (evaluation.accuracy, lambda *a: evaluation.autoattack(*a, EPSILON)):
        with pytest.raises(UserError, match="NaN or infinite logits"):
            measure(broken, x, y)
    switching = nn.Sequential(tiny_network())
    switching.register_forward_pre_hook(lambda module, _: module.train() and None)
    with pytest.raises(RuntimeError, match="train mode"):
        evaluation.accuracy(switching, x, y)


def test_accuracy_does_not_depend_on_the_memory():
    """A batch that does not fit is evaluated in parts, in which every image keeps its random start."""

    torch.manual_seed(1)
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), torch.rand(23, 3, 8, 8)
    roomy, tight = SmallMemory(network, 23), SmallMemory(network, 3)
    y = roomy(x).argmax(dim=1)
    # One step in a wide ball: which images fall hangs on the random starts.
    by_seed = [evaluation.pgd_accuracy(roomy, x, y, 0.08, steps=1, seed=seed) for seed in range(8)]
    assert [evaluation.pgd_accuracy(tight, x, y, 0.08, steps=1, seed=seed) for seed in range(8)] == by_seed
    assert len(set(by_seed)) > 1
    assert max(roomy.sizes) == 23
    assert sum(size <= 3 for size in tight.sizes) >= 16
    with pytest.raises(UserError, match="even with single images"):
        evaluation.accuracy(SmallMemory(network, 0), x, y)


# Curves over epsilon


def test_a_curve_attacks_only_images_that_are_still_robust(monkeypatch):
    network, pgd, attacked = tiny_network(), attacks.pgd, []
    monkeypatch.setattr(attacks, "pgd", lambda model, x, *rest: attacked.append(len(x)) or pgd(model, x, *rest))
    x, y = labelled(network, 60, 6)
    epsilons = [0.02, 0, 0.002, 0.006]
    points, predictions, _ = evaluation.accuracy_curve(network, x, y, "pgd", epsilons, steps=5, restarts=2)
    assert [point["epsilon"] for point in points] == [0, 0.002, 0.006, 0.02]
    assert points[0]["flags"] == "1" * 54 + "0" * 6
    accuracies = [point["accuracy"] for point in points]
    assert accuracies == sorted(accuracies, reverse=True)
    assert 0 < accuracies[3] < accuracies[2] < accuracies[1] < 1
    # Attacked are images robust at the epsilon before, and in the second restart those that the first left robust.
    for before, point in itertools.pairwise(points):
        first, second = point["attacked"]
        assert first == before["flags"].count("1")
        assert point["flags"].count("1") <= second <= first
        assert all(was >= now for was, now in zip(before["flags"], point["flags"], strict=True))
    assert attacked == [count for point in points[1:] for count in point["attacked"]]
    assert (predictions == y).tolist() == [flag == "1" for flag in points[-1]["flags"]]


def test_restarts_are_other_starts_and_all_count():
    network = tiny_network()
    x, y = labelled(network, 200, 0)
    one, five = (
        evaluation.accuracy_curve(network, x, y, "pgd", [0.004], steps=1, restarts=restarts)[0][0]["flags"]
        for restarts in (1, 5)
    )
    assert five.count("1") < one.count("1")  # one step: the start decides
    assert all(a <= b for a, b in zip(five, one, strict=True))
    assert one.count("1") / 200 == evaluation.pgd_accuracy(network, x, y, 0.004, steps=1)
    (fgsm,), *_ = evaluation.accuracy_curve(network, x, y, "fgsm", [0.004], restarts=5)
    assert fgsm["attacked"] == [200]  # it has no random start


def test_kept_images_are_the_first_misclassified_ones():
    network = tiny_network()
    x, y = labelled(network, 30, 3)
    options = {"steps": 5, "restarts": 2, "keep": True}
    (first, _), predictions, x_adv = evaluation.accuracy_curve(network, x, y, "pgd", [0.003, 0.01], **options)
    moved = (x_adv - x / 255).abs().flatten(1).max(dim=1).values
    assert (moved[[flag == "0" for flag in first["flags"]]] <= 0.003 + 1e-6).all()
    assert (moved <= 0.01 + 1e-6).all()
    assert torch.equal(network(x_adv).argmax(dim=1), predictions)


def test_the_curve_of_autoattack_attacks_only_images_that_are_still_robust(quick_autoattack, tmp_path):
    network = tiny_network()
    x, y = labelled(network, 24, 3)
    points = evaluation.autoattack_curve(network, x, y, [0, 0.002, 0.01], folder=tmp_path)
    assert points[0]["accuracy"] == 21 / 24
    assert [point["attacked"] for point in points[1:]] == [[21], [points[1]["flags"].count("1")]]
    single = evaluation.autoattack(network, x[:21], y[:21], 0.002)
    assert points[1]["flags"] == single["flags"]["square"] + "000"
    quick_autoattack.clear()
    again = evaluation.autoattack_curve(network, x, y, [0, 0.002, 0.01], folder=tmp_path)
    assert [point["flags"] for point in again] == [point["flags"] for point in points]
    assert not quick_autoattack  # read from its chunks


def test_autoattack_chunks_belong_to_one_arithmetic(monkeypatch, tmp_path):
    """The record says CPU, TF32 or FP32; chunks of another one are not read for it."""
    network, folders = tiny_network(), set()
    x, y = labelled(network)

    def answer(*_, folder, **__):
        folders.add(folder)
        return {"flags": {"square": "0" * len(x)}}

    module = sys.modules["experiment.evaluation.accuracy"]  # in the package, the function has this name
    monkeypatch.setattr(module, "autoattack", answer)
    for device, tf32 in (("cpu", True), ("cuda", True), ("cuda", False)):
        monkeypatch.setattr(module, "device_of", lambda *_, kind=device: torch.device(kind))
        monkeypatch.setattr("torch.backends.cudnn.allow_tf32", tf32)
        evaluation.autoattack_curve(network, x, y, [EPSILON], folder=tmp_path)
    assert len(folders) == 3


def test_accuracy_by_class_is_worst_first():
    rows = evaluation.per_class("110100", torch.tensor([2, 2, 0, 0, 1, 1]), ["cat", "dog", "emu"])
    found = [(row["class"], row["accuracy"], row["examples"]) for row in rows]
    assert found == [("dog", 0, 2), ("cat", 0.5, 2), ("emu", 1, 2)]
    assert rows[0]["interval"] == [*evaluation.wilson_interval(0, 2)]


# Gradient alignment


def test_a_gradient_of_zero_counts_as_cosine_zero():
    constant = tiny_network()
    constant[3].weight.data.zero_()
    x, y = labelled(tiny_network())
    assert evaluation.gradient_alignment(constant, tiny_network(), x, y)["gc"] == 0
    assert evaluation.gradient_alignment(constant, constant, x, y) == {"gd": 0, "gc": 0}


def test_the_report_is_what_float64_autograd_says():
    """Written out image by image, on networks in float64; delta is that of the student's PGD-20."""
    student, teacher = tiny_network(seed=1).double(), tiny_network(seed=2).double()
    x, y = labelled(tiny_network(), 9, 3)
    x = x.double() / 255
    report = evaluation.gradient_report(student, teacher, x, y, 0.01)
    *_, kept = evaluation.accuracy_curve(student, x, y, "pgd", [0.01], keep=True)
    scalars = {
        "probability": lambda z, label: z.softmax(dim=0)[label],
        "cross_entropy": lambda z, label: -z.log_softmax(dim=0)[label],
        "logit": lambda z, label: z[label],
    }
    for name, scalar in scalars.items():
        gradients, unexplained, change = ([], []), [0, 0], [0, 0]
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            for which, network in enumerate((student, teacher)):
                clean = image.clone().requires_grad_()
                value = scalar(network(clean[None])[0], label)
                (gradient,) = torch.autograd.grad(value, clean)
                x_adv = kept[i].double()
                moved = (scalar(network(x_adv[None])[0], label) - value).item()
                gradients[which].append(gradient.flatten())
                unexplained[which] += abs(moved - (gradient * (x_adv - image)).sum().item())
                change[which] += abs(moved)
        ours, theirs = map(torch.stack, gradients)
        found = report["scalars"][name]
        assert found["gd"] == pytest.approx((ours - theirs).norm(dim=1).mean().item(), rel=1e-9)
        assert found["gc"] == pytest.approx(F.cosine_similarity(ours, theirs).mean().item(), rel=1e-9)
        # The kept x_adv is in float32: its rounding of 2^-25 against changes of 1e-2.
        assert found["remainder_student"] == pytest.approx(unexplained[0] / change[0], rel=1e-4)
        assert found["remainder_teacher"] == pytest.approx(unexplained[1] / change[1], rel=1e-4)
    probability = {name: report["scalars"]["probability"][name] for name in ("gd", "gc")}
    assert {name: report[name] for name in ("gd", "gc")} == probability
    assert evaluation.gradient_alignment(student, teacher, x, y, batch=4) == pytest.approx(probability, rel=1e-12)


# torchattacks


def test_a_difference_from_torchattacks_is_found(monkeypatch):
    network = tiny_network()
    x, y = labelled(network, 60, 0)
    fgsm, pgd = evaluation.beside_torchattacks(network, x, y, 0.004, steps=3)
    assert (fgsm["attack"], pgd["attack"], pgd["steps"]) == ("fgsm", "pgd", 3)
    assert 0 < fgsm["ours"] == fgsm["torchattacks"] < 1
    assert pgd["ours"] == evaluation.pgd_accuracy(network, x, y, 0.004, steps=3)
    assert pgd["p"] > 0.05
    monkeypatch.setattr(attacks, "pgd", lambda model, x, *_: x)  # ours does nothing
    _, pgd = evaluation.beside_torchattacks(network, x, y, EPSILON)
    assert pgd["ours"] == 1
    assert pgd["p"] < 0.05
    assert pgd["only_theirs"] == round(60 * (1 - pgd["torchattacks"])) > 5
