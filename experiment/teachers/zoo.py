"""RobustBench's zoo: names, claimed accuracies, architectures, and where their weights are."""

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from experiment import UserError, compat

CLASSES = {"cifar100": 100, "cifar10": 10}
"""The zoos, by the name of their data, and its number of classes."""

CLEAN_ACCURACY = {
    "cifar100": {
        "Wang2023Better_WRN-28-10": 0.7258,
        "Cui2023Decoupled_WRN-28-10": 0.7385,
        "Chen2021LTD_WRN34_10": 0.6407,
    },
    "cifar10": {
        "Wang2023Better_WRN-28-10": 0.9244,
        "Cui2023Decoupled_WRN-28-10": 0.9216,
        "Chen2021LTD_WRN34_10": 0.8521,
    },
}
"""Clean accuracy on the data's 10,000 test images. Source: RobustBench's leaderboard."""

# usercontent with confirm=t: Google Drive's answer without its page about files too large for a virus scan.
DOWNLOAD_URL = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"

BROWSER_URL = "https://drive.google.com/file/d/{}/view"

NAME_PATTERN = re.compile(r"Standard|[A-Z][A-Za-z]+20\d\d[\w-]+")


class Source(NamedTuple):
    """How to build a RobustBench architecture, and where its weights are."""

    build: Callable[[], nn.Module]
    url: str
    browser_url: str


def unknown_name(name: str) -> UserError:
    """The refusal of a name that no network has."""
    return UserError(
        f"{name!r} is not known; choose BDM, DEC, LTD, another Linf name of RobustBench for CIFAR-10 or CIFAR-100 such "
        "as Wang2023Better_WRN-70-16 or Rebuffi2021Fixing_28_10_cutmix_ddpm, or a path to a checkpoint or run folder"
    )


def zoo_of(called: str, dataset: str, num_classes: int | None) -> str:
    """The zoo of a data set: its own; for a file or folder that the user made, the one with as many classes.

    Raises:
        UserError: RobustBench has no networks for such data.
    """
    if dataset in CLASSES:
        return dataset
    found = [zoo for zoo, classes in CLASSES.items() if classes == num_classes]
    if not found or dataset in ("digits", "svhn"):
        raise UserError(
            f"{called!r} is a name of RobustBench, which has networks for {' and '.join(CLASSES)} only, not for "
            f"{dataset}: give the path of a checkpoint or run folder"
        )
    return found[0]


def source_of(called: str, name: str, zoo: str) -> Source:
    """The architecture of a RobustBench name, and where its weights are; importing robustbench takes seconds.

    Raises:
        UserError: the zoo has no such name, or it is a mixture of several networks.
    """
    robustbench = compat.import_robustbench()
    registry = compat.linf_models(robustbench, zoo)
    if name not in registry:
        others = [other for other in CLASSES if other != zoo and name in compat.linf_models(robustbench, other)]
        if others:
            raise UserError(
                f"{called!r} is a {others[0]} network of RobustBench: give --dataset {others[0]}, or a name of {zoo}"
            )
        raise unknown_name(called)
    entry = registry[name]
    if isinstance(entry["gdrive_id"], str):
        return Source(entry["model"], DOWNLOAD_URL.format(entry["gdrive_id"]), BROWSER_URL.format(entry["gdrive_id"]))
    if isinstance(entry["gdrive_id"], list):
        raise UserError(f"{called!r} is a mixture of several networks, which cannot be loaded here; choose another")
    # The transformers: RobustBench registers them with timm, under a name that its own registry misspells.
    import timm  # seconds; robustbench has just imported it

    variant = f"{name.lower().replace('-', '_')}_{zoo}_linf"
    url = timm.get_pretrained_cfg(variant).url
    return Source(lambda: timm.create_model(variant, num_classes=CLASSES[zoo]), url, url)
