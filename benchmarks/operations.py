"""Operations of a training step, counted from the layers of both networks and the passes of the method."""

import math

import torch
from torch import nn

from benchmarks import measure

ATTACK_STEPS = 10
PASSES = {
    "ard": {"published": (12, 10, 2, 1, 0), "product": (12, 10, 1, 1, 0)},
    "ard_IGDM": {"published": (13, 10, 3, 3, 0), "product": (13, 10, 2, 3, 0)},
    "rslad": {"published": (12, 10, 2, 1, 0), "product": (12, 10, 2, 1, 0)},
    "rslad_IGDM": {"published": (14, 10, 4, 4, 0), "product": (13, 10, 3, 3, 0)},
    "adaad": {"published": (12, 10, 2, 12, 10), "product": (12, 10, 1, 11, 10)},
    "adaad_IGDM": {"published": (14, 10, 4, 14, 10), "product": (13, 10, 2, 12, 10)},
}
"""Passes of a step with ten attack steps and --preset paper: the student's forward passes, backward passes to the input
alone, and full backward passes; the teacher's forward passes and backward passes to the input. The published ones were
counted in the published code; the product's lack the plus pass, which is x_adv's, and the backward passes of terms with
weight zero; a student's clean pass without gradient, which moves BatchNorm statistics, counts."""


def gflop_of_passes(network: nn.Module) -> tuple[float, float, float]:
    """Operations of one image's forward pass, backward pass to the input alone, and full backward pass, 10^9 each.

    Convolutions and linear layers, two operations per multiplication and addition.
    """
    counted: list[float] = []

    def count(layer: nn.Module, _inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        counted.append(2 * out.numel() * layer.weight[0].numel() / 1e9)

    hooks = [
        module.register_forward_hook(count) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    parameter = next(network.parameters())
    with torch.no_grad():
        network(torch.rand(1, 3, measure.SIDE, measure.SIDE, device=parameter.device, dtype=parameter.dtype))
    for hook in hooks:
        hook.remove()
    forward = sum(counted)
    # The gradient of a layer's input, or of its weights, costs as much; the pixels' is not computed with the weights'.
    return forward, forward, 2 * forward - counted[0]


def gflop_of_step(method: str, networks: tuple[nn.Module, nn.Module], teacher_every: int = 1) -> dict[str, float]:
    """Operations per image of a step by PASSES, 10^9: of the published order and of the product."""
    student, teacher = (gflop_of_passes(network) for network in networks)
    found = {
        kind: sum(n * cost for n, cost in zip(passes, (*student, *teacher[:2]), strict=True))
        for kind, passes in PASSES[method].items()
    }
    saved = ATTACK_STEPS - math.ceil(ATTACK_STEPS / teacher_every)
    found["product"] -= saved * (teacher[0] + teacher[1])  # each of these steps lacks a forward and a backward pass
    return found
