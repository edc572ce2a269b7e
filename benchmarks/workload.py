"""What is timed: networks with random weights, random images, and the operations of a training step on them.

DMWideResNet has the shape of RobustBench's, which the strongest teachers use: equal layers, order and activations.

Source: Gowal et al., Uncovering the limits of adversarial training, 2020; Wang2023Better and Cui2023Decoupled use it.
"""

import argparse
import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cifar100_models import build_model
from experiment.engine import Engine

DM = "DM-WRN-"
CLASSES, SIDE = 100, 32
"""As CIFAR-100 has; the time does not depend on the pixels."""

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


class Block(nn.Module):
    """BatchNorm, SiLU, convolution, twice; padded by hand before the first, as TensorFlow's SAME does."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(in_planes), nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False) if in_planes != planes else None
        self.sides = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.silu(self.bn1(x))
        out = self.conv2(F.silu(self.bn2(self.conv1(F.pad(activated, self.sides)))))
        return (x if self.shortcut is None else self.shortcut(activated)) + out


class DMWideResNet(nn.Module):
    """Normalisation, stem, three groups of (depth - 4) / 6 blocks, BatchNorm, SiLU, mean over 8x8, linear."""

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        planes = (16, 16 * width, 32 * width, 64 * width)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))
        self.stem = nn.Conv2d(3, planes[0], 3, padding=1, bias=False)
        blocks = [
            Block(planes[group] if i == 0 else planes[group + 1], planes[group + 1], 2 if group and i == 0 else 1)
            for group in range(3)
            for i in range((depth - 4) // 6)
        ]
        self.blocks, self.bn = nn.Sequential(*blocks), nn.BatchNorm2d(planes[3])
        self.logits = nn.Linear(planes[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(self.stem((x - self.mean) / self.std))
        out = F.avg_pool2d(F.silu(self.bn(out)), 8)
        return self.logits(out.flatten(1))


def make_network(name: str, device: torch.device, seed: int) -> nn.Module:
    """A network with random weights, in eval mode, whose BatchNorm statistics fit its activations.

    A name of cifar100_models, or DM-WRN-d-w: the shape of RobustBench's strongest teachers. With fresh statistics the
    logits of a deep network overflow its softmax, and gradients vanish or become NaN.
    """
    torch.manual_seed(seed)
    if name.startswith(DM):
        depth, _, width = name.removeprefix(DM).partition("-")
        model = DMWideResNet(int(depth), int(width), CLASSES)
    else:
        model = build_model(name, CLASSES)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.rand(4, 3, SIDE, SIDE))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval().to(device)


def make_batches(batch: int, device: torch.device | str, count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images in [0, 1] and labels; several batches, so that no cache holds what a step needs."""
    torch.manual_seed(0)
    return [
        (torch.rand(batch, 3, SIDE, SIDE).to(device), torch.randint(CLASSES, (batch,)).to(device)) for _ in range(count)
    ]


def engine(device: torch.device, precision: str = "fp32", batch: int = 1) -> Engine:
    """A run's engine, without its other options."""
    others = {"compile": 0, "deterministic": 0, "seed": 0}
    return Engine(argparse.Namespace(device=str(device), precision=precision, batch=batch, **others))


@functools.cache
def gflop_of_passes(network: nn.Module) -> tuple[float, float]:
    """Operations of one image's forward pass and full backward pass, 10^9 each.

    Convolutions and linear layers, two operations per multiplication and addition. A backward pass to the input alone
    costs a forward pass.
    """
    network = copy.deepcopy(network).to("meta")
    with FlopCounterMode(display=False) as counter:
        logits = network(torch.empty(1, 3, SIDE, SIDE, device="meta"))
        forward = counter.get_total_flops() / 1e9
        logits.sum().backward()  # of the weights, and of each layer's input but the image
        full_backward = counter.get_total_flops() / 1e9 - forward
    return forward, full_backward


def gflop_of_step(method: str, networks: tuple[nn.Module, nn.Module], teacher_every: int = 1) -> dict[str, float]:
    """Operations per image of a step by PASSES, 10^9: of the published order and of the product."""
    (student, full_backward), (teacher, _) = map(gflop_of_passes, networks)
    costs = (student, student, full_backward, teacher, teacher)
    found = {
        kind: sum(n * cost for n, cost in zip(passes, costs, strict=True)) for kind, passes in PASSES[method].items()
    }
    saved = ATTACK_STEPS - math.ceil(ATTACK_STEPS / teacher_every)
    found["product"] -= saved * 2 * teacher  # each of these steps lacks a forward and a backward pass
    return found
