"""Gradient alignment: closed forms on linear models."""

import pytest
import torch
import torch.nn.functional as F
from evaluation_cases import labelled, tiny_network
from torch import nn

from experiment import evaluation


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
