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
