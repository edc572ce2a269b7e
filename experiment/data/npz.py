"""An .npz as a data set: read, and refused with a reason where it is none."""

import sys
import zipfile
from pathlib import Path

import numpy as np

from experiment import UserError
from experiment.data.arrays import Arrays

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

LARGEST_NPZ = 16 * 2**30
"""Bytes that an .npz may unpack to; CIFAR-100 takes 0.18 GiB. More is a mistake or a zip bomb."""


def read_npz(path: Path) -> Arrays:
    """The four checked arrays of an .npz; class_names, where it has them, say how many classes there are."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            names = set(archive.namelist())
        if size > LARGEST_NPZ:
            raise UserError(
                f"{path} would unpack to {size / 2**30:.0f} GiB; at most {LARGEST_NPZ / 2**30:.0f} are allowed"
            )
        missing = [key for key in NPZ_KEYS if f"{key}.npy" not in names]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}; needed are {', '.join(NPZ_KEYS)}")
        with np.load(path, allow_pickle=False) as content:
            arrays = tuple(content[key] for key in NPZ_KEYS)
            names = content.get("class_names")
        if any(isinstance(array, bytes) for array in (*arrays, names)):
            raise ValueError("a member is no array")  # numpy hands such out as they are
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib and numpy's header parser each raise types of their own
        raise UserError(
            f"{path} is not a readable .npz of plain arrays: {' '.join(str(error).split())[:120]}"
        ) from error
    if names is not None and names.dtype.kind == "S":  # as HDF5 has them
        names = np.char.decode(names, "utf-8", "replace")
    classes = _check_arrays(path, arrays, names)
    return Arrays(*arrays, classes, None if names is None else tuple(map(str, names.tolist())))


def _check_arrays(path: Path, arrays: tuple[np.ndarray, ...], names: np.ndarray | None) -> int:
    """Refuse what is not images and labels; return the number of classes."""
    x_train, y_train, x_test, y_test = arrays
    for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if x.dtype != np.uint8:
            raise UserError(f"{path}: x_{name} is {x.dtype}; uint8 is needed")
        if x.ndim != 4 or x.shape[3] != 3 or min(x.shape[1:3]) < 8:
            raise UserError(f"{path}: x_{name} has shape {x.shape}; (N, H, W, 3) with H and W of at least 8 is needed")
        if y.dtype.kind not in "iu":  # numpy counts durations among the integers
            raise UserError(f"{path}: y_{name} is {y.dtype}; integers are needed")
        if y.shape != (len(x),):
            raise UserError(f"{path}: y_{name} has shape {y.shape}; ({len(x)},) is needed, one label per image")
        if len(x) < 2:
            raise UserError(f"{path}: x_{name} holds {len(x)} images; at least 2 are needed")
        if y.min() < 0 or y.max() > 9999:
            raise UserError(f"{path}: y_{name} has labels from {y.min()} to {y.max()}; 0 up to 9999 are allowed")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise UserError(f"{path}: x_train is {x_train.shape[1:]} and x_test {x_test.shape[1:]}; they must be equal")
    if names is not None and (names.ndim != 1 or len(names) < 2 or y_train.max() >= len(names)):
        raise UserError(
            f"{path}: class_names has shape {names.shape}; a name for each label up to {y_train.max()} is needed"
        )
    classes = int(y_train.max()) + 1 if names is None else len(names)
    empty = sorted(set(range(classes)) - set(np.unique(y_train).tolist()))
    if empty and names is not None:
        # The file itself says how many classes there are: a small sample may lack some.
        print(f"warning: {path}: {len(empty)} of {classes} classes have no training image", file=sys.stderr)
    elif empty or classes < 2:
        raise UserError(
            f"{path}: y_train has no image of class {empty[0] if empty else 1}; each class needs one, "
            "unless an array class_names says how many classes there are"
        )
    if y_test.max() >= classes:
        raise UserError(f"{path}: y_test has label {y_test.max()}; 0 to {classes - 1} are allowed")
    return classes
