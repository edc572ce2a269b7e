"""Data sets, whole, as uint8 tensors on the training device."""

import argparse
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiment import UserError
from experiment.data.arrays import Arrays, draw_training, hold_out, reduce_side, shuffle_test
from experiment.data.augmentation import as_float, augment
from experiment.data.cifar import read_cifar
from experiment.data.image_folder import check_image_folder, read_image_folder
from experiment.data.npz import read_npz
from experiment.data.svhn import read_svhn

NAMED = ("cifar100", "cifar10", "svhn", "digits")


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
        sha256: hash of the arrays here, so of what is trained on and of its test order.
        x_holdout, y_holdout: training images set aside, as the others; empty without --holdout.
        class_names: one name per class, or None where the source has none.
        test_order: "as stored" (CIFAR) or "shuffled", once and for all.
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
    test_order: str = "as stored"

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


def selection(args: argparse.Namespace) -> dict[str, int]:
    """What the flags --side, --train_examples and --holdout ask of ``load_data``."""
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
    """Load a data set whole onto a device.

    Args:
        dataset: ``cifar100`` or ``cifar10`` (torchvision's files under data_dir, downloaded if absent, checked),
            ``svhn`` (the same), ``digits`` (the 1,797 8x8 digits inside scikit-learn, grey repeated to three channels),
            the path of an .npz with x_train, y_train, x_test, y_test: uint8 NHWC images, integer labels; where it also
            has class_names, their number is the number of classes, otherwise the highest label tells; or a folder of
            images, train/ and test/ or val/ with a folder per class. CIFAR's test images
            keep their order (RobustBench's convention); any others are shuffled once, with a fixed seed.
        data_dir: folder of CIFAR's and SVHN's files.
        side: reduce the images to side x side pixels, each the mean of a block; 0 leaves them as they are.
        train_examples: train on so many of the training images, in the classes' shares, always the same; 0: all.
        holdout: number of these to set aside, in the classes' shares, drawn with a fixed seed.

    Raises:
        UserError: unknown name, missing or broken file, no network; a side or a number of
            images that the set does not allow.
    """
    check_dataset(dataset)
    in_order = dataset in ("cifar100", "cifar10")
    if in_order:
        arrays = read_cifar(dataset, Path(data_dir))
    elif dataset == "digits":
        arrays = _digits()
    elif dataset == "svhn":
        arrays = shuffle_test(read_svhn(Path(data_dir)))
    elif dataset.endswith(".npz"):
        arrays = shuffle_test(read_npz(Path(dataset)))
    else:
        arrays = shuffle_test(read_image_folder(Path(dataset)))
    if side:
        arrays = reduce_side(arrays, side)
    if train_examples:
        arrays = draw_training(arrays, train_examples)
    if holdout:
        arrays = hold_out(arrays, holdout)
    digest = hashlib.sha256()
    names = ("x_train", "y_train", "x_test", "y_test", "x_holdout", "y_holdout")
    for name in names:
        digest.update(np.ascontiguousarray(getattr(arrays, name)).tobytes())

    def tensor(array: np.ndarray) -> Tensor:
        array = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array.astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    # A mirrored digit is no digit, and half of an 8x8 image is no crop.
    pad, flip = 1 if dataset == "digits" else 4, dataset not in ("digits", "svhn")
    return Data(
        name=dataset,
        **{name: tensor(getattr(arrays, name)) for name in names},
        num_classes=arrays.num_classes,
        pad=pad,
        flip=flip,
        sha256=digest.hexdigest(),
        class_names=arrays.class_names,
        test_order="as stored" if in_order else "shuffled",
    )


def check_dataset(dataset: str) -> None:
    """Refuse a --dataset that cannot be loaded, before anything else is done."""
    if dataset.endswith(".npz"):
        if not os.path.isfile(dataset):  # Path's raises for a name that is too long
            raise UserError(f"--dataset {dataset}: no such file")
    elif dataset not in NAMED and os.path.isdir(dataset):
        check_image_folder(Path(dataset))
    elif dataset not in NAMED:
        raise UserError(
            f"--dataset {dataset!r} is not allowed; {', '.join(NAMED)}, the path of an .npz file, or a folder of images"
        )


def _digits() -> Arrays:
    """The digits inside scikit-learn, split and shuffled with a fixed seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=3)
    # A fixed, stratified split; scikit-learn's order groups writers.
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=360, random_state=0, stratify=digits.target
    )
    return Arrays(x_train, y_train, x_test, y_test, 10, tuple("0123456789"))
