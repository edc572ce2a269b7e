"""CIFAR-10, CIFAR-100 and SVHN through torchvision, which checks every file's MD5; missing files are downloaded."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np

from experiment import UserError
from experiment.data.sources import Arrays
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
                download(url, aside / name)
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
