"""CIFAR-10 and CIFAR-100: torchvision's archives, downloaded where absent, and checked."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from experiment import UserError
from experiment.data.arrays import Arrays
from experiment.data.download import fetch, place_aside


def read_cifar(dataset: str, folder: Path) -> Arrays:
    """CIFAR-10 or CIFAR-100, in the order of the archives."""
    from experiment.compat import import_torchvision

    datasets = import_torchvision().datasets
    kind = datasets.CIFAR100 if dataset == "cifar100" else datasets.CIFAR10

    def read() -> tuple[Any, Any]:
        return kind(str(folder), train=True), kind(str(folder), train=False)

    try:
        train, test = read()
    except RuntimeError:
        with place_aside(folder, dataset) as aside:
            try:
                train, test = read()  # another process may have brought it while this one waited
            except RuntimeError:
                _bring(dataset, kind, datasets.utils, folder, aside)
                train, test = read()
    labels = np.asarray(train.targets), np.asarray(test.targets)
    return Arrays(train.data, labels[0], test.data, labels[1], len(train.classes), tuple(train.classes))


def _bring(dataset: str, kind: Any, utils: Any, folder: Path, aside: Path) -> None:
    """Put the unpacked archive in place; absent, truncated and altered files all need that."""
    archive, unpacked = folder / kind.filename, folder / kind.base_folder
    advice = f"fetch {kind.url} in a browser and put it at {archive}"
    altered = f"{unpacked} is incomplete or altered (MD5)" if unpacked.exists() else ""
    if not archive.exists():
        print(f"{altered or f'{dataset} is not in {folder}'}; downloading {kind.url}", flush=True)

        def download() -> None:
            utils.download_url(kind.url, str(aside), kind.filename, kind.tgz_md5)
            os.replace(aside / kind.filename, archive)

        fetch(f"{altered}, and {dataset}" if altered else dataset, download, advice)
    elif not utils.check_integrity(str(archive), kind.tgz_md5):
        raise UserError(  # it is not ours to delete
            f"{archive} is damaged or incomplete (its MD5 is not {kind.tgz_md5}); remove it, {advice}"
        )
    utils.extract_archive(str(archive), str(aside))
    if unpacked.exists():  # somebody's work, perhaps: noisy labels, a subset
        kept = next(
            path for i in itertools.count(1) if not (path := folder / f"{kind.base_folder}.altered{i}").exists()
        )
        os.replace(unpacked, kept)
        print(f"{altered}: kept as {kept}; {unpacked} is unpacked anew", flush=True)
    os.replace(aside / kind.base_folder, unpacked)
