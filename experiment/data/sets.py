"""Data sets, whole, as uint8 tensors on the training device."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiment import UserError
from experiment.data.augmentation import as_float, augment
from experiment.data.cifar import read_cifar
from experiment.data.npz import read_npz


@dataclass(frozen=True)
class Data:
    """A data set on one device.

    Attributes:
        name: what --dataset was.
        x_train, x_test: (N, 3, H, W) uint8.
        y_train, y_test: (N,) int64 in [0, num_classes).
        num_classes: number of classes.
        pad: pixels of zero padding before the random crop.
        flip: whether images are mirrored at random.
        sha256: hash of the four arrays.
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

    def steps(self, batch: int) -> int:
        """Batches in an epoch. A lone last image is left out: BatchNorm cannot train on one."""
        full, rest = divmod(len(self.x_train), batch)
        return full + (rest > 1)

    def batches(
        self, batch: int, seed: int, epoch: int, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, int, int]]:
        """Augmented training batches of one epoch, from step `first` (0-based) on.

        Order, crops and flips are functions of (seed, epoch) alone and are drawn on the CPU, so they are the same on
        every device, for every number of ranks, and after a resume; the images are moved on the device, in batch.

        Yields:
            x (n, 3, H, W) float32 in [0, 1] and y (n,), this rank's contiguous share of the global batch; then the
            index of its first image in the global batch and the size of the global batch.
        """
        count, device, pad = len(self.x_train), self.x_train.device, self.pad
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7])
        )
        order = torch.randperm(count, generator=generator).to(device)
        shift = torch.randint(2 * pad + 1, (2, count), generator=generator).to(device)
        mirror = torch.randint(2, (count,), generator=generator).to(device) if self.flip else None
        for step in range(first, self.steps(batch)):
            total = min(batch, count - step * batch)
            begin, end = total * rank // world, total * (rank + 1) // world
            here = slice(step * batch + begin, step * batch + end)
            index = order[here]
            x = augment(self.x_train[index], pad, shift[:, here], None if mirror is None else mirror[here])
            yield as_float(x), self.y_train[index], begin, total


def load_data(dataset: str, data_dir: str = "data", device: torch.device | str = "cpu") -> Data:
    """Load a data set whole onto a device.

    Args:
        dataset: ``cifar100`` or ``cifar10`` (torchvision's files under data_dir, downloaded if absent, checked),
            ``digits`` (the 1,797 8x8 digits inside scikit-learn, grey repeated to three channels), or the path of an
            .npz with x_train, y_train, x_test, y_test: uint8 NHWC images, integer labels; where it also has
            class_names, their number is the number of classes, otherwise the highest label tells.
        data_dir: folder of the CIFAR archives.

    Raises:
        UserError: unknown name, missing or broken file, no network.
    """
    if dataset in ("cifar100", "cifar10"):
        arrays, classes = read_cifar(dataset, Path(data_dir)), 100 if dataset == "cifar100" else 10
    elif dataset == "digits":
        arrays, classes = _digits(), 10
    elif dataset.endswith(".npz"):
        arrays, classes = read_npz(Path(dataset))
    else:
        raise UserError(f"--dataset {dataset!r} is not allowed; cifar100, cifar10, digits or the path of an .npz file")
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    x_train, y_train, x_test, y_test = arrays
    images = [torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(device) for x in (x_train, x_test)]
    labels = [torch.from_numpy(y.astype(np.int64)).to(device) for y in (y_train, y_test)]
    # A mirrored digit is no digit, and half of an 8x8 image is no crop.
    pad, flip = (1, False) if dataset == "digits" else (4, True)
    return Data(
        name=dataset,
        x_train=images[0],
        y_train=labels[0],
        x_test=images[1],
        y_test=labels[1],
        num_classes=classes,
        pad=pad,
        flip=flip,
        sha256=digest.hexdigest(),
    )


def check_dataset(dataset: str) -> None:
    """Refuse a --dataset that cannot be loaded, before anything else is done."""
    if dataset.endswith(".npz"):
        if not os.path.isfile(dataset):  # Path's raises for a name that is too long
            raise UserError(f"--dataset {dataset}: no such file")
    elif dataset not in ("cifar100", "cifar10", "digits"):
        raise UserError(f"--dataset {dataset!r} is not allowed; cifar100, cifar10, digits or the path of an .npz file")


def _digits() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=3)
    # A fixed, stratified split; scikit-learn's order groups writers.
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=360, random_state=0, stratify=digits.target
    )
    return x_train, y_train, x_test, y_test
