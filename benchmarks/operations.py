"""Operations of a training step, counted from the layers of both networks and the passes of the method."""

import math
from collections import Counter
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Layer:
    """A convolution's (or a linear layer's) shape for one image; `first` reads the network's input."""

    in_channels: int
    out_channels: int
    side: int
    kernel: int
    stride: int
    padding: int
    groups: int
    out_side: int
    first: bool

    @property
    def gflop(self) -> float:
        """10^9 operations of a forward pass of one image, two per multiplication and addition; a gradient's, too."""
        products = self.out_side**2 * self.out_channels * self.in_channels // self.groups * self.kernel**2
        return 2 * products / 1e9

    def __str__(self) -> str:
        text = f"{self.in_channels} → {self.out_channels}, {self.side}², {self.kernel}×{self.kernel}"
        return text + (f", stride {self.stride}" if self.stride > 1 else "")


def layers(network: nn.Module, linear: bool = False) -> Counter[Layer]:
    """Each kind of convolution in a network, and how often it is there; with `linear`, linear layers as 1x1 ones."""
    found: Counter[Layer] = Counter()
    parameter = next(network.parameters())
    x = torch.rand(1, 3, measure.SIDE, measure.SIDE, device=parameter.device, dtype=parameter.dtype)
    pixels: list[torch.Tensor] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        given = inputs[0]
        pixels.append(given)
        if isinstance(module, nn.Linear):
            found[Layer(module.in_features, module.out_features, 1, 1, 1, 0, 1, 1, False)] += 1
            return
        sizes = (given.shape[2], module.kernel_size[0], module.stride[0], module.padding[0])
        channels = (module.in_channels, module.out_channels)
        found[Layer(*channels, *sizes, module.groups, out.shape[2], first=len(pixels) == 1)] += 1

    kinds = (nn.Conv2d, nn.Linear) if linear else nn.Conv2d
    hooks = [module.register_forward_hook(note) for module in network.modules() if isinstance(module, kinds)]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return found


def gflop_of_passes(network: nn.Module) -> tuple[float, float, float]:
    """Operations of one image's forward pass, backward pass to the input alone, and full backward pass, 10^9 each."""
    counted = layers(network, linear=True)
    forward = sum(times * layer.gflop for layer, times in counted.items())
    # A gradient of the input, or of the weights, costs as much; the pixels' is not wanted beside that of the weights.
    pixels = sum(times * layer.gflop for layer, times in counted.items() if layer.first)
    return forward, forward, 2 * forward - pixels


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
