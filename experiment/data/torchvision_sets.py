"""CIFAR-10, CIFAR-100 and SVHN through torchvision, which checks every file's MD5; missing files are downloaded."""

import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from experiment import UserError
from experiment.data.arrays import Arrays
from experiment.download import download

SETS = {
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}, "targets"),
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}, "targets"),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}, "labels"),
}
"""By --dataset: torchvision's class, its arguments for the training and for the test set, its attribute of labels."""


def read_torchvision(dataset: str, folder: Path) -> Arrays:
    """One of SETS, in the order of its files."""
    from experiment.compat import import_torchvision

    datasets = import_torchvision().datasets
    name, train, test, labels = SETS[dataset]
    kind = getattr(datasets, name)

    def read() -> tuple[Any, Any]:
        return kind(str(folder), **train), kind(str(folder), **test)

    try:
        parts = read()
    except RuntimeError:  # a file is missing or has another MD5
        from filelock import FileLock  # only downloads need it

        aside = folder / f".{dataset}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{dataset}.lock"):
                try:
                    parts = read()  # another process may have downloaded it while this one waited
                except RuntimeError:
                    shutil.rmtree(aside, ignore_errors=True)  # a killed process may have left it
                    aside.mkdir()
                    _complete(kind, datasets.utils, folder, aside)
                    parts = read()
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write to {folder}: {reason}; choose another --data_dir") from error
    x = [part.data.transpose(0, 2, 3, 1) if dataset == "svhn" else part.data for part in parts]
    y = [np.asarray(getattr(part, labels)) for part in parts]
    return Arrays(x[0], y[0], x[1], y[1], tuple(getattr(parts[0], "classes", "0123456789")))


def _complete(kind: Any, utils: ModuleType, folder: Path, aside: Path) -> None:
    """Download the files that are missing; CIFAR's archive is then unpacked. Each appears in `folder` as a whole."""
    if not hasattr(kind, "base_folder"):
        for split in ("train", "test"):
            _fetch(*kind.split_list[split], utils, folder, aside)
        return
    unpacked = folder / kind.base_folder
    if unpacked.exists():  # perhaps altered on purpose: noisy labels, a subset
        raise UserError(
            f"{unpacked} is incomplete or altered (MD5); move it away to have {kind.filename} unpacked again"
        )
    _fetch(kind.url, kind.filename, kind.tgz_md5, utils, folder, aside)
    utils.extract_archive(str(folder / kind.filename), str(aside))
    os.replace(aside / kind.base_folder, unpacked)


def _fetch(url: str, name: str, md5: str, utils: ModuleType, folder: Path, aside: Path) -> None:
    """Download a file unless it exists; either way its MD5 must be right."""
    file, by_hand = folder / name, f"download {url} in a browser and save it as {folder / name}"
    if file.exists():
        if not utils.check_integrity(str(file), md5):  # not ours to delete
            raise UserError(f"{file} is damaged or incomplete (its MD5 is not {md5}); remove it, then {by_hand}")
        return
    print(f"{file} is missing; downloading {url}", flush=True)
    try:
        download(url, aside / name)
        if not utils.check_integrity(str(aside / name), md5):
            raise UserError(f"MD5 of the download is not {md5}")
    except UserError as error:
        raise UserError(f"{file} is missing and could not be downloaded ({error}); {by_hand}") from error
    os.replace(aside / name, file)
