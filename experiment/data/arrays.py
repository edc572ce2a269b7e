"""A data set as NumPy arrays: the checks on it, smaller images, and fixed subsets."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiment import UserError

SMALLEST_SIDE = 8
"""Pixels; the networks need as many."""

MOST_CLASSES = 10_000

SEED = 0
"""Seed of every draw here. NumPy guarantees that the numbers of a RandomState never change."""


@dataclass(frozen=True)
class Arrays:
    """Images (N, H, W, 3) uint8 and integer labels (N,), as a source holds them; no names: as many as labels."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names) if self.class_names else int(self.y_train.max()) + 1


def check_arrays(arrays: Arrays, source: Path) -> Arrays:
    """Return the arrays, or raise UserError with the first problem; warn of named classes without a training image."""
    problem = next(_problems(arrays), None)
    if problem:
        raise UserError(f"{source}: {problem}")
    missing = arrays.num_classes - len(np.unique(arrays.y_train))
    if missing:
        print(f"warning: {source}: {missing} of {arrays.num_classes} classes have no training image", file=sys.stderr)
    return arrays


def _problems(arrays: Arrays) -> Iterator[str]:
    """What is wrong, in an order in which each check can rely on those before it."""
    yield from _problems_of_split("train", arrays.x_train, arrays.y_train)
    yield from _problems_of_split("test", arrays.x_test, arrays.y_test)
    if arrays.x_train.shape[1:] != arrays.x_test.shape[1:]:
        yield f"images are {arrays.x_train.shape[1:]} in x_train and {arrays.x_test.shape[1:]} in x_test"
    classes = arrays.num_classes
    if classes < 2:
        yield f"there are {classes} classes; expected at least 2"
    if arrays.class_names is None:
        for label in np.setdiff1d(np.arange(classes), arrays.y_train):
            yield f"y_train has no image of class {label}; add one, or class_names for all classes"
    for split, y in (("train", arrays.y_train), ("test", arrays.y_test)):
        if y.max() >= classes:
            yield f"y_{split} has label {y.max()}; expected 0 to {classes - 1}, as there are {classes} classes"


def _problems_of_split(split: str, x: np.ndarray, y: np.ndarray) -> Iterator[str]:
    if x.dtype != np.uint8:
        yield f"x_{split} is {x.dtype}; expected uint8"
    if x.ndim != 4 or x.shape[3] != 3 or min(x.shape[1:3]) < SMALLEST_SIDE:
        yield f"x_{split} has shape {x.shape}; expected (N, H, W, 3) with H and W of at least {SMALLEST_SIDE}"
    if y.dtype.kind not in "iu":  # np.integer would include timedelta64
        yield f"y_{split} is {y.dtype}; expected integers"
    if y.shape != (len(x),):
        yield f"y_{split} has shape {y.shape}; expected ({len(x)},), one label per image"
    if len(x) < 2:
        yield f"x_{split} has {len(x)} images; expected at least 2"
    if y.min() < 0 or y.max() >= MOST_CLASSES:
        yield f"y_{split} has labels from {y.min()} to {y.max()}; expected 0 to {MOST_CLASSES - 1} at most"


def shuffle_test(arrays: Arrays) -> Arrays:
    """Put the test images in a fixed random order: the first N of a set sorted by class are no sample of it."""
    order = np.random.RandomState(SEED).permutation(len(arrays.y_test))
    return replace(arrays, x_test=arrays.x_test[order], y_test=arrays.y_test[order])


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
