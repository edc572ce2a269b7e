"""Accuracies: closed forms, intervals, what they leave untouched, what they refuse, and torchattacks beside them."""

import warnings
from types import SimpleNamespace

import pytest
import torch
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
        points, _ = evaluation.accuracy_curve(network, x, y, attack, [0, EPSILON])
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


@pytest.mark.parametrize("measure", ["accuracy", "fgsm", "pgd", "cw", "autoattack", "gradient_alignment"])
def test_nothing_is_left_behind(measure, quick_autoattack):
    torch.manual_seed(0)
    network, teacher = Stateful(), Stateful()
    x = torch.rand(6, 3, 8, 8)
    with attacks.frozen(network):
        y = network(x).argmax(dim=1)
    before = network.facts(), teacher.facts(), x.clone()
    if measure == "accuracy":
        evaluation.accuracy(network, x, y)
    elif measure == "gradient_alignment":
        evaluation.gradient_alignment(network, teacher, x, y)
    elif measure == "autoattack":
        evaluation.autoattack(network, x, y, EPSILON, show_progress=False)
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
        (GOOD.long(), torch.tensor([0, 1]), "torch.int64"),
        (GOOD, torch.tensor([0]), "labels"),
        (GOOD, torch.tensor([0, -1]), "from -1"),
        (GOOD, torch.tensor([0.0, 1.0]), "torch.float32"),
        (GOOD[:0], torch.tensor([], dtype=torch.int64), "(0, 3, 8, 8)"),
        (GOOD[0], torch.tensor([0, 1, 2]), "(3, 8, 8)"),
    ],
)
def test_images_and_labels_out_of_range_are_refused(x, y, said):
    for measure in (evaluation.accuracy, lambda *a: evaluation.autoattack(*a, EPSILON)):
        with pytest.raises(UserError) as caught:
            measure(tiny_network(), x, y)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_network_that_is_broken_or_changes_its_mode_gets_no_accuracy():
    x, y = labelled(tiny_network())
    broken = tiny_network()
    broken[3].weight.data[4, 4] = float("nan")
    for measure in (evaluation.accuracy, lambda *a: evaluation.autoattack(*a, EPSILON, show_progress=False)):
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


@pytest.fixture(scope="module")
def torchattacks():
    with warnings.catch_warnings():
        # requests 2.25.1, which torchattacks pins, complains about the versions of chardet and urllib3.
        warnings.simplefilter("ignore")
        import torchattacks
    return torchattacks


def test_fgsm_and_pgd_agree_with_torchattacks(torchattacks):
    network = tiny_network()
    x, y = labelled(network, 16)
    x = x / 255
    theirs = torchattacks.FGSM(network, eps=EPSILON)(x, y)
    # The ball is cut in another order there (x + clamp(x_adv - x)): one rounding of 2^-24 per operation.
    torch.testing.assert_close(attacks.fgsm(network, x, y, EPSILON), theirs, rtol=0, atol=1e-6)
    for random_start in (False, True):
        attack = torchattacks.PGD(network, eps=EPSILON, alpha=EPSILON / 4, steps=20, random_start=random_start)
        torch.manual_seed(5)
        theirs = attack(x, y)
        torch.manual_seed(5)  # both draw uniform noise of x's shape once
        ours = attacks.pgd(network, x, y, EPSILON, EPSILON / 4, 20, random_start)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
