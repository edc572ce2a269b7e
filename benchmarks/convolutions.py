"""The convolutions of a network: what they have to compute, counted from the layers, and how fast they do it alone."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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


def timed(
    network: nn.Module, batch: int, precision: str, device: torch.device, rounds: int = 5, flipped: bool = False
) -> Iterator[dict[str, Any]]:
    """A row for each kind of convolution: seconds and 10^12 operations per second, timed over and over on one input.

    Yields:
        ``layer``, ``count``, ``forward``, ``input_gradient`` and ``weight_gradient`` (seconds of one layer on the
        batch) and, with `flipped`, ``flipped_forward``: the input's gradient computed as a forward pass with flipped
        weights, where that is the same function; ``gflop`` of each on the batch.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    repeats = 20 if device.type == "cuda" else 1
    for layer, count in layers(network).items():
        shape = (batch, layer.in_channels, layer.side, layer.side)
        kernel = (layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
        x, weight = (
            torch.randn(size, device=device).to(dtype, memory_format=torch.channels_last) for size in (shape, kernel)
        )
        options = ([layer.stride] * 2, [layer.padding] * 2, [1, 1])
        forward = partial(F.conv2d, x, weight, None, *options, layer.groups)
        gradient = torch.randn_like(forward())
        backward = partial(
            torch.ops.aten.convolution_backward, gradient, x, weight, None, *options, False, [0, 0], layer.groups
        )
        runs = {
            "forward": forward,
            "input_gradient": partial(backward, [True, False, False]),
            "weight_gradient": partial(backward, [False, True, False]),
        }
        if flipped and layer.stride == 1 and layer.groups == 1:
            turned = weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
            runs["flipped_forward"] = partial(F.conv2d, gradient, turned, padding=layer.kernel - 1 - layer.padding)
        seconds = {name: measure.best_seconds(run, device, rounds, repeats) for name, run in runs.items()}
        fields = {"layer": str(layer), "count": count, "first": layer.first, "precision": precision}
        yield {**fields, "gflop": batch * layer.gflop, **seconds}


def seconds_alone(
    method: str, networks: tuple[nn.Module, nn.Module], batch: int, precision: str, device: torch.device
) -> float:
    """Seconds of all convolutions of the product's step, each kind timed by itself, over and over on the same data.

    What a step would take if nothing but its convolutions cost time, and each found its data in the cache as far as it
    fits: the least that a step can take with the library's convolutions.
    """
    costs = []
    for network in networks:
        rows = list(timed(network, batch, precision, device))
        forward, to_input = (sum(r["count"] * r[n] for r in rows) for n in ("forward", "input_gradient"))
        # The gradient of the training images themselves is not needed in a full backward pass.
        full = sum(r["count"] * (r["weight_gradient"] + (0 if r["first"] else r["input_gradient"])) for r in rows)
        costs.append((forward, to_input, full))
    student, teacher = costs
    return sum(n * cost for n, cost in zip(PASSES[method]["product"], (*student, *teacher[:2]), strict=True))
