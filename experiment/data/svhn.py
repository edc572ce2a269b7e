"""SVHN's cropped digits: torchvision's .mat files, downloaded where absent, and checked."""

import os
from pathlib import Path

import numpy as np

from experiment import UserError
from experiment.data.arrays import Arrays
from experiment.data.download import fetch, place_aside


def read_svhn(folder: Path) -> Arrays:
    """73,257 training and 26,032 test images of 32 x 32 pixels; label 0 is the digit 0."""
    from experiment.compat import import_torchvision

    datasets = import_torchvision().datasets
    splits = []
    for split in ("train", "test"):
        url, name, md5 = datasets.SVHN.split_list[split]
        file = folder / name
        if not file.exists():
            with place_aside(folder, "svhn") as aside:
                if not file.exists():  # another process may have brought it while this one waited
                    print(f"svhn is not in {folder}; downloading {url}", flush=True)

                    def download(url: str = url, name: str = name, md5: str = md5, aside: Path = aside) -> None:
                        datasets.utils.download_url(url, str(aside), name, md5)
                        os.replace(aside / name, folder / name)

                    fetch("svhn", download, f"fetch {url} in a browser and put it at {file}")
        try:
            splits.append(datasets.SVHN(str(folder), split=split))
        except RuntimeError as error:
            raise UserError(
                f"{file} is damaged or incomplete (its MD5 is not {md5}); remove it, fetch {url} in a browser and put "
                "it there"
            ) from error
    train, test = splits
    images = [np.ascontiguousarray(part.data.transpose(0, 2, 3, 1)) for part in splits]
    return Arrays(images[0], np.asarray(train.labels), images[1], np.asarray(test.labels), 10, tuple("0123456789"))
