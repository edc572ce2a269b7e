"""Data sets, loaded whole as uint8 tensors onto the training device."""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiment import UserError
from experiment.data.sources import SMALLEST_SIDE, Arrays, read

SEED = 0
"""Seed of the shuffled test set and of the subsets. NumPy guarantees that a RandomState's numbers never change."""


@dataclass(frozen=True)
class Data:
    """A data set on one device: images (N, 3, H, W) uint8, labels (N,) int64.

    Attributes:
        name: the value of --dataset.
        pad: pixels of zero padding before the random crop.
        flip: whether images are mirrored at random.
        sha256: hash of all arrays, so of the training images and the order of the test images.
        x_holdout, y_holdout: training images held out by --holdout; empty without it.
        class_names: one name per class, or None where the source has none.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    pad: int
    flip: bool
    sha256: str
    x_holdout: Tensor = field(default_factory=lambda: torch.empty(0, 3, 0, 0, dtype=torch.uint8))
    y_holdout: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    class_names: tuple[str, ...] | None = None

    def steps(self, batch: int) -> int:
        """Number of batches in an epoch. A last batch of one image is left out: BatchNorm cannot train on it."""
        full, rest = divmod(len(self.x_train), batch)
        return full + (rest > 1)

    def batches(
        self, batch: int, seed: int, epoch: int, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, int, int]]:
        """Augmented training batches of one epoch, from step `first` (counted from 0) on.

        Order, crops and flips depend on seed and epoch only. They are drawn on the CPU, so they are the same on every
        device, for every number of ranks, and after a resume.

        Yields:
            x (n, 3, H, W) float32 in [0, 1] and y (n,), this rank's contiguous share of the global batch; the index of
            its first image in the global batch; the size of the global batch.
        """
        count, device, pad = len(self.x_train), self.x_train.device, self.pad
        digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        order = torch.randperm(count, generator=generator).to(device)
        shift = torch.randint(2 * pad + 1, (2, count), generator=generator).to(device)
        mirror = torch.randint(2, (count,), generator=generator).to(device) if self.flip else None
        for step in range(first, self.steps(batch)):
            total = min(batch, count - step * batch)
            begin, end = total * rank // world, total * (rank + 1) // world
            share = slice(step * batch + begin, step * batch + end)
            index = order[share]
            x = augment(self.x_train[index], pad, shift[:, share], None if mirror is None else mirror[share])
            yield as_float(x), self.y_train[index], begin, total


def selection(args: argparse.Namespace) -> dict[str, int]:
    """Arguments of ``load_data`` that are flags: --side, --train_examples and --holdout."""
    return {name: getattr(args, name) for name in ("side", "train_examples", "holdout")}


def load_data(
    dataset: str,
    data_dir: str = "data",
    device: torch.device | str = "cpu",
    *,
    side: int = 0,
    train_examples: int = 0,
    holdout: int = 0,
) -> Data:
    """Load a data set onto a device.

    CIFAR's test images keep their order, so that subsets are RobustBench's. Others are shuffled with a fixed seed.

    Args:
        dataset: ``cifar100``, ``cifar10`` or ``svhn`` (downloaded if missing); ``digits`` (1,797 8x8 images inside
            scikit-learn); a .npz file with x_train, y_train, x_test, y_test (uint8 NHWC images, integer labels) and
            optionally class_names; or a folder of images, train/ and test/ or val/ with a folder per class.
        data_dir: folder of CIFAR's and SVHN's files.
        side: reduce the images to side x side pixels, each the mean of a block (0: unchanged).
        train_examples: size of a fixed subset of the training images, stratified by class (0: all).
        holdout: number of them to hold out, stratified by class.

    Raises:
        UserError: unknown name; missing or damaged file; failed download; a side or number that the set does not allow.
    """
    arrays = read(dataset, Path(data_dir))
    if dataset not in ("cifar100", "cifar10", "digits"):
        # The first N images of a set sorted by class are no sample of it.
        order = np.random.RandomState(SEED).permutation(len(arrays.y_test))
        arrays = replace(arrays, x_test=arrays.x_test[order], y_test=arrays.y_test[order])
    if side:
        arrays = reduce_side(arrays, side)
    x, y = arrays.x_train, arrays.y_train
    if train_examples:
        drawn, _ = draw(y, train_examples, "train_examples")
        x, y = x[drawn], y[drawn]
    held, rest = draw(y, holdout, "holdout")
    parts = {"train": (x[rest], y[rest]), "test": (arrays.x_test, arrays.y_test), "holdout": (x[held], y[held])}
    digest, tensors = hashlib.sha256(), {}
    for name, (x, y) in parts.items():
        digest.update(np.ascontiguousarray(x))
        digest.update(np.ascontiguousarray(y))
        tensors[f"x_{name}"] = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(device)
        tensors[f"y_{name}"] = torch.from_numpy(y.astype(np.int64)).to(device)
    return Data(
        **tensors,
        name=dataset,
        num_classes=arrays.num_classes,
        # A mirrored digit is another sign, and half of an 8x8 image is no crop.
        pad=1 if dataset == "digits" else 4,
        flip=dataset not in ("digits", "svhn"),
        sha256=digest.hexdigest(),
        class_names=arrays.class_names,
    )


def reduce_side(arrays: Arrays, side: int) -> Arrays:
    """Reduce images to side x side pixels: each is the mean of a block, rounded half up."""
    height, width = arrays.x_train.shape[1:3]
    if side < SMALLEST_SIDE or height != width or height % side:
        raise UserError(
            f"--side {side} is not possible for images of {height} x {width} pixels (expected square images and a "
            f"divisor of their side, at least {SMALLEST_SIDE})"
        )
    block = height // side

    def means(x: np.ndarray) -> np.ndarray:
        sums = x.reshape(-1, side, block, side, block, 3).sum(axis=(2, 4), dtype=np.uint32)
        return ((sums + block**2 // 2) // block**2).astype(np.uint8)

    return replace(arrays, x_train=means(arrays.x_train), x_test=means(arrays.x_test))


def draw(labels: np.ndarray, count: int, flag: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` images in proportion to their classes: their indices, and those of the rest, both ascending.

    Raises:
        UserError: a class would be lost among the training images, which --train_examples draws, --holdout leaves.
    """
    labels = labels.astype(np.int64)
    sizes = np.bincount(labels)
    shares = count * sizes / sizes.sum()
    quotas = np.floor(shares).astype(int)
    # The images lost by rounding down go to the largest remainders, of equal ones to the first class.
    quotas[np.argsort(quotas - shares, kind="stable")[: count - quotas.sum()]] += 1
    order = np.random.RandomState(SEED).permutation(len(labels))
    by_class = [order[labels[order] == label][:quota] for label, quota in enumerate(quotas)]
    drawn = np.sort(np.concatenate(by_class))
    rest = np.setdiff1d(np.arange(len(labels)), drawn)
    kept = drawn if flag == "train_examples" else rest
    if count > len(labels) or len(np.unique(labels[kept])) < len(np.unique(labels)):
        raise UserError(
            f"--{flag} {count} is not possible with {len(labels)} training images; one of each class must be kept"
        )
    return drawn, rest


def as_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1], exactly as torchvision's ToTensor; others are returned unchanged."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


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
