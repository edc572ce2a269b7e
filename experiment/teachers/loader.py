"""A teacher: any network, frozen."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar100_models import check_model_name
from experiment import UserError
from experiment.teachers.networks import WEIGHTS_SUFFIXES, Network, load_network, robustbench_name
from experiment.teachers.zoo import unknown_name


class FrozenTeacher(nn.Module):
    """A network that stays as it is: eval mode whatever ``train()`` is told, no parameter requires a gradient.

    Attributes:
        model: the network; maps (N, 3, H, W) in [0, 1] to logits (N, num_classes).
        num_classes, name, path, sha256: as ``Network``'s.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.model = network.model.requires_grad_(False)
        self.num_classes = network.num_classes
        self.name = network.name
        self.path = network.path
        self.sha256 = network.sha256
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def check_teacher_name(
    name_or_path: str | Path, teacher_path: str | Path | None = None, path_flag: str = "--teacher_path"
) -> str | None:
    """Refuse what cannot be a teacher, without importing anything heavy; cheap enough for the flag parser.

    Args:
        path_flag: the user's flag for teacher_path, for messages.

    Returns:
        The RobustBench name that is meant, or None if it is a network of our own or an architecture.

    Raises:
        UserError: neither a possible name nor an existing path; or teacher_path does not go with it or does not exist.
    """
    what = os.fspath(name_or_path)
    name = robustbench_name(what)
    if name is None and not os.path.lexists(what) and not _is_architecture(what):
        if os.sep in what or what.endswith(WEIGHTS_SUFFIXES):
            raise UserError(f"{what!r}: no such file or folder")
        raise unknown_name(what)
    if name is None and teacher_path is None and _is_architecture(what):
        raise UserError(f"{what!r} is an architecture: give its weights with {path_flag}")
    if teacher_path is not None:
        if name is None and not _is_architecture(what):
            raise UserError(
                f"{path_flag} {teacher_path} needs the name of its architecture, such as BDM, not the path {what!r}"
            )
        if not os.path.isfile(teacher_path):
            raise UserError(f"{path_flag} {teacher_path}: no such file")
    return name


def _is_architecture(what: str) -> bool:
    try:
        check_model_name(what)
    except ValueError:
        return False
    return True


def load_teacher(
    name_or_path: str | Path,
    num_classes: int | None = None,
    teacher_path: str | Path | None = None,
    dataset: str = "cifar100",
    *,
    model_dir: str | Path = "models",
    device: str | torch.device = "cpu",
) -> FrozenTeacher:
    """Load a teacher, frozen and in eval mode, in float32. The global random generators are left as they were.

    Args:
        name_or_path: a RobustBench name of the data's zoo (BDM, DEC and LTD for short), a checkpoint or finished run
            folder of this project, or what ``build_model`` takes, whose weights are then in teacher_path.
        num_classes: that of the data; None accepts any.
        teacher_path: the weights of a name: a file of RobustBench's downloaded by hand, a state dict, or .safetensors.
        dataset: the data's name, which tells the zoo.

    Raises:
        UserError: as ``load_network``.
    """
    check_teacher_name(name_or_path, teacher_path)
    place = {"num_classes": num_classes, "dataset": dataset, "model_dir": model_dir, "device": device}
    options = {"weights": teacher_path, "weights_flag": "--teacher_path", "unfinished": False}
    return FrozenTeacher(load_network(name_or_path, **options, **place))
