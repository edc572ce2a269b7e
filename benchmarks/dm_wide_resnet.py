"""A network of the shape of the strongest teachers: RobustBench's DMWideResNet, where robustbench is not installed.

Same layers, same order, same activations; module names differ, and weights are random: for timing, not for loading.

Source: Gowal et al., Uncovering the limits of adversarial training, 2020; Wang2023Better and Cui2023Decoupled use it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment import UserError
from experiment.compat import import_robustbench


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


def build(depth: int, width: int, num_classes: int) -> nn.Module:
    """RobustBench's own network where it can be imported, this file's where it cannot."""
    try:
        import_robustbench()
    except UserError:
        return DMWideResNet(depth, width, num_classes)
    from robustbench.model_zoo.architectures import dm_wide_resnet

    return dm_wide_resnet.DMWideResNet(num_classes, depth, width, activation_fn=nn.SiLU)
