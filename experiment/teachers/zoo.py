"""RobustBench's zoo: names, claimed accuracies, architectures, and where their weights are."""

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from experiment import UserError, compat

CLEAN_ACCURACY = {
    "Wang2023Better_WRN-28-10": 0.7258,
    "Cui2023Decoupled_WRN-28-10": 0.7385,
    "Chen2021LTD_WRN34_10": 0.6407,
}
"""Clean accuracy on CIFAR-100's 10,000 test images. Source: RobustBench's leaderboard."""

ROBUSTBENCH_CLASSES = 100

# usercontent with confirm=t: Google Drive's answer without its page about files too large for a virus scan.
DOWNLOAD_URL = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"

BROWSER_URL = "https://drive.google.com/file/d/{}/view"

NAME_PATTERN = re.compile(r"[A-Z][A-Za-z]+20\d\d[\w-]+")


class Source(NamedTuple):
    """How to build a RobustBench architecture, and where its weights are."""

    build: Callable[[], nn.Module]
    url: str
    browser_url: str


def unknown_name(name: str) -> UserError:
    """The refusal of a name that no teacher has."""
    return UserError(
        f"teacher {name!r} is not known; choose BDM, DEC, LTD, another CIFAR-100 Linf name of RobustBench such as "
        "Wang2023Better_WRN-70-16 or Rebuffi2021Fixing_28_10_cutmix_ddpm, or a path to a checkpoint or run folder"
    )


def source_of(called: str, name: str) -> Source:
    """The architecture of a RobustBench name, and where its weights are; importing robustbench takes seconds."""
    registry = compat.cifar100_linf(compat.import_robustbench())
    if name not in registry:
        raise unknown_name(called)
    entry = registry[name]
    if isinstance(entry["gdrive_id"], str):
        return Source(entry["model"], DOWNLOAD_URL.format(entry["gdrive_id"]), BROWSER_URL.format(entry["gdrive_id"]))
    if isinstance(entry["gdrive_id"], list):
        raise UserError(
            f"teacher {called!r} is a mixture of several networks, which cannot be a teacher; choose another"
        )
    # The transformers: RobustBench registers them with timm, under a name that its own registry misspells.
    import timm  # seconds; robustbench has just imported it

    variant = f"{name.lower().replace('-', '_')}_cifar100_linf"
    url = timm.get_pretrained_cfg(variant).url
    return Source(lambda: timm.create_model(variant, num_classes=ROBUSTBENCH_CLASSES), url, url)
