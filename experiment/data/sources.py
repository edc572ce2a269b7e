"""Data sets as NumPy arrays: CIFAR and SVHN by torchvision, scikit-learn's digits, .npz files, folders of images."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np

from experiment import UserError, files
from experiment.compat import import_torchvision

SMALLEST_SIDE = 8
"""Pixels; the networks need as many."""

MOST_CLASSES = 10_000

KEYS = ("x_train", "y_train", "x_test", "y_test")
SUFFIXES = (".png", ".jpg", ".jpeg")
ANNOTATIONS = "val_annotations.txt"

SETS = {
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}, "targets"),
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}, "targets"),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}, "labels"),
}
"""By --dataset: torchvision's class, its arguments for the training and for the test set, its attribute of labels."""


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


def check_dataset(dataset: str) -> None:
    """Raise UserError for a --dataset that does not exist, before anything is read or downloaded."""
    if dataset.endswith(".npz"):
        if not os.path.isfile(dataset):  # Path.is_file raises for a name that is too long
            raise UserError(f"--dataset {dataset}: no such file")
    elif dataset not in (*SETS, "digits"):
        if not os.path.isdir(dataset):
            allowed = ", ".join((*SETS, "digits"))
            raise UserError(
                f"--dataset {dataset!r} is not allowed; expected {allowed}, a .npz file or a folder of images"
            )
        if not os.path.isdir(f"{dataset}/train") or not _test_splits(Path(dataset)):
            raise UserError(f"--dataset {dataset}: expected train/ and test/ or val/, with a folder per class in each")


def read(dataset: str, data_dir: Path) -> Arrays:
    """Read a data set; missing files of torchvision's are downloaded into data_dir."""
    check_dataset(dataset)
    if dataset in SETS:
        return _torchvision(dataset, data_dir)
    if dataset == "digits":
        return _digits()
    arrays = _npz(Path(dataset)) if dataset.endswith(".npz") else _image_folder(Path(dataset))
    for problem in _problems(arrays):
        raise UserError(f"{dataset}: {problem}")
    return arrays


def _test_splits(folder: Path) -> list[Path]:
    return [folder / name for name in ("test", "val") if (folder / name).is_dir()]


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


def _npz(path: Path) -> Arrays:
    """The four arrays of an .npz, and its class_names if it has any."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            found = {key: content[key] for key in (*KEYS, "class_names") if key in content}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("a member is not an array")  # numpy returns its bytes
    except Exception as error:  # zipfile, zlib and numpy's header parser each raise types of their own
        raise UserError(
            f"{path} is not a readable .npz of plain arrays: {' '.join(str(error).split())[:120]}"
        ) from error
    if missing := [key for key in KEYS if key not in found]:
        raise UserError(f"{path} has no {', '.join(missing)}; expected the arrays {', '.join(KEYS)}")
    names = found.pop("class_names", None)
    if names is not None:
        if names.ndim != 1:
            raise UserError(f"{path}: class_names has shape {names.shape}; expected a name per class")
        names = tuple(names.astype(str).tolist())
    return Arrays(**found, class_names=names)


def _image_folder(folder: Path) -> Arrays:
    """All images, grey ones repeated to three channels; classes are the folders of train/ in alphabetical order.

    The test images are in test/ or val/: a folder per class, or a table in val/ as in Tiny-ImageNet.
    """
    splits = _test_splits(folder)
    # Tiny-ImageNet has a test/ too, without labels.
    test = next((split for split in splits if (split / ANNOTATIONS).is_file()), splits[0])
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    arrays, shape = [], None
    for split in (folder / "train", test):
        files = _annotated(split / ANNOTATIONS) if (split / ANNOTATIONS).is_file() else _by_folder(split)
        if not files:
            raise UserError(f"{split} has no image ({', '.join(SUFFIXES)}) in a folder of its class")
        unknown = sorted({name for _, name in files} - set(classes))
        if unknown:
            raise UserError(f"{split} has the class {unknown[0]!r}, which {folder / 'train'} does not have")
        empty = sorted(set(classes) - {name for _, name in files}) if split != test else []
        if empty:
            raise UserError(f"{split / empty[0]} has no image; each class needs one")
        images = []
        for file, _ in files:
            images.append(_read(file))
            shape = shape or images[0].shape
            if images[-1].shape != shape:
                raise UserError(f"{file} is {images[-1].shape[:2]}, others are {shape[:2]}; expected equal sizes")
        arrays += [np.stack(images), np.array([classes.index(name) for _, name in files])]
    return Arrays(*arrays, tuple(classes))


def _by_folder(split: Path) -> list[tuple[Path, str]]:
    """Every image under split/<class>/, at any depth, and its class; sorted, as file systems list in any order."""
    tops = [top for top in split.iterdir() if top.is_dir()]
    return sorted((file, top.name) for top in tops for file in top.rglob("*") if file.suffix.lower() in SUFFIXES)


def _annotated(table: Path) -> list[tuple[Path, str]]:
    """Tiny-ImageNet's val/: images/<file>, and a table of file name, class and box."""
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise UserError(f"{table}: expected file names and classes, separated by tabs")
    return [(table.parent / "images" / row[0], row[1]) for row in rows]


