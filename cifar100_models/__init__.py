"""Networks by the names of the papers; ``build_model`` is the entry point."""

import re

from torch import nn

from cifar100_models import from_file, mobilenet_v2, resnet, wide_resnet
from cifar100_models.from_file import ModelError

__all__ = ["MODELS", "ModelError", "build_model", "check_model_name"]

MODELS = {
    "RES-18": resnet.resnet18,
    "RES-20": lambda num_classes: resnet.small_resnet(20, num_classes),
    "RES-8": lambda num_classes: resnet.small_resnet(8, num_classes),
    "MN-V2": mobilenet_v2.mobilenet_v2,
}
"""Fixed names, in addition to WRN-d-w (depth d = 6n + 4, width factor w)."""

_WIDE = re.compile(r"WRN-(\d{1,3})-(\d{1,2})")


def check_model_name(name: str) -> None:
    """Raise the ValueError that ``build_model`` would raise for this name, without building anything."""
    if from_file.split(name):
        from_file.check(name)
        return
    wide = _WIDE.fullmatch(name)
    if name not in MODELS and not (wide and wide_resnet.allowed(int(wide[1]), int(wide[2]))):
        raise ValueError(
            f"model {name!r} is not known; choose from {', '.join(MODELS)} or WRN-d-w with d = 10, 16, 22, 28, ... "
            "and w from 1 to 20, such as WRN-28-10, or give a network of your own as FILE.py:function"
        )


def build_model(name: str, num_classes: int = 100) -> nn.Module:
    """Build a freshly initialised network (random weights from torch's global generator).

    Args:
        name: ``RES-18``, ``RES-20``, ``RES-8``, ``MN-V2``, ``WRN-d-w``, or ``FILE.py:function`` for a function of the
            user's that is called with num_classes.
        num_classes: >= 2.

    Returns:
        A module in train mode that maps (N, 3, H, W) in [0, 1], H and W >= 8, to logits (N, num_classes).

    Raises:
        ValueError: the name is not known, or num_classes < 2.
        ModelError: the user's file or function fails.
    """
    check_model_name(name)
    if num_classes < 2:
        raise ValueError(f"num_classes {num_classes} is out of range (expected at least 2)")
    if from_file.split(name):
        return from_file.build(name, num_classes)
    wide = _WIDE.fullmatch(name)
    if wide:
        return wide_resnet.WideResNet(int(wide[1]), int(wide[2]), num_classes)
    return MODELS[name](num_classes)
