"""Images as the networks see them: float pixels, randomly cropped and mirrored on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def as_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]; dividing by 255 gives exactly the values of torchvision's ToTensor."""
    return images.float().div_(255)


def augment(images: Tensor, pad: int, shift: Tensor, mirror: Tensor | None) -> Tensor:
    """Crop every image out of its zero-padded self, then mirror it where asked; one gather, no loop or GPU sync.

    Args:
        images: (N, C, H, W) uint8.
        pad: pixels of zero padding on each side.
        shift: (2, N) row and column offsets in [0, 2 pad].
        mirror: (N,) 0 or 1, or None for no mirroring.
    """
    n, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + shift[0, :, None]
    columns = torch.arange(width, device=images.device).expand(n, width)
    if mirror is not None:
        columns = torch.where(mirror[:, None].bool(), width - 1 - columns, columns)
    columns = columns + shift[1, :, None]
    padded = F.pad(images, (pad, pad, pad, pad)) if pad else images
    index = torch.arange(n, device=images.device)[:, None, None, None]
    plane = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[index, plane, rows[:, None, :, None], columns[:, None, None, :]]
