"""An .npz file as a data set."""

import zipfile
from pathlib import Path

import numpy as np

from experiment import UserError
from experiment.data.arrays import Arrays, check_arrays

KEYS = ("x_train", "y_train", "x_test", "y_test")

LARGEST_GIB = 16
"""Most that an .npz may unpack to; CIFAR-100 takes 0.18. More is a mistake or a zip bomb."""


def read_npz(path: Path) -> Arrays:
    """The four arrays of an .npz, and its class_names if it has any."""
    try:
        with zipfile.ZipFile(path) as archive:
            gib = sum(member.file_size for member in archive.infolist()) / 2**30
        if gib > LARGEST_GIB:
            raise UserError(f"{path} would unpack to {gib:.0f} GiB; expected at most {LARGEST_GIB}")
        with np.load(path, allow_pickle=False) as content:
            missing = [key for key in KEYS if key not in content]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}; expected the arrays {', '.join(KEYS)}")
            *arrays, names = (content.get(key) for key in (*KEYS, "class_names"))
        if any(isinstance(array, bytes) for array in (*arrays, names)):
            raise ValueError("a member is not an array")  # numpy returns its bytes
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib and numpy's header parser each raise types of their own
        raise UserError(
            f"{path} is not a readable .npz of plain arrays: {' '.join(str(error).split())[:120]}"
        ) from error
    if names is not None:
        if names.ndim != 1:
            raise UserError(f"{path}: class_names has shape {names.shape}; expected a name per class")
        if names.dtype.kind == "S":  # as HDF5 has them
            names = np.char.decode(names, "utf-8", "replace")
        names = tuple(map(str, names.tolist()))
    return check_arrays(Arrays(*arrays, names), path)