def _read(file: Path) -> np.ndarray:
    from PIL import Image  # only this kind of data set needs it

    try:
        with Image.open(file) as image:
            mode, pixels = image.mode, np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image ({reason})") from error
    if mode.startswith(("I", "F")):  # the conversion would clip them at 255
        raise UserError(f"{file} has pixels of more than 8 bits (mode {mode}); expected 8 bits per channel")
    return pixels


def _digits() -> Arrays:
    """scikit-learn's digits, grey repeated to three channels. Its order groups writers, so the split is random."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=3)
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=360, random_state=0, stratify=digits.target
    )
    return Arrays(x_train, y_train, x_test, y_test, tuple("0123456789"))


def _torchvision(dataset: str, folder: Path) -> Arrays:
    """One of SETS, in the order of its files."""
    datasets = import_torchvision().datasets
    name, train, test, labels = SETS[dataset]
    kind = getattr(datasets, name)

    def read() -> tuple[Any, Any]:
        return kind(str(folder), **train), kind(str(folder), **test)

    try:
        parts = read()
    except RuntimeError:  # a file is missing or has another MD5
        from filelock import FileLock  # only downloads need it

        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{dataset}.lock"), TemporaryDirectory(prefix=".part", dir=folder) as aside:
                try:
                    parts = read()  # another process may have downloaded it while this one waited
                except RuntimeError:
                    _complete(kind, datasets.utils, folder, Path(aside))
                    parts = read()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write to {folder}: {reason}; choose another --data_dir") from error
    x = [part.data.transpose(0, 2, 3, 1) if dataset == "svhn" else part.data for part in parts]
    y = [np.asarray(getattr(part, labels)) for part in parts]
    return Arrays(x[0], y[0], x[1], y[1], tuple(getattr(parts[0], "classes", "0123456789")))


def _complete(kind: Any, utils: ModuleType, folder: Path, aside: Path) -> None:
    """Download the files that are missing; CIFAR's archive is then unpacked. Each appears in `folder` as a whole."""
    is_archive = hasattr(kind, "base_folder")
    unpacked = folder / getattr(kind, "base_folder", "")
    if is_archive and unpacked.exists():  # perhaps altered on purpose: noisy labels, a subset
        raise UserError(
            f"{unpacked} is incomplete or altered (MD5); move it away to have {kind.filename} unpacked again"
        )
    parts = [kind.split_list[split] for split in ("train", "test")] if not is_archive else ()
    for url, name, md5 in parts or [(kind.url, kind.filename, kind.tgz_md5)]:
        file, by_hand = folder / name, f"download {url} in a browser and save it as {folder / name}"
        if not file.exists():
            print(f"{file} is missing; downloading {url}", flush=True)
            try:
                files.download(url, aside / name)
                if not utils.check_integrity(str(aside / name), md5):
                    raise UserError(f"MD5 of the download is not {md5}")
            except UserError as error:
                raise UserError(f"{file} is missing and could not be downloaded ({error}); {by_hand}") from error
            os.replace(aside / name, file)
        elif not utils.check_integrity(str(file), md5):  # not ours to delete
            raise UserError(f"{file} is damaged or incomplete (its MD5 is not {md5}); remove it, then {by_hand}")
    if is_archive:
        utils.extract_archive(str(folder / kind.filename), str(aside))
        os.replace(aside / kind.base_folder, unpacked)
