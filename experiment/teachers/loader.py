"""A teacher: any trained network, frozen."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar100_models import check_model_name
from experiment import UserError
from experiment.teachers.networks import Network, load_network
from experiment.teachers.zoo import robustbench_name, unknown_network


class FrozenTeacher(nn.Module):
    """A network without trainable parameters that stays in eval mode, also after ``train()``.

    Attributes:
        model: the network; maps (N, 3, H, W) in [0, 1] to logits (N, num_classes).
        num_classes, name, sha256: as ``Network``'s.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.model = network.model.requires_grad_(False)
        self.num_classes = network.num_classes
        self.name = network.name
        self.sha256 = network.sha256
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def check_teacher_name(
    name_or_path: str | Path, teacher_path: str | Path | None = None, path_flag: str = "--teacher_path"
) -> None:
    """Check that a name and a file can be a teacher, before anything heavy is imported.

    Args:
        path_flag: the flag of teacher_path, for messages.

    Raises:
        UserError: neither a possible name nor an existing path; teacher_path is missing, not needed or does not exist.
    """
    name = os.fspath(name_or_path)
    if robustbench_name(name) is None:
        if _is_architecture(name):
            if teacher_path is None:
                raise UserError(f"{name!r} is an architecture: give its weights with {path_flag}")
        elif not os.path.lexists(name):
            raise unknown_network(name)
        elif teacher_path is not None:
            raise UserError(
                f"{path_flag} {teacher_path} needs the name of its architecture, such as BDM, not the path {name!r}"
            )
    if teacher_path is not None and not os.path.isfile(teacher_path):
        raise UserError(f"{path_flag} {teacher_path}: no such file")


def _is_architecture(name: str) -> bool:
    try:
        check_model_name(name)
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
    """Load a teacher, frozen, in eval mode and float32; the global random generators do not change.

    Args:
        name_or_path: a RobustBench name for the data set (BDM, DEC, LTD for short), a checkpoint or finished run folder
            of this project, or an architecture (what ``build_model`` takes) with its weights in teacher_path.
        num_classes: that of the data; None accepts any.
        teacher_path: the weights of a name: RobustBench's file, a state dict, or .safetensors.
        dataset: the data set, which has its own RobustBench networks.

    Raises:
        UserError: as ``load_network``.
    """
    check_teacher_name(name_or_path, teacher_path)
    place = {"num_classes": num_classes, "dataset": dataset, "model_dir": model_dir, "device": device}
    options = {"weights": teacher_path, "weights_flag": "--teacher_path", "unfinished": False}
    return FrozenTeacher(load_network(name_or_path, **options, **place))
