"""RobustBench's zoos: names, published accuracies, architectures, and where the weights are."""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from experiment import UserError, compat
from experiment.cli import ALIASES

CLASSES = {"cifar100": 100, "cifar10": 10}
"""The zoos, by the name of their data, and its number of classes."""

PUBLISHED = {
    ("cifar100", "Wang2023Better_WRN-28-10"): (0.7258, 0.3883),
    ("cifar100", "Cui2023Decoupled_WRN-28-10"): (0.7385, 0.3918),
    ("cifar100", "Chen2021LTD_WRN34_10"): (0.6407, 0.3059),
    ("cifar10", "Wang2023Better_WRN-28-10"): (0.9244, 0.6731),
    ("cifar10", "Cui2023Decoupled_WRN-28-10"): (0.9216, 0.6773),
    ("cifar10", "Chen2021LTD_WRN34_10"): (0.8521, 0.5694),
}
"""Clean and AutoAttack accuracy at 8/255 on the 10,000 test images. Source: RobustBench's leaderboard."""

# usercontent with confirm=t: Google Drive's answer without its page about files too large for a virus scan.
DOWNLOAD_URL = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"

BROWSER_URL = "https://drive.google.com/file/d/{}/view"

WEIGHTS_SUFFIXES = (".pt", ".pth", ".safetensors")

_NAME = re.compile(r"Standard|[A-Z][A-Za-z]+20\d\d[\w-]+")


class Source(NamedTuple):
    """How to build a RobustBench architecture, and where its weights are."""

    build: Callable[[], nn.Module]
    url: str
    browser_url: str


def robustbench_name(name: str) -> str | None:
    """RobustBench's name of a network, which BDM, DEC and LTD are short for, or None if it cannot be one."""
    name = ALIASES.get(name, name)
    return name if _NAME.fullmatch(name) else None


def published_accuracy(name: str, dataset: str) -> tuple[float, float] | None:
    """RobustBench's clean and AutoAttack accuracy (8/255) of BDM, DEC or LTD on all test images; None for others."""
    return PUBLISHED.get((dataset, ALIASES.get(name, name)))


def unknown_network(name: str) -> UserError:
    """The error for what is neither a network's name nor an existing path."""
    if os.sep in name or name.endswith(WEIGHTS_SUFFIXES):
        return UserError(f"{name!r}: no such file or folder")
    return UserError(
        f"{name!r} is not known; choose BDM, DEC, LTD, another Linf name of RobustBench for CIFAR-10 or CIFAR-100 such "
        "as Wang2023Better_WRN-70-16 or Rebuffi2021Fixing_28_10_cutmix_ddpm, or a path to a checkpoint or run folder"
    )


def zoo_of(name: str, dataset: str, num_classes: int | None) -> str:
    """The zoo of a data set: its own; for a file or folder that the user made, the one with as many classes."""
    if dataset in CLASSES:
        return dataset
    found = [zoo for zoo, classes in CLASSES.items() if classes == num_classes]
    if not found or dataset in ("digits", "svhn"):
        raise UserError(
            f"{name!r} is a name of RobustBench, which has networks for {' and '.join(CLASSES)} only, not for "
            f"{dataset}: give the path of a checkpoint or run folder"
        )
    return found[0]


def source_of(name: str, zoo: str) -> Source:
    """The architecture and the address of a RobustBench network; importing robustbench takes seconds."""
    robustbench, full_name = compat.import_robustbench(), robustbench_name(name)
    registry = compat.linf_models(robustbench, zoo)
    if full_name not in registry:
        for other in CLASSES:
            if full_name in compat.linf_models(robustbench, other):
                raise UserError(
                    f"{name!r} is a {other} network of RobustBench: give --dataset {other}, or a name of {zoo}"
                )
        raise unknown_network(name)
    entry = registry[full_name]
    if isinstance(entry["gdrive_id"], str):
        return Source(entry["model"], DOWNLOAD_URL.format(entry["gdrive_id"]), BROWSER_URL.format(entry["gdrive_id"]))
    if isinstance(entry["gdrive_id"], list):
        raise UserError(f"{name!r} is a mixture of several networks, which is not supported; choose another")
    # The transformers: RobustBench registers them with timm, under a name that its own registry misspells.
    import timm  # seconds; robustbench has just imported it

    variant = f"{full_name.lower().replace('-', '_')}_{zoo}_linf"
    url = timm.get_pretrained_cfg(variant).url
    return Source(lambda: timm.create_model(variant, num_classes=CLASSES[zoo]), url, url)
