"""A data set as NumPy arrays, and what is done to it before anyone trains on it: smaller images, order, held out."""

from dataclasses import dataclass, field, replace

import numpy as np

from experiment import UserError

SMALLEST_SIDE = 8
"""Pixels; the networks need as many."""

SEED = 0
"""Of every draw here: a data set is the same in every run. RandomState: NumPy has frozen its streams for good."""


def _none(*shape: int) -> np.ndarray:
    return np.empty((0, *shape), np.uint8)


@dataclass(frozen=True)
class Arrays:
    """Images (N, H, W, 3) uint8 and integer labels (N,), as a source holds them.

    Attributes:
        num_classes: labels are below it.
        class_names: one name per class, where the source has them.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] | None = None
    x_holdout: np.ndarray = field(default_factory=lambda: _none(0, 0, 3))
    y_holdout: np.ndarray = field(default_factory=_none)


def shuffle_test(arrays: Arrays) -> Arrays:
    """The test images in one fixed random order, so that the first N of a set that is sorted by class are a sample."""
    order = np.random.RandomState(SEED).permutation(len(arrays.y_test))
    return replace(arrays, x_test=arrays.x_test[order], y_test=arrays.y_test[order])


def reduce_side(arrays: Arrays, side: int) -> Arrays:
    """Images of side x side pixels, each the mean of a whole block, rounded half up.

    Raises:
        UserError: the images are not square, or their side is no multiple of `side`; side is below 8.
    """
    height, width = arrays.x_train.shape[1:3]
    if side < SMALLEST_SIDE or height != width or height % side:
        sides = [n for n in range(SMALLEST_SIDE, height + 1) if height % n == 0] if height == width else []
        allowed = ", ".join(map(str, sides)) or "no other size, as they are not square"
        raise UserError(f"--side {side} is not allowed for images of {height} x {width} pixels; {allowed}")

    def means(x: np.ndarray) -> np.ndarray:
        block = height // side
        sums = x.reshape(-1, side, block, side, block, 3).sum(axis=(2, 4), dtype=np.uint32)
        return ((sums + block**2 // 2) // block**2).astype(np.uint8)

    return replace(arrays, x_train=means(arrays.x_train), x_test=means(arrays.x_test))


def hold_out(arrays: Arrays, count: int) -> Arrays:
    """Set `count` training images aside, drawn with a fixed seed, with the classes' shares in the training set.

    Raises:
        UserError: a class would keep no training image.
    """
    quotas, sizes = _quotas(arrays, count)
    if (quotas >= np.maximum(sizes, 1)).any():
        raise UserError(
            f"--holdout {count} is not allowed with {len(arrays.y_train)} training images; each class must keep one"
        )
    aside = _drawn(arrays, quotas)
    kept = np.setdiff1d(np.arange(len(arrays.y_train)), aside)
    return replace(
        arrays,
        x_train=arrays.x_train[kept],
        y_train=arrays.y_train[kept],
        x_holdout=arrays.x_train[aside],
        y_holdout=arrays.y_train[aside],
    )


def draw_training(arrays: Arrays, count: int) -> Arrays:
    """Keep `count` training images, drawn with a fixed seed, with the classes' shares in the training set.

    Raises:
        UserError: there are not so many, or a class would have none.
    """
    quotas, sizes = _quotas(arrays, min(count, len(arrays.y_train)))
    if count > len(arrays.y_train) or (quotas < np.minimum(sizes, 1)).any():
        raise UserError(
            f"--train_examples {count} is not allowed with {len(arrays.y_train)} training images; at most so many, and "
            "one of each class"
        )
    kept = _drawn(arrays, quotas)
    return replace(arrays, x_train=arrays.x_train[kept], y_train=arrays.y_train[kept])


def _quotas(arrays: Arrays, count: int) -> tuple[np.ndarray, np.ndarray]:
    """How many of `count` images each class gives, and how many it has."""
    sizes = np.bincount(arrays.y_train, minlength=arrays.num_classes)
    shares = count * sizes / sizes.sum()
    quotas = np.floor(shares).astype(int)
    # What rounding down left over goes to the largest remainders, the first class where they are equal.
    quotas[np.argsort(quotas - shares, kind="stable")[: count - quotas.sum()]] += 1
    return quotas, sizes


def _drawn(arrays: Arrays, quotas: np.ndarray) -> np.ndarray:
    """Indices of so many random training images of each class, ascending."""
    order = np.random.RandomState(SEED).permutation(len(arrays.y_train))
    drawn = [order[arrays.y_train[order] == label][:quota] for label, quota in enumerate(quotas)]
    return np.sort(np.concatenate(drawn))
