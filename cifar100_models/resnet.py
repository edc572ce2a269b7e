"""ResNets for 32x32 images: ResNet-18 with a stride-1 stem, and the small CIFAR ResNets (6n + 2 layers).

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2 for the small ones.
Module names are those of the widely copied CIFAR ResNet-18 (conv1, bn1, layer1 ..., linear), so that state dicts
trained elsewhere fit.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A stride-1 3x3 stem, stages of basic blocks that halve the side from the second on, mean pool, linear."""

    def __init__(self, planes: tuple[int, ...], blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, planes[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.stages = len(planes)
        in_planes = planes[0]
        for i, width in enumerate(planes, start=1):
            strides = [1 if i == 1 else 2] + [1] * (blocks - 1)
            stage = []
            for stride in strides:
                stage.append(BasicBlock(in_planes, width, stride))
                in_planes = width
            self.add_module(f"layer{i}", nn.Sequential(*stage))
        self.linear = nn.Linear(in_planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for i in range(1, self.stages + 1):
            out = getattr(self, f"layer{i}")(out)
        return self.linear(out.mean(dim=(2, 3)))


def resnet18(num_classes: int) -> ResNet:
    """ResNet-18: 11,220,132 parameters and 0.555 GMAC at 100 classes and 32x32."""
    return ResNet((64, 128, 256, 512), blocks=2, num_classes=num_classes)


def small_resnet(depth: int, num_classes: int) -> ResNet:
    """The CIFAR ResNet of depth 6n + 2 with 16, 32, 64 planes; shortcuts by 1x1 convolution (option B)."""
    return ResNet((16, 32, 64), blocks=(depth - 2) // 6, num_classes=num_classes)
