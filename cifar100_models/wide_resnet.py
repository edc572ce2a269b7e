"""WideResNet-d-w: the architecture of the large robust teachers, in its plain pre-activation form.

Source: Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016; module names (block1.layer.0.conv1, fc) and
initialisation are those of the TRADES release, which most robust WideResNets follow.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def allowed(depth: int, width: int) -> bool:
    """Whether WRN-depth-width exists: depth = 6n + 4 with n >= 1, width from 1 to 20."""
    return depth >= 10 and (depth - 4) % 6 == 0 and 1 <= width <= 20


class PreActBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice; where the shape changes the shortcut starts after the first ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_planes != planes:
            self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class Stage(nn.Module):
    """A sequence of blocks, the first of which changes planes and stride."""

    def __init__(self, in_planes: int, planes: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(PreActBlock(in_planes if i == 0 else planes, planes, stride if i == 0 else 1) for i in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """3x3 stem to 16 planes, three stages of (depth - 4) / 6 blocks with 16w, 32w, 64w planes, BatchNorm, linear."""

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks, planes = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(3, planes[0], 3, padding=1, bias=False)
        self.block1 = Stage(planes[0], planes[1], blocks, 1)
        self.block2 = Stage(planes[1], planes[2], blocks, 2)
        self.block3 = Stage(planes[2], planes[3], blocks, 2)
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.fc = nn.Linear(planes[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.relu(self.bn1(out))
        return self.fc(out.mean(dim=(2, 3)))
