"""Gradient alignment: closed forms on linear models."""

import pytest
import torch
import torch.nn.functional as F
from evaluation_cases import labelled, tiny_network
from torch import nn

from experiment import evaluation


def test_identical_networks_are_aligned():
    network = tiny_network()
    x, y = labelled(network, 20, 5)
    aligned = evaluation.gradient_alignment(network, network, x, y, batch=8)
    assert aligned["gd"] == 0
    assert aligned["gc"] == pytest.approx(1, abs=1e-12)  # rounding of float64


def test_alignment_of_linear_softmax_models_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(9, 3, 8, 8, generator=generator)
    y = torch.randint(10, (9,), generator=generator)
    networks, gradients = [], []
    for _ in range(2):
        weight = 0.1 * torch.randn(10, 192, generator=generator)
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False))
        network[1].weight.data = weight
        p = F.softmax(x.flatten(1).double() @ weight.double().T, dim=1)
        # d p_y / d x = p_y (w_y - sum_k p_k w_k)
        gradients.append(p.gather(1, y[:, None]) * (weight[y].double() - p @ weight.double()))
        networks.append(network)
    found = evaluation.gradient_alignment(*networks, x, y, batch=4)
    # The networks compute in float32: six to seven digits.
    assert found["gd"] == pytest.approx((gradients[0] - gradients[1]).norm(dim=1).mean().item(), rel=1e-5)
    assert found["gc"] == pytest.approx(F.cosine_similarity(*gradients).mean().item(), rel=1e-5)


def test_a_gradient_of_zero_counts_as_cosine_zero():
    constant = tiny_network()
    constant[3].weight.data.zero_()
    x, y = labelled(tiny_network())
    assert evaluation.gradient_alignment(constant, tiny_network(), x, y)["gc"] == 0
    assert evaluation.gradient_alignment(constant, constant, x, y) == {"gd": 0, "gc": 0}


def linear(seed):
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False))
    network[1].weight.data = 0.1 * torch.randn(10, 192, generator=generator)
    return network


def test_a_linear_network_has_no_remainder_in_its_logit():
    x, y = labelled(tiny_network(), 12, 4)
    student, teacher = linear(1), linear(2)
    report = evaluation.gradient_report(student, teacher, x, y, 0.05)
    of_logit = report["scalars"]["logit"]
    # float32 logits of size 1 that change by about 0.5: six digits.
    assert of_logit["remainder_student"] < 1e-5
    assert of_logit["remainder_teacher"] < 1e-5
    assert report["scalars"]["cross_entropy"]["remainder_student"] > 1e-3  # log-sum-exp is not linear
    rows = [student[1].weight[y], teacher[1].weight[y]]  # d logits_y / d x = w_y
    assert of_logit["gd"] == pytest.approx((rows[0] - rows[1]).norm(dim=1).mean().item(), rel=1e-5)
    assert of_logit["gc"] == pytest.approx(F.cosine_similarity(*rows).mean().item(), rel=1e-5)


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
    assert report["gd"] == report["scalars"]["probability"]["gd"]
    assert report["gc"] == pytest.approx(evaluation.gradient_alignment(student, teacher, x, y)["gc"], rel=1e-12)
