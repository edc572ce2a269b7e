"""Data: whole sets as uint8 tensors on the training device; order, crops and flips from generators of their own."""

import hashlib
import http.client
import io
import os
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiment import UserError

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
LARGEST_NPZ = 16 * 2**30
"""Bytes that an .npz may unpack to; CIFAR-100 takes 0.18 GiB. More is a mistake or a zip bomb."""


def as_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]; the division, not a product, so that values equal torchvision's ToTensor."""
    return images.float().div_(255)


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


def augment(images: Tensor, pad: int, shift: Tensor, mirror: Tensor | None) -> Tensor:
    """Crop every image at its own offset out of its zero-padded self, then mirror where asked.

    Args:
        images: (N, C, H, W) uint8.
        pad: zero padding on each side.
        shift: (2, N) row and column offsets in [0, 2 pad].
        mirror: (N,) 0 or 1, or None for no mirroring.

    Returns:
        (N, C, H, W) uint8. One gather: no loop over images, no host synchronisation.
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
        arrays, classes = _cifar(dataset, Path(data_dir)), 100 if dataset == "cifar100" else 10
    elif dataset == "digits":
        arrays, classes = _digits(), 10
    elif dataset.endswith(".npz"):
        arrays, classes = _npz(Path(dataset))
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


def check_name(dataset: str) -> None:
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


def _cifar(dataset: str, folder: Path) -> tuple[np.ndarray, ...]:
    from experiment.compat import import_torchvision

    torchvision = import_torchvision()
    kind = torchvision.datasets.CIFAR100 if dataset == "cifar100" else torchvision.datasets.CIFAR10
    archive = folder / kind.filename
    advice = f"fetch {kind.url} in a browser and put it at {archive}"
    try:
        splits = [kind(str(folder), train=train, download=False) for train in (True, False)]
    except RuntimeError:
        # Absent, truncated and altered files all give this one error; a good archive beside them mends each case.
        if archive.exists() and not torchvision.datasets.utils.check_integrity(str(archive), kind.tgz_md5):
            # torchvision would overwrite it; it is not ours to delete.
            raise UserError(
                f"{archive} is damaged or incomplete (its MD5 is not {kind.tgz_md5}); remove it, {advice}"
            ) from None
        present, unpacked = archive.exists(), folder / kind.base_folder
        altered = f"{unpacked} is incomplete or altered (MD5)" if unpacked.exists() else ""
        if not present:
            print(f"{altered or f'{dataset} is not in {folder}'}; downloading {kind.url}", flush=True)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # torchvision waits for ever
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                splits = [kind(str(folder), train=train, download=True) for train in (True, False)]
        except (RuntimeError, OSError, EOFError, http.client.HTTPException) as error:
            if not present and archive.exists():
                archive.unlink()  # half an archive, or a web page saved under its name
            reason = " ".join(str(error).split())[:120]
            found = f"{altered}, and " if altered else ""
            raise UserError(f"{found}{dataset} could not be downloaded ({reason}); {advice}") from error
        finally:
            socket.setdefaulttimeout(before)
    return (
        splits[0].data,
        np.asarray(splits[0].targets),
        splits[1].data,
        np.asarray(splits[1].targets),
    )


def _npz(path: Path) -> tuple[tuple[np.ndarray, ...], int]:
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
    return arrays, _check_arrays(path, arrays, names)


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
